"""Responses made by several steps: the same rows, resumed and reused like those of one step."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import dagster as dg
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.assets import build_assets
from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.commands.gc import find_garbage
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.dagster_home import make_dagster_home
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, ArtifactStore
from helpsteer_assets_tests.assets.conftest import Finished, quick_experiment, write_experiment
from helpsteer_assets_tests.conftest import die, run_to_its_death

POLICIES = (("sft_generations", ALL), ("generations", "0.1"), ("generations", "0.9"))


@pytest.fixture
def sharded(copied: Callable[..., Finished]) -> Finished:
    """A finished home without responses, and three steps to make them."""
    run = copied(evaluation={"shards": 3})
    for asset, partition in POLICIES:
        shutil.rmtree(run.home / "artifacts" / asset / partition)
    return run


def responses(run: Finished) -> list[dict]:
    store, present = ArtifactStore(run.home), fingerprints(run.experiment)
    found = [store.get(asset, partition, present[asset, partition].value) for asset, partition in POLICIES]
    return [row for artifact in found for row in pq.read_table(artifact.file("generations.parquet")).to_pylist()]


def test_three_steps_make_the_rows_of_one(quick: Finished, sharded: Finished) -> None:
    assert sharded.run()
    assert responses(sharded) == responses(quick)
    for label in ("sft_generations", "generations w=0.1"):
        assert [f"{label} shard {number} of 3: done" in sharded.announced for number in (1, 2, 3)] == [True] * 3
        assert f"{label}: computing, going on from 8 rows done" in sharded.announced
    assert not list(sharded.home.glob("artifacts/*/*/*.partial"))


def test_finished_responses_are_reused_whatever_the_number_of_shards(copied: Callable[..., Finished]) -> None:
    run = copied(evaluation={"shards": 2})
    assert run.run(select="key:generations", weights=["0.1"])
    assert "generations w=0.1 shard 2 of 2: the whole is finished already" in run.announced
    assert any(line.startswith("generations w=0.1: reused") for line in run.announced)


def test_a_killed_shard_costs_the_others_nothing(
    quick: Finished, sharded: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_in_the_second_shard() -> None:
        from helpsteer_assets.assets import evaluation

        whole = evaluation._answering
        monkeypatch.setattr(
            evaluation,
            "_answering",
            lambda run, policy: die() if run.checkpoints.exists() else whole(run, policy),
        )
        sharded.run(select="key:sft_generations")

    sharded.experiment = quick_experiment(sharded.home.parent, evaluation={"shards": 3})
    run_to_its_death(die_in_the_second_shard)
    (partial,) = (sharded.home / "artifacts/sft_generations").rglob(CHECKPOINTS)
    (first,) = partial.iterdir()
    kept = first.read_bytes()
    assert first.name == "generations-1-of-3.jsonl" and kept.count(b"\n") == 3
    assert sharded.run()
    assert "sft_generations shard 1 of 3: computing, going on from 3 rows done" in sharded.announced
    assert responses(sharded) == responses(quick)


def test_shards_run_as_processes_of_their_own(quick: Finished, sharded: Finished) -> None:
    file = write_experiment(sharded.home.parent, evaluation={"shards": 2})
    home = make_dagster_home(sharded.home, "quick")
    environment = os.environ | {
        "HELPSTEER_EXPERIMENT": str(file),
        "HELPSTEER_HOME": str(sharded.home),
        "DAGSTER_HOME": str(home),
    }
    command = ["-m", "dagster", "asset", "materialize", "-m", "helpsteer_assets.definitions", "--partition", "0.1"]
    done = subprocess.run(
        [sys.executable, *command, "--select", "generations"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with dg.DagsterInstance.from_config(str(home)) as instance:
        (run,) = instance.get_run_records(limit=1)
        events = [entry.dagster_event for entry in instance.all_logs(run.dagster_run.run_id)]
    assert sorted(event.step_key for event in events if event is not None and event.is_step_success) == [
        "generations.generations_from_shards",
        "generations.generations_shard_1_of_2",
        "generations.generations_shard_2_of_2",
    ]


def test_shards_enter_the_fingerprint_where_they_may_change_a_response(tmp_path) -> None:
    def of(precision: str, shards: int) -> str:
        experiment = quick_experiment(tmp_path, model={"precision": precision}, evaluation={"shards": shards})
        return fingerprints(experiment)["generations", "0.1"].value

    assert of("fp32", 1) == of("fp32", 4)
    assert len({of("bf16", shards) for shards in (1, 2, 4)}) == 3


def test_an_asset_of_shards_is_the_same_to_dagster(tmp_path) -> None:
    def spec(shards: int) -> dg.AssetSpec:
        assets = build_assets(quick_experiment(tmp_path, evaluation={"shards": shards}))
        return next(asset for asset in assets if asset.key == dg.AssetKey("generations")).get_asset_spec()

    one, four = spec(1), spec(4)
    assert {dep.asset_key for dep in four.deps} == {dep.asset_key for dep in one.deps}
    for field in ("description", "metadata", "group_name", "code_version", "owners", "tags", "kinds"):
        assert getattr(four, field) == getattr(one, field), field


def test_more_shards_than_prompts_are_refused(tmp_path) -> None:
    with pytest.raises(HelpsteerError, match=r"evaluation: shards \(9\) must not be more than prompts \(8\)"):
        quick_experiment(tmp_path, evaluation={"shards": 9})


def test_locks_of_shards_go_with_their_artifact(sharded: Finished) -> None:
    assert sharded.run(select="key:sft_generations")
    locks = sharded.home / "locks/sft_generations"
    assert len(list(locks.rglob("*.shard-?.lock"))) == 3
    assert not [
        item for item in find_garbage(sharded.home, [sharded.experiment], 0).garbage if locks in item.path.parents
    ]
    shutil.rmtree(sharded.home / "artifacts/sft_generations")
    found = [item.path for item in find_garbage(sharded.home, [sharded.experiment], 0).garbage]
    assert len([path for path in found if path.match("*.shard-?.lock")]) == 3

"""What nothing refers to any more, and its removal, on homes whose artifacts the store made."""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.cli import main
from helpsteer_assets.commands.gc import UNFINISHED_DAYS, Survey, delete_garbage, find_garbage
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, MANIFEST, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_in_use
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.test_graph_fingerprints import POLICIES, experiment
from helpsteer_assets_tests.conftest import die, run_to_its_death

SETTINGS: dict[str, Any] = {"name": "mine", "objective.weights": [0.1, 0.9]}
MINE = experiment(SETTINGS)
EARLIER = experiment({**SETTINGS, "objective.beta": 0.2})
"""As MINE up to the policies."""


def make(of: Experiment, home: Path, *, record: bool) -> None:
    """Everything of an experiment, finished by the store, recorded as the latest materialization or not."""
    for fingerprint in fingerprints(of).values():
        name = (fingerprint.asset, fingerprint.partition, fingerprint.value)

        def compute(folder: Path) -> dict[str, Any]:
            (folder / "result.bin").write_bytes(bytes(2000))
            return {}

        manifest = {"experiment": of.name, "settings": fingerprint.settings, "inputs": fingerprint.inputs}
        artifact, _ = ArtifactStore(home).build(*name, manifest=manifest, compute=compute, on_wait=lambda _: None)
        if record:
            Warehouse(home).record(
                experiment=of.name,
                asset=fingerprint.asset,
                partition=fingerprint.partition,
                fingerprint=fingerprint.value,
                path=artifact.path,
                run_id="run-1",
                reused=False,
                table=None,
                parquet=None,
                publish=False,
            )


def begin(of: Experiment, asset: str, home: Path, partition: str = ALL) -> Path:
    """Unfinished work."""
    folder = ArtifactStore(home).partial(asset, partition, fingerprints(of)[asset, partition].value)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CHECKPOINTS / "rows.jsonl").write_bytes(bytes(5000))
    return folder


def age(path: Path, days: float) -> None:
    """As if it had last been written to so many days ago."""
    then = time.time() - days * 86_400
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then), follow_symlinks=False)


@pytest.fixture(scope="session")
def finished_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished") / "home"
    make(MINE, home, record=True)
    return home


@pytest.fixture
def home(finished_home: Path, tmp_path: Path) -> Path:
    """A home in which everything of MINE is finished and recorded; a test may change it."""
    return shutil.copytree(finished_home, tmp_path / "home")


def paths(survey: Survey) -> set[Path]:
    return {item.path for item in survey.garbage}


def folders(of: Experiment, home: Path, *assets: str) -> set[Path]:
    """Where the artifacts of an experiment (of these assets) lie."""
    return {
        home / "artifacts" / asset / partition / fingerprint.value
        for (asset, partition), fingerprint in fingerprints(of).items()
        if not assets or asset in assets
    }


def locks(of: Experiment, home: Path, *assets: str) -> set[Path]:
    return {
        home / "locks" / path.parent.relative_to(home / "artifacts") / f"{path.name}.lock"
        for path in folders(of, home, *assets)
    }


def artifacts(home: Path) -> set[Path]:
    """All that lies in the store, hidden or not."""
    return set((home / "artifacts").glob("*/*/*"))


def contents(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# What goes, and what stays


def test_earlier_settings_go_and_what_they_share_with_the_present_stays(home: Path) -> None:
    make(EARLIER, home, record=False)
    survey = find_garbage(Home(home), [MINE])
    gone, today = folders(EARLIER, home, *POLICIES), time.strftime("%Y-%m-%d", time.gmtime())
    reasons = dict.fromkeys(gone, f"made for mine on {today}; nothing refers to it")
    reasons |= dict.fromkeys(locks(EARLIER, home, *POLICIES), "lock of an artifact that is gone")
    assert {item.path: item.reason for item in survey.garbage} == reasons
    assert all(item.bytes > 2000 for item in survey.garbage if item.path in gone)
    assert survey.kept == len(fingerprints(MINE)) and survey.kept_bytes > 2000 * survey.kept

    assert delete_garbage(Home(home), [MINE]) == survey
    assert artifacts(home) == folders(MINE, home)
    assert set((home / "locks").glob("*/*/*.lock")) == locks(MINE, home)
    assert {item.state for item in status(MINE, Home(home))} == {"complete"}
    assert delete_garbage(Home(home), [MINE], older_than=0).garbage == []


def test_what_was_materialized_last_and_what_it_was_made_from_stays_without_a_name(home: Path) -> None:
    registry = home / "warehouse" / "registry" / "mine"
    for entry in registry.iterdir():
        if entry.name != "tradeoff_report":
            shutil.rmtree(entry)
    assert find_garbage(Home(home), []).garbage == []
    make(EARLIER, home, record=True)
    assert paths(find_garbage(Home(home), [])) == folders(MINE, home, *POLICIES) | locks(MINE, home, *POLICIES)
    assert find_garbage(Home(home), [MINE]).garbage == []
    shutil.rmtree(registry)
    assert paths(find_garbage(Home(home), [MINE])) == folders(EARLIER, home, *POLICIES) | locks(
        EARLIER, home, *POLICIES
    )


def test_a_latest_materialization_that_cannot_be_read_keeps_all_it_may_mean(home: Path) -> None:
    make(EARLIER, home, record=False)
    entry = home / "warehouse" / "registry" / "mine" / "modpo_models" / "0.1.json"
    entry.write_text('{"fingerprint": ')
    survey = find_garbage(Home(home), [MINE])
    assert {path.parent.name for path in paths(survey) & folders(EARLIER, home, "modpo_models")} == {"0.9"}
    assert survey.notes == [f"{entry} cannot be read, so all artifacts of modpo_models 0.1 are kept"]


def test_an_experiment_whose_source_cannot_be_read_keeps_all_that_was_made_for_it(home: Path) -> None:
    source = home.parent / "ratings.jsonl"
    source.write_text("{}\n")
    local = {"name": "local", "data.source": str(source), "evaluation.rater": "none"}
    first, second = experiment(local), experiment({**local, "sft.steps": 3})
    make(first, home, record=False)
    begun = begin(second, "sft_model", home)
    age(begun, 100)
    source.unlink()

    survey = find_garbage(Home(home), [MINE, second])
    assert survey.garbage == []
    (note,) = survey.notes
    assert note.startswith("experiment local cannot be read here, so what was made for it is kept, and all unfinished ")
    assert f"data.source: {source} does not exist" in note
    # One that was never run here has nothing to keep.
    assert begun in paths(find_garbage(Home(home), [MINE, experiment({**local, "name": "stranger"})]))


def test_unfinished_work_goes_after_a_week_unless_an_experiment_names_it_and_older_than_spares_what_is_younger(
    home: Path,
) -> None:
    begun = begin(EARLIER, "modpo_models", home, "0.1")
    age(begun, UNFINISHED_DAYS - 0.5)
    young = find_garbage(Home(home), [MINE])
    assert young.garbage == []
    assert young.notes == ["unfinished, and no experiment names it: 1, kept for 7 days (--older-than)"]
    assert paths(find_garbage(Home(home), [MINE], older_than=6)) == {begun}
    age(begun, UNFINISHED_DAYS + 0.1)
    (old,) = find_garbage(Home(home), [MINE]).garbage
    assert (old.path, old.reason) == (begun, "unfinished, last written to 7 days ago; no experiment names it")
    assert find_garbage(Home(home), [MINE, EARLIER], older_than=0).garbage == []
    age(begun, -1000)  # by a clock that was ahead
    assert find_garbage(Home(home), [MINE], older_than=0).garbage == []

    make(EARLIER, home, record=False)
    old = min(folders(EARLIER, home, "generations"))
    age(old, 31)
    assert {path for path in paths(find_garbage(Home(home), [MINE], older_than=30)) if path.is_dir()} == {old}


def test_leftovers_go_and_files_of_others_stay(home: Path, tmp_path: Path) -> None:
    (model,) = folders(MINE, home, "sft_model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("mine")

    def leave(path: Path, days: float = 2) -> Path:
        path.mkdir(parents=True)
        (path / "file").write_bytes(bytes(1500))
        age(path, days)
        return path

    digests = home / "cache" / ".digests.json.xyz"
    digests.parent.mkdir(exist_ok=True)
    digests.write_text("{")
    age(digests, 2)
    left = {
        shutil.copytree(model, model.with_name(f"{model.name}.damaged-1")): "set aside as damaged",
        shutil.copytree(model, model.with_name(f"{model.name}.partial")): "left beside its finished artifact",
        leave(model / CHECKPOINTS): "left in a finished artifact",
        leave(model.with_name(".deleted-1")): "its removal was interrupted",
        leave(home / "warehouse" / ".publish-abc"): "temporary, left by a process that was killed",
        digests: "temporary, left by a process that was killed",
    }
    leave(model.parent / "backup")
    leave(home / "artifacts" / "notes" / "of mine")
    leave(home / "warehouse" / ".publish-young", days=0.5)
    leave(home / "dagster" / "mine" / ".publish-dagster")
    (model.parent / ("c" * 32)).symlink_to(tmp_path / "outside")
    before = contents(tmp_path)

    survey = delete_garbage(Home(home), [MINE])

    assert {item.path: item.reason for item in survey.garbage} == left
    stays = {name for name in before if not any((tmp_path / name).is_relative_to(path) for path in left)}
    assert contents(tmp_path).keys() - {"home/locks/home.lock", "home/cache/digests.json"} == stays
    assert (model.parent / ("c" * 32)).is_symlink()


# Homes in use, interruptions, and homes that are not as usual


def test_a_home_in_which_a_process_works_is_listed_and_refused_to_be_cleaned_at_once(home: Path) -> None:
    make(EARLIER, home, record=False)
    fork = multiprocessing.get_context("fork")
    working, end = fork.Event(), fork.Event()

    def work() -> None:
        with home_in_use(home, "modpo_models w=0.1"):
            working.set()
            end.wait(60)

    process = fork.Process(target=work)
    process.start()
    assert working.wait(60)
    before = artifacts(home)
    with pytest.raises(HelpsteerError, match=rf"{home} is in use: process {process.pid} on .*\(modpo_models w=0.1, si"):
        delete_garbage(Home(home), [MINE])
    assert artifacts(home) == before
    assert folders(EARLIER, home, *POLICIES) <= paths(find_garbage(Home(home), [MINE]))
    end.set()
    process.join(60)
    delete_garbage(Home(home), [MINE])
    assert artifacts(home) == folders(MINE, home)


def test_a_removal_that_is_killed_half_way_leaves_no_half_artifact_and_is_finished_by_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(EARLIER, home, record=False)

    def remove_half(path: Path) -> None:
        (path / MANIFEST).unlink()
        die()

    def cut_short() -> None:
        monkeypatch.setattr(shutil, "rmtree", remove_half)
        delete_garbage(Home(home), [MINE])

    run_to_its_death(cut_short)
    (hidden,) = (path for path in artifacts(home) if path.name.startswith(".deleted-"))
    assert all((path / MANIFEST).exists() for path in artifacts(home) - {hidden})
    removed = delete_garbage(Home(home), [MINE])
    assert {item.path: item.reason for item in removed.garbage}[hidden] == "its removal was interrupted"
    assert artifacts(home) == folders(MINE, home)


def test_a_home_that_a_newer_version_wrote_is_refused_whole(home: Path) -> None:
    make(EARLIER, home, record=False)
    path = next(iter(folders(EARLIER, home, "tradeoff"))) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1000}))
    before = artifacts(home)
    with pytest.raises(HelpsteerError, match=rf"{path} was written by a newer helpsteer_assets .*nothing is removed"):
        delete_garbage(Home(home), [MINE])
    assert artifacts(home) == before


# The command

Gc = Callable[..., Result]


def write(of: Experiment, folder: Path) -> Path:
    path = folder / f"{of.name}.yaml"
    path.write_text(yaml.safe_dump(of.model_dump(mode="json")))
    return path


@pytest.fixture
def gc(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gc:
    monkeypatch.setenv("HELPSTEER_HOME", str(home))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo")
    monkeypatch.chdir(tmp_path)
    make(EARLIER, home, record=False)
    return lambda *arguments: CliRunner().invoke(main, ["gc", *arguments])


def test_the_command_lists_then_removes_then_has_nothing_to_do(gc: Gc, home: Path) -> None:
    listed = gc()
    assert listed.exit_code == 0, listed.output
    model = min(folders(EARLIER, home, "modpo_models"))
    (row,) = (line for line in listed.output.splitlines() if model.name in line)
    assert row.split()[1:3] == ["kB", str(model.relative_to(home))] and "made for mine on" in row
    assert f"{len(locks(EARLIER, home, *POLICIES))} small ones" in listed.output
    assert "gc --delete`, with the same options, removes it" in listed.output
    told = json.loads(gc("--json").output)
    assert told["bytes"] == sum(item["bytes"] for item in told["items"]) > 2000
    assert (told["home"], told["deleted"], told["notes"]) == (str(home), False, [])
    for mistake in (["--keep", "mine.yaml"], ["--older-than", "-1"]):
        assert gc("--delete", *mistake).exit_code == 2
    assert folders(EARLIER, home) <= artifacts(home)

    removed = gc("--delete")
    assert removed.exit_code == 0, removed.output
    assert f"kept: {len(fingerprints(MINE))} finished artifacts, " in removed.output
    assert "removed: " in removed.output and model.name in removed.output
    assert artifacts(home) == folders(MINE, home)
    assert gc("--delete").output.splitlines()[-1] == "nothing to remove"


def test_the_command_keeps_the_experiments_that_are_named(gc: Gc, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = experiment({**SETTINGS, "name": "other", "objective.beta": 0.3})
    make(other, home, record=False)
    kept = ["--keep", str(write(other, home.parent))]
    assert len(json.loads(gc(*kept, "--json").output)["items"]) == 2 * len(folders(EARLIER, home, *POLICIES))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", str(write(EARLIER, home.parent)))
    assert gc(*kept).output.splitlines()[-1] == "nothing to remove"

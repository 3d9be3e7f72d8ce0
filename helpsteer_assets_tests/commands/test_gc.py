"""What nothing refers to any more, and its removal: the policy, on homes whose artifacts the store made."""

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

from helpsteer_assets.assets.graph import Fingerprint, fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.cli import main
from helpsteer_assets.commands import gc as garbage
from helpsteer_assets.commands.gc import UNFINISHED_DAYS, Survey, delete_garbage, find_garbage
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, MANIFEST, ArtifactStore
from helpsteer_assets.store.locks import exclusive_lock
from helpsteer_assets.store.uses import using
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.test_graph_fingerprints import POLICIES, experiment
from helpsteer_assets_tests.conftest import die, run_to_its_death
from helpsteer_assets_tests.read_only import run_read_only

SETTINGS: dict[str, Any] = {"name": "mine", "objective.weights": [0.1, 0.9]}
MINE = experiment(SETTINGS)
EARLIER = experiment({**SETTINGS, "objective.beta": 0.2})
"""As MINE up to the policies."""


def make(found: Experiment, home: Path, *, record: bool = True) -> None:
    """Everything of an experiment, finished by the store, recorded as the latest materialization or not."""
    for fingerprint in fingerprints(found).values():
        folder = make_one(found, fingerprint, home)
        if record:
            Warehouse(home).record(
                experiment=found.name,
                asset=fingerprint.asset,
                partition=fingerprint.partition,
                fingerprint=fingerprint.value,
                path=folder,
                run_id="run-1",
                reused=False,
                table=None,
                parquet=None,
                constants={},
                publish=False,
            )


def make_one(found: Experiment, fingerprint: Fingerprint, home: Path) -> Path:
    def compute(folder: Path) -> dict[str, Any]:
        (folder / "result.bin").write_bytes(bytes(2000))
        return {}

    artifact, _ = ArtifactStore(home).build(
        fingerprint.asset,
        fingerprint.partition,
        fingerprint.value,
        manifest={"experiment": found.name, "settings": fingerprint.settings, "inputs": fingerprint.inputs},
        compute=compute,
        on_wait=lambda holder: None,
    )
    return artifact.path


def begin(found: Experiment, asset: str, home: Path, partition: str = ALL) -> Path:
    """Unfinished work."""
    folder = ArtifactStore(home).partial(asset, partition, fingerprints(found)[asset, partition].value)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CHECKPOINTS / "rows.jsonl").write_bytes(bytes(5000))
    return folder


def age(path: Path, days: float) -> None:
    """As if it had last been written to so many days ago."""
    then = time.time() - days * 86_400
    for found in (path, *path.rglob("*")):
        os.utime(found, (then, then), follow_symlinks=False)


@pytest.fixture(scope="session")
def finished_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished") / "home"
    make(MINE, home)
    return home


@pytest.fixture
def home(finished_home: Path, tmp_path: Path) -> Path:
    """A home in which everything of MINE is finished and recorded; a test may change it."""
    return shutil.copytree(finished_home, tmp_path / "home")


def paths(survey: Survey) -> set[Path]:
    return {item.path for item in survey.garbage}


def reasons(survey: Survey) -> set[str]:
    return {item.reason for item in survey.garbage}


def folders(found: Experiment, home: Path, *assets: str) -> set[Path]:
    """Where the artifacts of an experiment (of these assets) lie."""
    return {
        home / "artifacts" / asset / partition / fingerprint.value
        for (asset, partition), fingerprint in fingerprints(found).items()
        if not assets or asset in assets
    }


def locks(found: Experiment, home: Path, *assets: str) -> set[Path]:
    return {
        home / "locks" / path.parent.relative_to(home / "artifacts") / f"{path.name}.lock"
        for path in folders(found, home, *assets)
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


def test_what_is_materialized_with_the_present_settings_stays(home: Path) -> None:
    survey = delete_garbage(home, [MINE], older_than=0)
    assert survey.garbage == [] and survey.notes == []
    assert (survey.kept, artifacts(home)) == (len(fingerprints(MINE)), folders(MINE, home))
    assert survey.kept_bytes > 2000 * survey.kept


def test_earlier_settings_go_and_what_they_share_with_the_present_stays(home: Path) -> None:
    make(EARLIER, home, record=False)
    survey = find_garbage(home, [MINE])
    gone = folders(EARLIER, home, *POLICIES)
    assert paths(survey) == gone | locks(EARLIER, home, *POLICIES)
    assert {item.bytes > 2000 for item in survey.garbage if item.path in gone} == {True}
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert reasons(survey) == {f"made for mine on {today}; nothing refers to it", "lock of an artifact that is gone"}

    assert paths(delete_garbage(home, [MINE])) == paths(survey)
    assert artifacts(home) == folders(MINE, home)
    assert set((home / "locks").glob("*/*/*.lock")) == locks(MINE, home)
    assert {item.state for item in status(MINE, home)} == {"complete"}
    assert find_garbage(home, [MINE]).garbage == []


def test_the_present_settings_of_a_named_experiment_stay_though_others_were_materialized_last(home: Path) -> None:
    make(EARLIER, home)
    assert paths(find_garbage(home, [])) == folders(MINE, home, *POLICIES) | locks(MINE, home, *POLICIES)
    assert find_garbage(home, [MINE]).garbage == []


def test_latest_materializations_keep_all_they_were_made_from(home: Path) -> None:
    shutil.copytree(home / "warehouse" / "registry" / "mine" / "tradeoff_report", home / "last")
    shutil.rmtree(home / "warehouse" / "registry" / "mine")
    shutil.copytree(home / "last", home / "warehouse" / "registry" / "mine" / "tradeoff_report")
    assert find_garbage(home, []).garbage == []
    shutil.rmtree(home / "warehouse" / "registry" / "mine")
    assert folders(MINE, home) <= paths(find_garbage(home, []))


def test_a_latest_materialization_that_cannot_be_read_keeps_all_it_may_mean(home: Path) -> None:
    make(EARLIER, home, record=False)
    entry = home / "warehouse" / "registry" / "mine" / "modpo_models" / "0.1.json"
    entry.write_text('{"fingerprint": ')
    survey = find_garbage(home, [MINE])
    assert paths(survey) & folders(EARLIER, home, "modpo_models") == {
        home / "artifacts" / "modpo_models" / "0.9" / fingerprints(EARLIER)["modpo_models", "0.9"].value
    }
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

    survey = find_garbage(home, [MINE, second])
    assert survey.garbage == []
    (note,) = survey.notes
    assert note.startswith("experiment local cannot be read here, so what was made for it is kept, and all that was ")
    assert f"data.source: {source} does not exist" in note

    # One that was never run here has nothing to keep.
    stranger = experiment({**local, "name": "stranger"})
    assert find_garbage(home, [MINE, stranger]) == find_garbage(home, [MINE])
    assert begun in paths(find_garbage(home, [MINE, stranger]))


def test_unfinished_work_of_a_named_experiment_stays_however_old(home: Path) -> None:
    begun = begin(EARLIER, "modpo_models", home, "0.1")
    age(begun, 1000)
    assert find_garbage(home, [MINE, EARLIER], older_than=0).garbage == []


def test_unfinished_work_that_nobody_names_goes_a_week_after_it_was_last_written_to(home: Path) -> None:
    begun = begin(EARLIER, "modpo_models", home, "0.1")
    age(begun, UNFINISHED_DAYS - 0.5)
    young = find_garbage(home, [MINE])
    assert young.garbage == []
    assert young.notes == ["begun, and no experiment names it: 1, kept for 7 days (--older-than)"]
    assert paths(find_garbage(home, [MINE], older_than=6)) == {begun}
    age(begun, UNFINISHED_DAYS + 0.1)
    old = find_garbage(home, [MINE])
    assert paths(old) == {begun}
    assert reasons(old) == {"begun, last written to 7 days ago; no experiment names it"}
    (begun / CHECKPOINTS / "rows.jsonl").touch()
    assert find_garbage(home, [MINE]).garbage == []


def test_older_than_spares_younger_artifacts_too(home: Path) -> None:
    make(EARLIER, home, record=False)
    old = min(folders(EARLIER, home, "modpo_models"))
    age(old, 31)
    survey = find_garbage(home, [MINE], older_than=30)
    assert {path for path in paths(survey) if path.is_dir()} == {old}


def test_a_clock_that_was_ahead_makes_nothing_old(home: Path) -> None:
    begun = begin(EARLIER, "modpo_models", home, "0.1")
    age(begun, -1000)
    assert find_garbage(home, [MINE], older_than=0).garbage == []


def test_leftovers_go_and_what_is_not_ours_stays(home: Path, tmp_path: Path) -> None:
    model = next(iter(folders(MINE, home, "sft_model")))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")

    def leave(path: Path, days: float = 2) -> Path:
        path.mkdir(parents=True)
        (path / "file").write_bytes(bytes(1500))
        age(path, days)
        return path

    damaged = model.with_name(f"{model.name}.damaged-1")
    beside = model.with_name(f"{model.name}.partial")
    shutil.copytree(model, damaged)
    shutil.copytree(model, beside)
    left = {
        damaged: "set aside as damaged",
        beside: "left beside its finished artifact",
        leave(model / CHECKPOINTS): "left in a finished artifact",
        leave(model.with_name(".deleted-1")): "its removal was interrupted",
        leave(home / "warehouse" / ".publish-abc"): "temporary, left by a process that was killed",
    }
    for name in ("warehouse/registry/mine/scores/.0.1.json.host.7", "cache/.digests.json.xyz", "locks/runs/1.lock"):
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
        age(path, 2)
        run = name.startswith("locks/runs")
        left[path] = "left by a run that was killed" if run else "temporary, left by a process that was killed"

    leave(model.parent / "backup")
    leave(home / "artifacts" / "notes" / "of mine")
    leave(home / "warehouse" / ".publish-young", days=0.5)
    leave(home / "dagster" / "mine" / ".publish-dagster")
    (home / "warehouse" / ".gitignore").write_text("*")
    (model.parent / ("c" * 32)).symlink_to(outside)
    (home / "artifacts" / "linked").symlink_to(outside)
    (home / "locks" / "runs" / "2.lock").touch()  # of a run that is about to lock it
    before = contents(tmp_path)

    survey = delete_garbage(home, [MINE])
    assert {item.path: item.reason for item in survey.garbage} == left
    remaining = contents(tmp_path)
    removed = {
        name for name in before if any((tmp_path / name) == path or path in (tmp_path / name).parents for path in left)
    }
    assert before.keys() - remaining.keys() == removed
    assert {name: remaining[name] for name in remaining if name in before} == {
        name: value for name, value in before.items() if name not in removed
    }
    assert (model.parent / ("c" * 32)).is_symlink() and (outside / "precious.txt").read_text() == "mine"


# What is in use


def test_what_a_process_uses_stays_with_all_it_was_made_from(home: Path) -> None:
    shutil.rmtree(home / "warehouse")
    fingerprint = fingerprints(MINE)["scores", "0.1"].value
    others = ("score_summary", "tradeoff", "tradeoff_report", "sft_generations", "sft_scores")
    needed = folders(MINE, home) - folders(MINE, home, *others, "kl_to_sft", "margin_adapter_quality")
    needed = {path for path in needed if path.parent.name != "0.9"}
    with using(home, [("scores", "0.1", fingerprint)]):
        delete_garbage(home, [])
        assert artifacts(home) == needed
        assert (home / "locks" / "scores" / "0.1" / f"{fingerprint}.lock").exists()
    delete_garbage(home, [])
    assert artifacts(home) == set()


def test_what_a_killed_process_used_goes_with_its_own_files(home: Path) -> None:
    shutil.rmtree(home / "warehouse")
    name = ("sft_model", ALL, fingerprints(MINE)["sft_model", ALL].value)

    def work() -> None:
        with using(home, [name]):
            die()

    run_to_its_death(work)
    assert "left by a process that was killed" in reasons(find_garbage(home, []))
    delete_garbage(home, [])
    assert artifacts(home) == set()
    assert list((home / "locks" / "uses").iterdir()) == []


def test_unfinished_work_under_its_lock_stays(home: Path) -> None:
    begun = begin(EARLIER, "modpo_models", home, "0.1")
    age(begun, 100)
    (lock,) = (path for path in locks(EARLIER, home, "modpo_models") if path.parent.name == "0.1")
    with exclusive_lock(lock):
        survey = delete_garbage(home, [MINE])
        assert survey.garbage == [] and survey.notes == ["1 more kept, for another process works on them"]
        assert begun.is_dir() and lock.exists()
    assert paths(delete_garbage(home, [MINE])) == {begun, lock}
    assert not begun.exists() and not lock.exists()


def test_nothing_vanishes_under_a_process_that_registered_before_it_looked(tmp_path: Path) -> None:
    home, fingerprint = tmp_path / "home", fingerprints(MINE)["helpsteer_ratings", ALL]
    name = (fingerprint.asset, fingerprint.partition, fingerprint.value)
    counts = tmp_path / "counts.json"

    def use() -> None:
        built, reused = 0, 0
        store = ArtifactStore(home)
        for _ in range(60):
            with using(home, [name]):
                found = store.get(*name)
                built, reused = built + (found is None), reused + (found is not None)
                path = make_one(MINE, fingerprint, home) if found is None else found.path
                for _ in range(5):
                    assert (path / "result.bin").stat().st_size == 2000
        counts.write_text(json.dumps([built, reused]))

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    removed = 0
    while process.is_alive():
        removed += len([item for item in delete_garbage(home, []).garbage if item.path.name == fingerprint.value])
    process.join()
    assert process.exitcode == 0
    built, reused = json.loads(counts.read_text())
    assert built + reused == 60 and built - removed in (0, 1)


# Interruptions, and homes that are not as usual


def test_a_removal_that_is_killed_half_way_leaves_no_half_artifact_and_is_finished_by_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(EARLIER, home, record=False)

    def cut_short() -> None:
        remove, done = garbage._remove, []

        def remove_one(path: Path) -> None:
            if done:
                (path / MANIFEST).unlink()
                die()
            done.append(path)
            remove(path)

        monkeypatch.setattr(garbage, "_remove", remove_one)
        delete_garbage(home, [MINE])

    run_to_its_death(cut_short)
    hidden = {path for path in artifacts(home) if path.name.startswith(".deleted-")}
    assert len(hidden) == len(folders(EARLIER, home, *POLICIES)) - 1
    assert artifacts(home) - hidden == folders(MINE, home)
    assert {item.state for item in status(EARLIER, home) if item.asset in POLICIES} == {"out of date"}
    assert reasons(delete_garbage(home, [MINE])) >= {"its removal was interrupted"}
    assert artifacts(home) == folders(MINE, home)
    assert find_garbage(home, [MINE]).garbage == []


def test_looking_changes_nothing(home: Path) -> None:
    make(EARLIER, home, record=False)
    run_to_its_death(lambda: using(home, [("a", "b", "c")]).__enter__() or die())
    before = contents(home)
    assert find_garbage(home, [MINE], older_than=0).garbage
    after = contents(home)
    after.pop("cache/digests.json")  # remembers what was read outside the home
    assert after == before


def test_a_read_only_home_can_be_looked_at_and_refuses_in_words_to_be_cleaned(home: Path) -> None:
    make(EARLIER, home, record=False)
    file = write(MINE, home.parent)
    command = ["-c", "from helpsteer_assets.cli import entry; entry()", "-e", str(file), "--home", str(home), "gc"]
    seen = run_read_only(home, *command)
    assert seen.returncode == 0, seen.stderr
    assert "artifacts/modpo_models/0.1" in seen.stdout and "can go: " in seen.stdout
    refused = run_read_only(home, *command, "--delete")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: cannot lock ") and "Read-only file system" in refused.stderr
    assert folders(EARLIER, home) <= artifacts(home)


def test_a_home_that_a_newer_version_wrote_is_refused_whole(home: Path) -> None:
    make(EARLIER, home, record=False)
    path = next(iter(folders(EARLIER, home, "tradeoff"))) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1000}))
    before = artifacts(home)
    with pytest.raises(HelpsteerError, match=rf"{path} was written by a newer helpsteer_assets .*nothing is removed"):
        delete_garbage(home, [MINE])
    assert artifacts(home) == before


def test_artifacts_of_the_first_version_refer_to_their_inputs_too(home: Path) -> None:
    for path in (home / "artifacts").glob(f"*/*/*/{MANIFEST}"):
        manifest = json.loads(path.read_text()) | {"schema_version": 1}
        path.write_text(json.dumps({key: manifest[key] for key in manifest if key not in ("sha256", "environment")}))
    for asset in ("scores", "score_summary", "sft_scores"):
        shutil.rmtree(home / "warehouse" / "registry" / "mine" / asset)
    assert find_garbage(home, []).garbage == []


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0", "[" * 100_000, '{"inputs": 7}', '{"inputs": {"a": [{}]}}'])
def test_a_garbled_manifest_is_no_reason_to_fail(home: Path, content: str) -> None:
    (model,) = folders(MINE, home, "sft_model")
    (model / MANIFEST).write_text(content)
    assert model not in paths(find_garbage(home, [MINE]))
    shutil.rmtree(home / "warehouse")
    assert model in paths(find_garbage(home, []))


def test_a_home_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert delete_garbage(tmp_path / "home", [MINE]) == Survey([], 0, 0, [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(HelpsteerError, match=rf"cannot read {tmp_path / 'home'}.*a file stands where a folder must be"):
        find_garbage(tmp_path / "home", [])


# The command

Gc = Callable[..., Result]


def write(found: Experiment, folder: Path) -> Path:
    path = folder / f"{found.name}.yaml"
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    return path


@pytest.fixture
def gc(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gc:
    monkeypatch.setenv("HELPSTEER_HOME", str(home))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["gc", *arguments])


def test_the_command_lists_then_removes_then_has_nothing_to_do(gc: Gc, home: Path) -> None:
    make(EARLIER, home, record=False)
    listed = gc()
    assert listed.exit_code == 0, listed.output
    model = min(folders(EARLIER, home, "modpo_models"))
    (row,) = (line for line in listed.output.splitlines() if model.name in line)
    assert row.split()[1:3] == ["kB", str(model.relative_to(home))] and "made for mine on" in row
    assert f"{len(locks(EARLIER, home, *POLICIES))} small ones" in listed.output
    assert "gc --delete`, with the same options, removes it" in listed.output
    assert model.exists()

    removed = gc("--delete")
    assert removed.exit_code == 0, removed.output
    assert f"kept: {len(fingerprints(MINE))} finished artifacts, " in removed.output
    assert "removed: " in removed.output and model.name in removed.output
    assert artifacts(home) == folders(MINE, home)
    assert gc("--delete").output.splitlines()[-1] == "nothing to remove"


def test_the_command_keeps_the_experiments_that_are_named(gc: Gc, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(EARLIER, home, record=False)
    other = experiment({**SETTINGS, "name": "other", "objective.beta": 0.3})
    make(other, home, record=False)
    (home.parent / "a").mkdir()
    kept = ["--keep", str(write(other, home.parent)), "--keep", str(write(EARLIER, home.parent / "a"))]
    assert gc(*kept).output.splitlines()[-1] == "nothing to remove"
    assert len(json.loads(gc(*kept[:2], "--json").output)["items"]) == 2 * len(folders(EARLIER, home, *POLICIES))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", kept[3])
    assert gc(*kept[:2]).output.splitlines()[-1] == "nothing to remove"


def test_the_command_gives_json(gc: Gc, home: Path) -> None:
    make(EARLIER, home, record=False)
    found = json.loads(gc("--json").output)
    assert found.keys() == {"home", "deleted", "bytes", "items", "kept", "kept_bytes", "notes"}
    assert found["bytes"] == sum(item["bytes"] for item in found["items"]) > 2000
    assert (found["home"], found["deleted"], found["notes"]) == (str(home), False, [])
    deleted = json.loads(gc("--json", "--delete").output)
    assert deleted == {**found, "deleted": True}


def test_an_experiment_that_cannot_be_loaded_stops_the_command(gc: Gc, home: Path) -> None:
    make(EARLIER, home, record=False)
    failed = gc("--delete", "--keep", "mine.yaml")
    assert failed.exit_code == 2 and "mine.yaml not found" in failed.stderr
    assert folders(EARLIER, home) <= artifacts(home)
    assert gc("--older-than", "-1").exit_code == 2

"""The artifact store: reuse, resume, damage, one writer per artifact."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store import artifacts
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactStore
from helpsteer_assets.store.locks import exclusive_lock

NAME = ("scores", "0.1", "f" * 16)
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def write_results(partial: Path) -> dict[str, Any]:
    (partial / "scores.parquet").write_bytes(b"0123456789" * 100)
    (partial / "adapter").mkdir()
    (partial / "adapter" / "config.json").write_text("{}")
    return {"loss": 0.5}


def must_not_compute(partial: Path) -> dict[str, Any]:
    raise AssertionError("computed again")


def must_not_wait(message: str) -> None:
    raise AssertionError(message)


def make(store: ArtifactStore, compute: Any = write_results) -> tuple[Artifact, bool]:
    manifest = {"settings": {"beta": 0.1}, "inputs": {"sft_model": {ALL: "a" * 16}}, "seed": 7}
    return store.build(*NAME, manifest=manifest, compute=compute, on_wait=must_not_wait)


def test_a_finished_artifact_says_what_made_it_lists_its_files_and_is_reused(store: ArtifactStore) -> None:
    artifact, reused = make(store)

    assert not reused
    assert artifact.path == store.home / "artifacts" / "scores" / "0.1" / NAME[2]
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest == artifact.manifest
    made = {"schema_version": 2, "settings": {"beta": 0.1}, "inputs": {"sft_model": {"all": "a" * 16}}, "seed": 7}
    assert made.items() <= manifest.items()
    assert (manifest["metrics"], manifest["resumed"]) == ({"loss": 0.5}, False)
    assert {"python", "torch", "duckdb", "dagster", "helpsteer_assets"} <= manifest["versions"].keys()
    assert {"created_at", "duration_s", "git_revision", "host", "platform", "environment"} <= manifest.keys()
    assert manifest["files"].keys() == {"scores.parquet", "adapter/config.json"}
    assert manifest["files"]["scores.parquet"]["bytes"] == 1000
    assert artifact.file("adapter/config.json").read_text() == "{}"
    assert make(store, must_not_compute) == (artifact, True)
    assert artifact == store.find(*NAME) == store.get(*NAME)
    assert store.find("scores", "0.1", "0" * 16) is None
    with pytest.raises(HelpsteerError, match=r"has no file 'adapter'; its manifest lists: adapter/config.json, scores"):
        artifact.file("adapter")


def test_an_attempt_that_fails_is_resumed_from_its_checkpoints_and_nothing_else(store: ArtifactStore) -> None:
    def fail(partial: Path) -> dict[str, Any]:
        for name in ("checkpoints", "tmp"):
            (partial / name).mkdir()
            (partial / name / "state").write_text("step 5")
        (partial / "stale.json").write_text("of the first attempt")
        raise RuntimeError("loss is nan")

    with pytest.raises(RuntimeError, match="loss is nan"):
        make(store, fail)
    assert store.find(*NAME) is None
    assert (store.partial(*NAME) / "checkpoints" / "state").read_text() == "step 5"

    def resume(partial: Path) -> dict[str, Any]:
        assert [path.name for path in partial.iterdir()] == ["checkpoints"]
        assert (partial / "checkpoints" / "state").read_text() == "step 5"
        return write_results(partial)

    artifact, reused = make(store, resume)

    assert not reused
    assert artifact.manifest["resumed"] is True
    assert "stale.json" not in artifact.manifest["files"]
    assert sorted(path.name for path in artifact.path.iterdir()) == ["adapter", "manifest.json", "scores.parquet"]
    assert not store.partial(*NAME).exists()


def truncate(artifact: Artifact) -> None:
    os.truncate(artifact.file("scores.parquet"), 999)


def flip_a_byte(artifact: Artifact) -> None:
    content = bytearray(artifact.file("scores.parquet").read_bytes())
    content[500] ^= 1
    artifact.file("scores.parquet").write_bytes(content)


def delete_a_file(artifact: Artifact) -> None:
    artifact.file("adapter/config.json").unlink()


def cut_the_manifest(artifact: Artifact) -> None:
    os.truncate(artifact.path / "manifest.json", 50)


def change_a_number(artifact: Artifact) -> None:
    file = artifact.path / "manifest.json"
    file.write_text(file.read_text().replace('"loss": 0.5', '"loss": 0.4'))


def copy_the_manifest_of_another(artifact: Artifact) -> None:
    manifest = {**artifact.manifest, "fingerprint": "e" * 16}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "scores.parquet has 999 bytes instead of 1000"),
        (flip_a_byte, "scores.parquet has sha256"),
        (delete_a_file, "adapter/config.json is missing"),
        (cut_the_manifest, "manifest.json is unreadable"),
        (change_a_number, "manifest.json does not match its own digest"),
        (copy_the_manifest_of_another, "manifest.json is that of another artifact (scores/0.1/eeeeeeeeeeeeeeee)"),
    ],
)
def test_a_damaged_artifact_is_set_aside_with_the_reason_and_made_again(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture, damage: Any, reason: str
) -> None:
    artifact, _ = make(store)
    damage(artifact)

    assert store.get(*NAME) is None

    assert reason in caplog.text
    assert str(artifact.path) in caplog.text
    assert [path.name for path in artifact.path.parent.iterdir()] == [f"{NAME[2]}.damaged-1"]
    again, reused = make(store)
    assert not reused and store.verify(again) == []
    damage(again)
    assert not make(store)[1]
    assert {path.suffix for path in artifact.path.parent.iterdir()} == {"", ".damaged-1", ".damaged-2"}


def test_a_manifest_of_a_newer_version_is_refused_and_left_alone(store: ArtifactStore) -> None:
    artifact, _ = make(store)
    (artifact.path / "manifest.json").write_text(json.dumps({**artifact.manifest, "schema_version": 3}))

    for use in (lambda: store.find(*NAME), lambda: store.get(*NAME), lambda: make(store)):
        with pytest.raises(HelpsteerError, match=r"manifest.json was written by a newer .*schema_version 3.*upgrade"):
            use()
    assert artifact.path.exists()


def test_a_result_that_is_not_finite_is_named(store: ArtifactStore) -> None:
    def compute(folder: Path) -> dict[str, Any]:
        return {"history": [{"loss": 0.5}, {"loss": float("nan")}]}

    with pytest.raises(HelpsteerError, match=r"scores 0.1: history.1.loss is nan"):
        make(store, compute)
    assert store.get(*NAME) is None


@pytest.mark.parametrize("last_step", ["_remove", "sync"])
def test_a_process_stopped_while_finishing_leaves_work_that_is_only_renamed(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, last_step: str
) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        (partial / "checkpoints").mkdir()
        # From here on the manifest is written, and then the step at which the process stops is reached.
        monkeypatch.setattr(artifacts, last_step, stop)
        return write_results(partial)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(store, compute)
    assert store.find(*NAME) is None
    monkeypatch.undo()

    artifact, reused = make(store, must_not_compute)

    assert reused
    assert store.verify(artifact) == []
    assert not (artifact.path / "checkpoints").exists()


# In other processes.


def compute_slowly(home: Path, computing: Any, proceed: Any, messages: Any, results: Any) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        (partial / "checkpoints").mkdir(exist_ok=True)
        (partial / "checkpoints" / str(os.getpid())).touch()
        computing.set()
        assert proceed.wait(60)
        return write_results(partial)

    artifact, reused = ArtifactStore(home).build(*NAME, manifest={}, compute=compute, on_wait=messages.put)
    results.put((os.getpid(), reused, artifact.manifest["files"]["scores.parquet"]["sha256"]))


def test_a_killed_process_frees_its_artifact_and_a_waiting_one_takes_it_up(store: ArtifactStore) -> None:
    messages, results = SPAWN.Queue(), SPAWN.Queue()
    # An event that a killed process waits for cannot be used any more: each has its own.
    events = [(SPAWN.Event(), SPAWN.Event()) for _ in range(2)]
    killed, waiting = (
        SPAWN.Process(target=compute_slowly, args=(store.home, *pair, messages, results)) for pair in events
    )
    killed.start()
    assert events[0][0].wait(60)
    waiting.start()
    messages.get(timeout=60)

    os.kill(killed.pid, signal.SIGKILL)

    assert events[1][0].wait(60)
    kept = {path.name for path in (store.partial(*NAME) / "checkpoints").iterdir()}
    assert kept == {str(killed.pid), str(waiting.pid)}
    events[1][1].set()
    assert results.get(timeout=60)[:2] == (waiting.pid, False)
    waiting.join(60)
    killed.join(60)
    artifact = store.get(*NAME)
    assert artifact is not None
    assert artifact.manifest["resumed"] is True


def test_a_writer_that_lost_its_lock_does_not_finish_the_artifact(store: ArtifactStore) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        (partial / "checkpoints").mkdir()
        (partial / "checkpoints" / "step-1").write_text("kept")
        shutil.rmtree(store.locks)
        return write_results(partial)

    with pytest.raises(HelpsteerError, match=r"was removed or replaced while this process held that lock"):
        make(store, compute)
    assert store.find(*NAME) is None
    assert (store.partial(*NAME) / "checkpoints" / "step-1").read_text() == "kept"
    artifact, _ = make(store)
    assert artifact.manifest["resumed"] is True


def test_a_reader_that_meets_damage_while_it_is_being_repaired_leaves_it_alone(store: ArtifactStore) -> None:
    artifact, _ = make(store)
    truncate(artifact)
    with exclusive_lock(store.locks / NAME[0] / NAME[1] / f"{NAME[2]}.lock"):
        assert store.get(*NAME) is None
    assert artifact.path.exists()

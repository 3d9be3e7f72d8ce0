"""The artifact store: reuse, resume, damage, one writer per artifact."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files import digests
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


def make(
    store: ArtifactStore, compute: Any = write_results, name: tuple[str, str, str] = NAME
) -> tuple[Artifact, bool]:
    manifest = {"settings": {"beta": 0.1}, "inputs": {"sft_model": {ALL: "a" * 16}}, "seed": 7}
    return store.build(*name, manifest=manifest, compute=compute, on_wait=must_not_wait)


def test_a_finished_artifact_says_what_made_it_and_lists_its_files(store: ArtifactStore) -> None:
    artifact, reused = make(store)

    assert not reused
    assert artifact.path == store.home / "artifacts" / "scores" / "0.1" / NAME[2]
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest == artifact.manifest
    assert manifest["schema_version"] == 2
    assert manifest["settings"] == {"beta": 0.1}
    assert manifest["inputs"] == {"sft_model": {"all": "a" * 16}}
    assert (manifest["seed"], manifest["metrics"], manifest["resumed"]) == (7, {"loss": 0.5}, False)
    assert {"python", "torch", "duckdb", "dagster", "helpsteer_assets"} <= manifest["versions"].keys()
    assert {"created_at", "duration_s", "git_revision", "host", "platform", "environment"} <= manifest.keys()
    assert manifest["files"].keys() == {"scores.parquet", "adapter/config.json"}
    assert manifest["files"]["scores.parquet"]["bytes"] == 1000
    assert artifact.file("adapter/config.json").read_text() == "{}"
    with pytest.raises(HelpsteerError, match=r"has no file 'adapter'; its manifest lists: adapter/config.json, scores"):
        artifact.file("adapter")


def test_a_finished_artifact_is_found_and_reused_by_its_fingerprint_alone(store: ArtifactStore) -> None:
    assert store.find(*NAME) is None
    assert store.get(*NAME) is None
    made, _ = make(store)

    found, reused = make(store, must_not_compute)

    assert reused
    assert found == made == store.find(*NAME) == store.get(*NAME)
    assert store.verify(found) == []
    assert store.find("scores", "0.1", "0" * 16) is None
    assert store.find("scores", "0.2", NAME[2]) is None


def test_checkpoints_and_scratch_are_no_part_of_the_artifact(store: ArtifactStore) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        for folder in ("checkpoints/checkpoint-5", "tmp"):
            (partial / folder).mkdir(parents=True)
            (partial / folder / "state").write_text("...")
        return write_results(partial)

    artifact, _ = make(store, compute)

    assert sorted(path.name for path in artifact.path.iterdir()) == ["adapter", "manifest.json", "scores.parquet"]
    assert not store.partial(*NAME).exists()


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


def truncate(artifact: Artifact) -> None:
    os.truncate(artifact.file("scores.parquet"), 999)


def flip_a_byte(artifact: Artifact) -> None:
    content = bytearray(artifact.file("scores.parquet").read_bytes())
    content[500] ^= 1
    artifact.file("scores.parquet").write_bytes(content)


def delete_a_file(artifact: Artifact) -> None:
    artifact.file("adapter/config.json").unlink()


def replace_a_folder_by_a_file(artifact: Artifact) -> None:
    delete_a_file(artifact)
    (artifact.path / "adapter").rmdir()
    (artifact.path / "adapter").write_text("")


def cut_the_manifest(artifact: Artifact) -> None:
    os.truncate(artifact.path / "manifest.json", 50)


def delete_the_manifest(artifact: Artifact) -> None:
    (artifact.path / "manifest.json").unlink()


def list_a_file_without_its_digest(artifact: Artifact) -> None:
    manifest = {**artifact.manifest, "files": {"scores.parquet": {"bytes": 1000}}}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


def copy_the_manifest_of_another(artifact: Artifact) -> None:
    manifest = {**artifact.manifest, "fingerprint": "e" * 16}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "scores.parquet has 999 bytes instead of 1000"),
        (flip_a_byte, "scores.parquet has sha256"),
        (delete_a_file, "adapter/config.json is missing"),
        (replace_a_folder_by_a_file, "adapter/config.json is missing"),
        (cut_the_manifest, "manifest.json is unreadable"),
        (delete_the_manifest, "manifest.json is missing"),
        (list_a_file_without_its_digest, "manifest.json is unreadable (KeyError: 'sha256')"),
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
    assert not reused
    assert store.verify(again) == []
    damage(again)
    _, reused = make(store)
    assert not reused
    assert {path.name for path in artifact.path.parent.iterdir()} == {
        NAME[2],
        f"{NAME[2]}.damaged-1",
        f"{NAME[2]}.damaged-2",
    }


def test_a_file_that_no_manifest_lists_is_no_damage(store: ArtifactStore) -> None:
    artifact, _ = make(store)
    (artifact.path / "notes.txt").write_text("the good one")

    assert store.verify(artifact) == []
    assert make(store, must_not_compute)[1]


def test_an_unchanged_file_is_hashed_once_per_process(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 100_000_000)
    artifact, _ = make(store)
    time.sleep(0.15)
    assert store.verify(artifact) == []
    hashed: list[str] = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: (hashed.append(file.name), file_digest(file, name))[1]
    )

    assert store.verify(artifact) == []
    assert hashed == []

    flip_a_byte(artifact)
    assert len(store.verify(artifact)) == 1
    assert hashed == [str(artifact.file("scores.parquet"))]


def test_a_manifest_of_a_newer_version_is_refused_and_left_alone(store: ArtifactStore) -> None:
    artifact, _ = make(store)
    (artifact.path / "manifest.json").write_text(json.dumps({**artifact.manifest, "schema_version": 3}))

    for use in (lambda: store.find(*NAME), lambda: store.get(*NAME), lambda: make(store)):
        with pytest.raises(HelpsteerError, match=r"manifest.json was written by a newer .*schema_version 3.*upgrade"):
            use()
    assert artifact.path.exists()


def test_a_manifest_of_the_version_before_is_read(store: ArtifactStore) -> None:
    artifact, _ = make(store)
    earlier = {k: v for k, v in artifact.manifest.items() if k not in ("sha256", "environment")} | {"schema_version": 1}
    (artifact.path / "manifest.json").write_text(json.dumps(earlier))

    found = store.get(*NAME)

    assert found is not None and found.manifest == earlier
    assert make(store, must_not_compute)[1]


def test_a_manifest_in_which_one_number_changed_is_damaged(store: ArtifactStore, caplog: Any) -> None:
    artifact, _ = make(store)
    file = artifact.path / "manifest.json"
    file.write_text(file.read_text().replace('"loss": 0.5', '"loss": 0.4'))

    assert store.find(*NAME) is None
    assert make(store)[1] is False
    assert "manifest.json does not match its own digest" in caplog.text


def test_a_manifest_tells_what_could_change_the_last_bits(store: ArtifactStore) -> None:
    import torch

    artifact, _ = make(store)
    environment = artifact.manifest["environment"]
    assert environment["threads"] == torch.get_num_threads()
    assert environment["device"] == "cpu" and environment["processor"] and environment["instructions"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_named(store: ArtifactStore, value: float) -> None:
    def compute(folder: Path) -> dict[str, Any]:
        return {"history": [{"loss": 0.5}, {"loss": value}]}

    with pytest.raises(HelpsteerError, match=rf"scores 0.1: history.1.loss is {value}"):
        make(store, compute)
    assert store.get(*NAME) is None


@pytest.mark.parametrize("bad", ["", "..", ".", "a/b", "/", "a\\b", ".hidden", "nul\0"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_names_that_leave_their_folder_are_refused(store: ArtifactStore, bad: str, position: int) -> None:
    name = list(NAME)
    name[position] = bad
    with pytest.raises(HelpsteerError, match=("asset", "partition", "fingerprint")[position]):
        store.partial(*name)
    with pytest.raises(HelpsteerError, match="cannot be a folder's name"):
        make(store, must_not_compute, tuple(name))


def test_a_manifest_that_cannot_be_written_costs_no_computation(store: ArtifactStore) -> None:
    for settings in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            store.build(*NAME, manifest={"settings": settings}, compute=must_not_compute, on_wait=must_not_wait)


def test_a_full_disk_is_an_error_that_names_the_folder(store: ArtifactStore) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HelpsteerError, match=r"cannot write .*\.partial: No space left on device; free some") as caught:
        make(store, compute)
    assert isinstance(caught.value.__cause__, OSError)


def tell_in_its_own_words(partial: Path) -> dict[str, Any]:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def write_where_it_may_not(partial: Path) -> dict[str, Any]:
    raise PermissionError(errno.EACCES, "Permission denied", str(partial / "checkpoints" / "optimizer.pt"))


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (tell_in_its_own_words, r"cannot write .*\.partial: No space left on device; free some"),
        (write_where_it_may_not, r"cannot write .*optimizer\.pt: Permission denied; make it accessible"),
    ],
)
def test_so_is_what_a_library_makes_of_it(store: ArtifactStore, compute: Any, said: str) -> None:
    with pytest.raises(HelpsteerError, match=said):
        make(store, compute)


def test_a_file_elsewhere_that_cannot_be_read_is_not_the_home_s_fault(store: ArtifactStore, tmp_path: Path) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "ratings.jsonl"))

    with pytest.raises(PermissionError):
        make(store, compute)


def test_another_error_of_the_computation_is_not_renamed(store: ArtifactStore) -> None:
    def compute(partial: Path) -> dict[str, Any]:
        return {"loss": len((partial / "absent").read_text())}

    with pytest.raises(FileNotFoundError):
        make(store, compute)


def test_a_home_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(HelpsteerError, match=rf"cannot lock {tmp_path}/home.*HELPSTEER_HOME") as caught:
        make(ArtifactStore(tmp_path / "home"))
    assert isinstance(caught.value.__cause__, OSError)


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


def test_a_complete_partial_artifact_that_is_damaged_is_made_anew(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, _ = make(store)
    truncate(artifact)
    (artifact.path / "checkpoints").mkdir()
    (artifact.path / "checkpoints" / "half").touch()
    artifact.path.rename(store.partial(*NAME))

    again, reused = make(store)

    assert not reused
    assert again.manifest["resumed"] is False
    assert "scores.parquet has 999 bytes" in caplog.text


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


def test_of_two_processes_one_computes_and_the_other_waits_and_reuses(store: ArtifactStore) -> None:
    computing, proceed, messages, results = SPAWN.Event(), SPAWN.Event(), SPAWN.Queue(), SPAWN.Queue()
    arguments = (store.home, computing, proceed, messages, results)
    first = SPAWN.Process(target=compute_slowly, args=arguments)
    second = SPAWN.Process(target=compute_slowly, args=arguments)
    first.start()
    assert computing.wait(60)
    second.start()
    message = messages.get(timeout=60)
    assert message.startswith(f"waiting for process {first.pid} on ")
    assert message.endswith(f"which is making scores 0.1 ({NAME[2]})")
    assert second.is_alive()
    assert store.find(*NAME) is None
    proceed.set()
    done = {process: (reused, digest) for process, reused, digest in (results.get(timeout=60) for _ in range(2))}
    first.join(60)
    second.join(60)

    assert done[first.pid][0] is False
    assert done[second.pid][0] is True
    assert done[first.pid][1] == done[second.pid][1]
    assert messages.empty()


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

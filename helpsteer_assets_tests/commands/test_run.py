"""What `helpsteer run` says before it starts and when it fails, and what it refuses to begin."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import Status
from helpsteer_assets.commands.run import plan_lines
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.rows import ResumableRows
from helpsteer_assets.modpo.training.checkpoints import checkpoint_folder, mark_complete
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, ArtifactStore
from helpsteer_assets_tests.finished import Finished


def plan(run: Finished) -> str:
    """What was announced before the first asset was looked at."""
    lines = run.announced[1:]
    end = next((n for n, line in enumerate(lines) if line.startswith(("helpsteer_ratings:", "modpo_models"))), None)
    return "\n".join(lines[:end])


def item(asset: str, state: str, detail: str = "", partition: str = ALL) -> Status:
    return Status(asset, partition, state, detail, "f", None)


def test_the_plan_groups_assets_and_their_weights() -> None:
    lines = list(
        plan_lines(
            [
                *(item(name, "complete") for name in ("helpsteer_ratings", "preference_pairs", "margin_pairs")),
                item("sft_model", "reusable"),
                item("modpo_models", "partial", "step 40 of 200", "0.2"),
                item("modpo_models", "missing", partition="0.5"),
                item("modpo_models", "missing", partition="0.8"),
                item("scores", "missing", partition="0.5"),
                item("tradeoff", "missing"),
            ]
        )
    )
    assert lines == [
        "to reuse:   4 (helpsteer_ratings, preference_pairs, margin_pairs, ...)",
        "to resume:  modpo_models w=0.2 (step 40 of 200)",
        "to compute: modpo_models w=0.5, 0.8; scores w=0.5; tradeoff",
    ]


def test_a_changed_setting_is_told_once_and_a_lost_artifact_of_each_asset() -> None:
    changed, lost = "objective.beta 0.1 -> 0.3", "its artifact is gone from the disk, or damaged"
    lines = list(
        plan_lines(
            [
                item("sft_model", "out of date", lost),
                item("modpo_models", "out of date", f"{changed}; sft_model: {lost}", "0.5"),
                item("modpo_models", "out of date", changed, "0.8"),
                item("generations", "out of date", lost, "0.5"),
                item("scores", "out of date", f"modpo_models: {changed}", "0.5"),
                item("score_summary", "out of date", f"{changed}, seed 0 -> 1"),
            ]
        )
    )
    assert lines[1:] == [
        f"changed:    sft_model: {lost}",
        f"changed:    modpo_models: {changed}",
        f"changed:    generations: {lost}",
        f"changed:    score_summary: {changed}, seed 0 -> 1",
    ]


def test_a_first_run_says_what_it_computes_and_the_disk_it_needs(finished_home: Finished) -> None:
    said = " ".join(plan(finished_home).split())
    assert said.startswith("to compute: helpsteer_ratings; preference_pairs; ")
    assert "modpo_models w=0.1, 0.9" in said and "to reuse" not in said
    assert "disk: about " in said and "3 adapters" in said and " free in " in said


REUSE = """
import json, sys
from pathlib import Path
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.store.home import Home

said = []
assert run_experiment(load_experiment(sys.argv[1]), Home(sys.argv[2]), announce=said.append)
loaded = [name for name in ("torch", "transformers", "peft", "trl", "datasets") if name in sys.modules]
print(json.dumps([said, loaded]))
"""


def test_a_second_run_only_reuses_asks_for_no_disk_and_loads_no_model_library(copied: Callable[..., Finished]) -> None:
    again = copied()
    done = subprocess.run(
        [sys.executable, "-c", REUSE, str(again.file), str(again.home)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again.announced, loaded = json.loads(done.stdout)
    assert plan(again) == "to reuse:   22 (helpsteer_ratings, preference_pairs, margin_pairs, ...)"
    assert loaded == []


def test_a_changed_setting_is_named_and_what_was_begun_is_resumed(copied: Callable[..., Finished]) -> None:
    changed = copied(objective={"weights": [0.1, 0.9], "beta": 0.3})
    fingerprint = fingerprints(changed.experiment)["modpo_models", "0.1"].value
    partial = ArtifactStore(changed.home).partial("modpo_models", "0.1", fingerprint)
    checkpoint = checkpoint_folder(partial / CHECKPOINTS, 4)
    checkpoint.mkdir(parents=True)
    mark_complete(checkpoint, 4, 6)
    assert changed.run(select='key:"helpsteer_ratings" or key:"modpo_models"', weights=["0.9"])
    assert plan(changed).split("\ndisk:")[0] == (
        "to reuse:   1 (helpsteer_ratings)\n"
        "to compute: modpo_models w=0.9\n"
        "changed:    modpo_models: objective.beta 0.2 -> 0.3"
    )
    with pytest.MonkeyPatch.context() as patch:
        full(patch)
        changed.announced.clear()
        with pytest.raises(HelpsteerError):
            changed.run()
        assert "\nto resume:  modpo_models w=0.1 (step 4 of 6)\n" in "\n".join(changed.announced)
        assert "score_summary; tradeoff" in " ".join(plan(changed).split())
        changed.announced.clear()
        with pytest.raises(HelpsteerError):
            changed.run(weights=["0.9"])
        assert "scores w=0.9" in plan(changed) and "score_summary" not in plan(changed), "it would lack a weight"


def full(patch: pytest.MonkeyPatch) -> None:
    """A disk with hardly any room."""
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5000))


def test_a_disk_without_room_stops_a_run_before_anything_is_computed(
    copied: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch)
    new = Finished(copied().experiment, tmp_path / "new")
    with pytest.raises(HelpsteerError, match=r"MB will be written and .* has 5 kB free; .*HELPSTEER_HOME"):
        new.run()
    assert not (new.home / "artifacts").exists()


def test_a_model_that_cannot_be_used_stops_a_run_before_anything_is_computed(
    copied: Callable[..., Finished], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(local_path("model.base", "embedded"), base)
    (base / "adapter_config.json").write_text("{}")
    changed = copied(model={"base": str(base)})
    before = {path for path in changed.home.rglob("*") if "cache" not in path.parts}
    with pytest.raises(HelpsteerError, match="holds an adapter"):
        changed.run()
    with pytest.raises(HelpsteerError, match=r"generation.max_prompt_length \+ max_new_tokens ask\(s\) for 564 tokens"):
        copied(modpo={"steps": 7}, generation={"max_new_tokens": 500}).run()
    assert {path for path in changed.home.rglob("*") if "cache" not in path.parts} == before
    assert changed.run(select='key:"helpsteer_ratings"'), "data needs no model"


def test_a_run_that_fails_says_what_failed_what_is_kept_and_how_to_go_on(copied: Callable[..., Finished]) -> None:
    broken = copied(modpo={"learning_rate": 1e30})
    assert not broken.run(weights=["0.9"])
    last = " ".join(broken.announced[-1].split())
    assert last == (
        "failed: modpo_models w=0.9. 11 of 15 assets and weights are finished and kept. When the cause is mended, run "
        "the same command again: it reuses them, and a training goes on from its last checkpoint."
    )
    assert any("training w=0.9: " in line and "lower learning_rate" in line for line in broken.announced)


def test_a_stage_that_is_tried_once_more_says_why(
    copied: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = copied(generation={"max_new_tokens": 5})
    append, failures = ResumableRows.append, iter([MemoryError("of the device")])

    def appending(self: ResumableRows, rows: list[dict[str, object]]) -> None:
        append(self, rows)
        for failure in failures:
            raise failure

    monkeypatch.setattr(ResumableRows, "append", appending)
    assert changed.run(select='key:"sft_generations"'), changed.announced
    said = "\n".join(changed.announced)
    assert "sft_generations: failed by MemoryError: of the device; it is tried once more, from where it was" in said
    assert "sft_generations: computing, going on from " in said


INTERRUPTED = """
import os, signal, sys, time
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.store.home import Home
from helpsteer_assets.commands import run as running
from helpsteer_assets.experiment.reading import load_experiment

def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

Lab._compute = interrupted
running.cancel_runs = lambda *_: time.sleep(3)  # what a busy machine makes of it: the main thread goes on meanwhile
say = lambda line: print(line, flush=True)
running.run_experiment(load_experiment("demo"), Home(sys.argv[1]), select='key:"helpsteer_ratings"', announce=say)
"""


def test_after_an_interrupt_nothing_is_said_of_the_stage_that_it_broke(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted; what is finished is kept" in done.stdout
    assert "failed" not in done.stdout and 'File "' not in done.stdout + done.stderr

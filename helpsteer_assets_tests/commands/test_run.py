"""What `helpsteer run` says before it starts and when it fails, and what it refuses to begin."""

import json
import os
import shutil
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

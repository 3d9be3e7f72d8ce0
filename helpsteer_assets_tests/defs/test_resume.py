"""A run that is killed goes on, and ends where an undisturbed one ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets_tests.finished import Finished, write_experiment

ROOT = Path(__file__).parents[2]


def test_a_run_killed_in_a_training_resumes_to_the_identical_adapter(quick: Finished, tmp_path: Path) -> None:
    # More steps than the undisturbed run's other tests need, so that there is a middle to kill it in.
    training = {"steps": 24, "evaluate_every": 8}
    path = write_experiment(tmp_path, modpo=training, objective={"weights": [0.1]})
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    fingerprint = _fingerprint(path)
    _copy_upstream(quick.home, killed)
    _copy_upstream(quick.home, undisturbed)

    process = subprocess.Popen(_command(path, killed), env=_environment(), stdout=subprocess.DEVNULL)
    partial = killed / "artifacts" / "modpo_models" / "0.1" / f"{fingerprint}.partial"
    deadline = time.monotonic() + 300
    while not list(partial.glob("checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, "ended before a checkpoint was there"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = {(s.asset, s.partition): s for s in status(load_experiment(str(path)), killed)}
    assert states["modpo_models", "0.1"].state == "partial"
    assert states["modpo_models", "0.1"].detail.startswith("step ") and "of 24" in states["modpo_models", "0.1"].detail

    for home in (killed, undisturbed):
        subprocess.run(_command(path, home), env=_environment(), check=True, stdout=subprocess.DEVNULL, timeout=400)
    resumed = ArtifactStore(killed).get("modpo_models", "0.1", fingerprint)
    straight = ArtifactStore(undisturbed).get("modpo_models", "0.1", fingerprint)
    assert resumed is not None and straight is not None
    assert resumed.manifest["metrics"]["resumed_from"] is not None
    assert straight.manifest["metrics"]["resumed_from"] is None
    weights = "adapter/adapter_model.safetensors"
    assert resumed.file(weights).read_bytes() == straight.file(weights).read_bytes()
    with dg.DagsterInstance.from_config(str(dagster_home(killed, "quick"))) as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert statuses == [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE], "the killed run was not ended"
    assert resumed.manifest["metrics"]["best_step"] == straight.manifest["metrics"]["best_step"]


def _copy_upstream(source: Path, home: Path) -> None:
    shutil.copytree(source / "artifacts", home / "artifacts", ignore=shutil.ignore_patterns("modpo_models"))


def _fingerprint(path: Path) -> str:
    return fingerprints(load_experiment(str(path)))["modpo_models", "0.1"].value


def _command(path: Path, home: Path) -> list[str]:
    code = "from helpsteer_assets.cli import entry; entry()"
    select = 'key:"modpo_models"'
    return [sys.executable, "-c", code, "-e", str(path), "--home", str(home), "run", "--select", select]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}

"""A run that is killed goes on, and ends where an undisturbed one ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from helpsteer_assets.assets.status import Status, status
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.artifacts import Artifact, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import Finished, write_experiment

ROOT = Path(__file__).parents[2]


def start(experiment: Path, home: Path) -> subprocess.Popen[bytes]:
    """`helpsteer run` on one policy."""
    code = "from helpsteer_assets.cli import entry; entry()"
    arguments = ["-e", str(experiment), "--home", str(home), "run", "--select", 'key:"modpo_models"']
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.DEVNULL)


def policy(experiment: Path, home: Path) -> tuple[Status, Artifact | None]:
    (item,) = status(load_experiment(str(experiment)), Home(home), {"modpo_models"})
    return item, ArtifactStore(home).get(item.asset, item.partition, item.fingerprint)


def test_a_run_killed_in_a_training_resumes_to_the_identical_adapter(finished_home: Finished, tmp_path: Path) -> None:
    # More steps than in the finished home, so that there is a middle to kill it in.
    experiment = write_experiment(tmp_path, modpo={"steps": 24, "evaluate_every": 8}, objective={"weights": [0.1]})
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for home in (killed, undisturbed):
        ignored = shutil.ignore_patterns("modpo_models")
        shutil.copytree(finished_home.home / "artifacts", home / "artifacts", ignore=ignored)

    process = start(experiment, killed)
    deadline = time.monotonic() + 300
    while not list(killed.glob("artifacts/modpo_models/0.1/*.partial/checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, "ended before a checkpoint was there"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun, _ = policy(experiment, killed)
    assert begun.state == "partial" and begun.detail.startswith("step ") and "of 24" in begun.detail

    assert start(experiment, killed).wait(400) == start(experiment, undisturbed).wait(400) == 0
    (_, resumed), (_, straight) = policy(experiment, killed), policy(experiment, undisturbed)
    assert resumed is not None and straight is not None
    assert resumed.manifest["metrics"]["resumed_from"] is not None
    assert straight.manifest["metrics"]["resumed_from"] is None
    assert resumed.manifest["metrics"]["best_step"] == straight.manifest["metrics"]["best_step"]
    weights = "adapter/adapter_model.safetensors"
    assert resumed.file(weights).read_bytes() == straight.file(weights).read_bytes()
    with dg.DagsterInstance.from_config(str(dagster_home(Home(killed), "quick"))) as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert statuses == [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE], "the killed run was not ended"

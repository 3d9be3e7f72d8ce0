"""Runs that the UI launched: their steps, their run worker, the daemon and the UI itself die, or are told to end.

Each trial starts `helpsteer ui`, launches one weight through GraphQL as the UI's button does, and harms it in the
middle of the training.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpsteer_assets.execution.recovery import PROCESS_TAG
from helpsteer_assets.modpo.training.checkpoints import step_of
from helpsteer_assets_tests.faults.campaign import Trial, fault, instance_of

ROOT = Path(__file__).parents[2]
WEIGHT = "0.1"
ASSET = "modpo_models"


class Ui:
    """A running `helpsteer ui`."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}/graphql"
        code = "from helpsteer_assets.cli import entry; entry()"
        self.log = trial.folder / "ui.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *trial.arguments("ui", "--port", str(port))],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        trial.cleanup.callback(self.kill)
        trial.wait(self._is_ready, "the UI to start")

    def launch(self) -> str:
        """Materialize the weight by the job `tradeoff_grid`; the run's id."""
        launched = self._ask(
            """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
                 __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
            {
                "p": {
                    "selector": {
                        "repositoryLocationName": "helpsteer_assets.definitions",
                        "repositoryName": "__repository__",
                        "jobName": "tradeoff_grid",
                    },
                    "mode": "default",
                    "executionMetadata": {"tags": [{"key": "dagster/partition", "value": WEIGHT}]},
                }
            },
        )["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run_id: str = launched["run"]["runId"]
        return run_id

    def backfill(self) -> str:
        """Materialize the weight by a backfill, which the daemon launches; the backfill's id."""
        launched = self._ask(
            """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {
                 __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
            {"p": {"partitionNames": [WEIGHT], "assetSelection": [{"path": [ASSET]}]}},
        )["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        backfill_id: str = launched["backfillId"]
        return backfill_id

    def wait_for_backfill(self, backfill_id: str) -> None:
        """Wait until a backfill has ended, and well."""
        query = (
            "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"
        )

        def status() -> str:
            found: str = self._ask(query, {"id": backfill_id})["partitionBackfillOrError"]["status"]
            return found

        self._trial.wait(lambda: status() not in ("REQUESTED", "CANCELING"), "the backfill to end")
        assert status() == "COMPLETED_SUCCESS", f"the backfill is {status()}"

    def terminate(self, run_id: str) -> None:
        """What the UI's button does."""
        query = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
        assert self._ask(query, {"id": run_id})["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def status(self, run_id: str) -> str:
        query = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        status: str = self._ask(query, {"id": run_id})["runOrError"]["status"]
        return status

    def wait(self, run_id: str, status: str) -> None:
        """Wait until a run has a status."""
        self._trial.wait(
            lambda: self.status(run_id) in (status, "SUCCESS", "FAILURE", "CANCELED"), f"run to be {status}"
        )
        assert self.status(run_id) == status, f"the run is {self.status(run_id)}"

    def close(self) -> None:
        """End it as Ctrl-C does."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.kill()

    def kill(self) -> None:
        """Everything at once, as a machine dies."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
            return bool(self._ask(query, {})["repositoriesOrError"].get("nodes"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            answered: dict[str, Any] = json.load(answer)
        assert "errors" not in answered, answered
        data: dict[str, Any] = answered["data"]
        return data


def descendants(pid: int) -> list[int]:
    """All processes below one, wherever they moved their session."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


class Training:
    """A run that the UI launched, stopped in the middle of its training."""

    def __init__(self, trial: Trial) -> None:
        trial.begin_with(ASSET)
        self.ui = Ui(trial)
        self.run = self.ui.launch()
        self._trial, self._partial = trial, trial.partial(ASSET, WEIGHT)
        wanted = trial.random.choice((2, 4))
        finished = trial.artifact(ASSET, WEIGHT)
        trial.wait(lambda: self._step() >= wanted or finished.exists(), "a checkpoint")
        assert not finished.exists(), "the training ended before it could be stopped"
        self.step = _holder(trial.home / "locks" / ASSET / WEIGHT / f"{self._partial.stem}.lock")
        os.kill(self.step, signal.SIGSTOP)
        with instance_of(trial.home, trial.undisturbed.experiment.name) as instance:
            run = instance.get_run_by_id(self.run)
        assert run is not None
        self.worker = _holder(trial.home / "locks" / "running" / f"{run.tags[PROCESS_TAG]}.lock")
        trial.note = f"at the checkpoint of step {self._step()}"

    def go_on(self) -> None:
        """Let the step go on for a moment, at most to its end."""
        os.kill(self.step, signal.SIGCONT)
        time.sleep(self._trial.random.uniform(0, 0.3))

    def resumed_from(self) -> int | None:
        """The step of the checkpoint that the finished training went on from."""
        manifest = json.loads((self._trial.artifact(ASSET, WEIGHT) / "manifest.json").read_text(encoding="utf-8"))
        resumed: int | None = manifest["metrics"]["resumed_from"]
        return resumed

    def _step(self) -> int:
        """Of the newest complete checkpoint."""
        complete = self._partial.glob("checkpoints/checkpoint-*/complete.json")
        return max((step_of(path.parent) for path in complete), default=0)


def _holder(lock: Path) -> int:
    """The process that holds a lock."""
    return int(json.loads(lock.read_text(encoding="utf-8"))["process"])


def _kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@fault("UI: the step is killed")
def step_killed(trial: Trial) -> None:
    """Its run tries it again, and it goes on from the checkpoint."""
    training = Training(trial)
    _kill(training.step)
    training.ui.wait(training.run, "SUCCESS")
    assert training.resumed_from() is not None
    training.ui.close()


@fault("UI: the run worker is killed")
def worker_killed(trial: Trial) -> None:
    """The step goes on as an orphan; nobody trains beside it."""
    training = Training(trial)
    _kill(training.worker)
    training.go_on()
    command = trial.run("run")
    assert command.wait() == 0, f"ended with {command.wait()}"
    assert training.resumed_from() is None, "trained beside the orphaned step"
    training.ui.wait(training.run, "FAILURE")
    training.ui.close()


@fault("UI: step and run worker are killed")
def step_and_worker_killed(trial: Trial) -> None:
    training = Training(trial)
    _kill(*trial.random.sample([training.step, training.worker], 2))
    training.ui.wait(training.run, "FAILURE")
    training.ui.wait(training.ui.launch(), "SUCCESS")
    assert training.resumed_from() is not None
    training.ui.close()


@fault("UI: terminated in a training")
def terminated(trial: Trial) -> None:
    """Materialized again, it goes on from the checkpoint."""
    training = Training(trial)
    training.go_on()
    training.ui.terminate(training.run)
    training.ui.wait(training.run, "CANCELED")
    finished = trial.artifact(ASSET, WEIGHT).exists()
    training.ui.wait(training.ui.launch(), "SUCCESS")
    assert finished or training.resumed_from() is not None
    training.ui.close()


@fault("UI: its daemon is killed")
def daemon_killed(trial: Trial) -> None:
    training = Training(trial)
    training.go_on()
    _kill(*(pid for pid in descendants(training.ui.process.pid) if b"dagster._daemon" in _command_line(pid)))
    trial.wait(lambda: training.ui.process.poll() is not None, "the UI to end itself")


@fault("UI: everything is killed")
def everything_killed(trial: Trial) -> None:
    """The machine died: the next command ends the run's record, takes its place, and goes on."""
    training = Training(trial)
    training.ui.kill()
    command = trial.run("run")
    assert command.wait() == 0, f"ended with {command.wait()}"
    assert training.resumed_from() is not None


@fault("UI and a command at once")
def ui_and_command(trial: Trial) -> None:
    """One trains, the other waits and reuses."""
    trial.begin_with(ASSET)
    ui = Ui(trial)
    run_id = ui.launch()
    time.sleep(trial.random.uniform(0, 8))
    command = trial.run("run")
    assert command.wait() == 0, f"ended with {command.wait()}"
    ui.wait(run_id, "SUCCESS")
    ui.close()
    manifest = json.loads((trial.artifact(ASSET, WEIGHT) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["resumed_from"] is None and not manifest["resumed"]


@fault("two backfills of the UI at once")
def two_backfills(trial: Trial) -> None:
    """One trains, the other reuses."""
    trial.begin_with(ASSET)
    ui = Ui(trial)
    for backfill_id in [ui.backfill(), ui.backfill()]:
        ui.wait_for_backfill(backfill_id)
    ui.close()
    manifest = json.loads((trial.artifact(ASSET, WEIGHT) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["resumed_from"] is None and not manifest["resumed"]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

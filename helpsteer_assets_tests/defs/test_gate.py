"""A margin adapter that fails its check stops every weight, whichever way the weights are started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from helpsteer_assets.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets_tests.finished import Finished, write_experiment

ROOT = Path(__file__).parents[2]
UNREACHABLE = {"margin_adapter_min_accuracy": 1.0}
"""No adapter prefers chosen in more than all of the pairs. A threshold determines no result: nothing is recomputed."""
REASON = "the margin adapter does not prefer chosen over rejected well enough"


def test_a_run_stops_at_the_check_before_any_weight(copied: Callable[..., Finished]) -> None:
    failing = copied(checks=UNREACHABLE, objective={"weights": [0.5]})
    assert not failing.run()
    assert any(line.startswith("check margin_adapter_prefers_chosen FAILED") for line in failing.announced)
    assert not (failing.home / "artifacts" / "modpo_models" / "0.5").exists()


def test_a_single_partition_is_refused_with_the_reason_and_not_retried(copied: Callable[..., Finished]) -> None:
    failing = copied(checks=UNREACHABLE, objective={"weights": [0.5]})
    result = _materialize(failing, ["modpo_models"], "0.5")
    assert not result.success
    (failure,) = [e.step_failure_data.user_failure_data for e in result.all_events if e.is_step_failure]
    assert REASON in failure.description
    assert not [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert not (failing.home / "artifacts" / "modpo_models" / "0.5").exists()


def test_a_finished_policy_is_not_reused_past_a_failing_check(copied: Callable[..., Finished]) -> None:
    failing = copied(checks=UNREACHABLE)
    assert not _materialize(failing, ["modpo_models"], "0.1").success


def _materialize(run: Finished, assets: list[str], weight: str) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.from_config(str(dagster_home(run.home, run.experiment.name))) as instance:
        return dg.materialize(
            [*build_assets(run.experiment), *build_checks(run.experiment)],
            selection=assets,
            partition_key=weight,
            instance=instance,
            resources={"lab": Lab(run.experiment, run.home)},
            raise_on_error=False,
        )


@pytest.fixture
def server(copied: Callable[..., Finished], tmp_path: Path) -> Iterator[tuple[Finished, str]]:
    """`helpsteer ui` on the failing experiment: the webserver and the daemon that runs backfills."""
    failing = copied(checks=UNREACHABLE, objective={"weights": [0.5]})
    path = write_experiment(tmp_path, checks=UNREACHABLE, objective={"weights": [0.5]})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from helpsteer_assets.cli import entry; entry()"
    command = [sys.executable, "-c", code, "-e", str(path), "--home", str(failing.home), "ui", "--port", str(port)]
    log = (tmp_path / "ui.log").open("w")
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        _wait(lambda: _answers(f"http://127.0.0.1:{port}"), "the UI to start", tmp_path / "ui.log", process)
        yield failing, f"http://127.0.0.1:{port}"
    finally:
        # It ends its own services, in order; what a broken one leaves must not outlive the test.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def test_a_backfill_through_the_daemon_trains_no_weight(server: tuple[Finished, str], tmp_path: Path) -> None:
    failing, url = server
    launched = _graphql(
        url,
        """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {
             __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
        {
            "p": {
                "partitionNames": ["0.5"],
                "assetSelection": [{"path": ["margin_adapter"]}, {"path": ["modpo_models"]}],
            }
        },
    )["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched

    def status() -> str:
        query = (
            "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"
        )
        return _graphql(url, query, {"id": launched["backfillId"]})["partitionBackfillOrError"]["status"]

    ended = ("COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED")
    _wait(lambda: status() in ended, "the backfill to end", tmp_path / "ui.log", None)
    assert not (failing.home / "artifacts" / "modpo_models" / "0.5").exists()
    with dg.DagsterInstance.from_config(str(dagster_home(failing.home, "quick"))) as instance:
        partition = dg.AssetRecordsFilter(dg.AssetKey("modpo_models"), asset_partitions=["0.5"])
        assert not instance.fetch_materializations(partition, limit=1).records


def _wait(done: Callable[[], bool], what: str, log: Path, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"waited too long for {what}:\n{log.read_text()[-3000:]}"
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
        return bool(_graphql(url, query, {})["repositoriesOrError"].get("nodes"))
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _graphql(url: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]

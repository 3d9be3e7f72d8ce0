"""The Dagster UI as people use it: one story on one home, which begins empty; each test goes on where the last ended.

What is seen in the browser is compared with what lies in the store and the warehouse.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from helpsteer_assets.assets.graph import fingerprints, stages
from helpsteer_assets.assets.status import Status, status
from helpsteer_assets.defs.jobs import phases
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.store.artifacts import CHECKPOINTS, Artifact, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.browser.conftest import FAILED
from helpsteer_assets_tests.finished import write_experiment
from helpsteer_assets_tests.processes import descendants

ROOT = Path(__file__).parents[2]
NEW = "0.5"
"""A weight that joins the grid in the middle of the story."""
SOON = 20.0
"""Seconds for a page to show what is there."""
LATE = 800.0
"""Seconds for a backfill to end; Dagster looks at it every 30 seconds."""
TICKS = 90.0
"""Seconds for the page to show what the sensor `up_to_date` is to find."""

expect.set_options(timeout=SOON * 1000)


def wait(condition: Callable[[], object], what: str, seconds: float = LATE) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


class HomeUi:
    """A running `helpsteer ui`: webserver, daemon and code server; the experiment's file and the home that it shows."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home, self.log = write_experiment(folder), folder / "home", folder / "ui.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        code = "from helpsteer_assets.cli import entry; entry()"
        arguments = ["-e", str(self.path), "--home", str(self.home), "ui", "--port", str(port)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Whether the assets are loaded."""
        assert self._process.poll() is None, self.log.read_text()
        with suppress(OSError):
            query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
            return bool(self.ask(query)["repositoriesOrError"].get("nodes"))
        return False

    def ask(self, query: str) -> dict[str, Any]:
        """Data that a GraphQL query returns, asked as the UI's own pages do."""
        body = json.dumps({"query": query}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data

    def close(self) -> None:
        """End it as Ctrl-C does, then whatever is left of it."""
        below = descendants(self._process.pid)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for pid in {self._process.pid, *below, *descendants(self._process.pid)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def backfills(self) -> dict[str, str]:
        """Status by id, the latest first."""
        query = "{ partitionBackfillsOrError { ... on PartitionBackfills { results { id status } } } }"
        return {item["id"]: item["status"] for item in self.ask(query)["partitionBackfillsOrError"]["results"]}

    def change(self, **changes: Any) -> None:
        """Write the experiment's file anew."""
        write_experiment(self.path.parent, **changes)

    def status(self) -> list[Status]:
        return status(load_experiment(str(self.path)), Home(self.home))

    def unfinished(self) -> set[tuple[str, str]]:
        return {(item.asset, item.partition) for item in self.status() if item.state != "complete"}

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return Warehouse(self.home).query(sql)[1]

    def artifact(self, asset: str, weight: str) -> Artifact | None:
        return ArtifactStore(self.home).find(asset, weight, self.fingerprint(asset, weight))

    def fingerprint(self, asset: str, weight: str) -> str:
        return fingerprints(load_experiment(str(self.path)))[asset, weight].value

    def runs(self) -> dict[str, dict[str, Any]]:
        """Dagster's runs by id, the latest first."""
        query = "{ runsOrError { ... on Runs { results { id status assetSelection { path } tags { key value } } } } }"
        found = self.ask(query)["runsOrError"]["results"]
        return {run["id"]: run | {"tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found}


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HomeUi]:
    """The UI on an empty home."""
    ui = HomeUi(tmp_path_factory.mktemp("ui"))
    try:
        wait(ui.is_ready, "the UI to start", 120)
        yield ui
    finally:
        ui.close()


@pytest.fixture(autouse=True)
def _log_of_a_failure(ui: HomeUi, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.stash.get(FAILED, False):
        print(ui.log.read_text(errors="replace")[-20_000:])


def launch(page: Page, button: str, weights: str, launches: str) -> None:
    """Press a materialize button, and in its window choose weights and launch."""
    page.get_by_role("button", name=button).first.click()
    window = page.get_by_role("dialog")
    window.get_by_role("button", name=weights, exact=True).click()
    window.get_by_role("button", name=launches).click()
    expect(window).to_be_hidden()


def launch_backfill(ui: HomeUi, page: Page, button: str) -> str:
    """Of the whole grid; returns when it has ended well, with its id."""
    before = set(ui.backfills())
    launch(page, button, "All", "Launch backfill")
    expect(page.get_by_text("Created backfill")).to_be_visible()
    (backfill,) = set(ui.backfills()) - before
    wait(lambda: ui.backfills()[backfill] not in ("REQUESTED", "COMPLETING"), "the backfill to end")
    assert ui.backfills()[backfill] == "COMPLETED_SUCCESS"
    return backfill


@contextmanager
def held_at_a_checkpoint(ui: HomeUi, asset: str, weight: str) -> Iterator[None]:
    """A training stands still after its first checkpoint, for as long as the block lasts."""
    fingerprint = ui.fingerprint(asset, weight)
    checkpoints = ArtifactStore(ui.home).partial(asset, weight, fingerprint) / CHECKPOINTS
    wait(lambda: checkpoint_progress(checkpoints), "a checkpoint")
    lock = ui.home / "locks" / asset / weight / f"{fingerprint}.lock"
    process = int(json.loads(lock.read_text(encoding="utf-8"))["process"])
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_everything_is_materialized_from_the_graph_on_an_empty_home(ui: HomeUi, page: Page) -> None:
    found = re.search(r"the graph: (\S+)", ui.log.read_text())
    assert found is not None, "`helpsteer ui` names the graph's address"
    page.goto(found[1])
    expect(page.get_by_text("helpsteer_ratings", exact=True)).to_be_visible()
    assert {item.state for item in ui.status()} == {"missing"}
    backfill = launch_backfill(ui, page, "Materialize all")

    page.goto(f"{ui.url}/automation")
    expect(page.get_by_text("up_to_date", exact=True)).to_be_visible()
    expect(page.get_by_text("Automation condition sensor")).to_be_hidden()  # it is off
    page.goto(f"{ui.url}/runs/b/{backfill}")
    for asset in stages(load_experiment(str(ui.path))):
        expect(page.get_by_role("link", name=asset).first).to_be_visible()
    expect(page.get_by_text("Failed", exact=True)).to_have_count(1)  # the column's head
    assert ui.unfinished() == set()
    rows = ui.query("SELECT w, count(*) FROM scores WHERE policy = 'modpo' GROUP BY w ORDER BY w")
    assert rows == [(0.1, 8), (0.9, 8)]


def test_checks_show_their_verdict_in_words(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/margin_adapter?view=checks")
    expect(page.get_by_text("This is a blocking asset check.")).to_be_visible()
    expect(page.get_by_text(re.compile(r"chosen beats rejected in [\d.]+% of \d+ validation pairs"))).to_be_visible()
    expect(page.get_by_text("Passed", exact=True).first).to_be_visible()
    page.goto(f"{ui.url}/assets/tradeoff?view=checks")
    expect(page.get_by_text("margin_follows_weight").first).to_be_visible()
    expect(page.get_by_text("Under the role cost the margin reward").first).to_be_visible()


def test_the_metadata_of_a_weight_are_the_warehouses_numbers(ui: HomeUi, page: Page) -> None:
    weight = "0.9"
    page.goto(f"{ui.url}/assets/scores?view=partitions&partition={weight}")
    ((words, tokens),) = ui.query(
        f"SELECT avg(response_words), avg(response_tokens) FROM scores WHERE policy = 'modpo' AND w = {weight}"
    )
    for key, value in (("mean_response_words", words), ("mean_response_tokens", tokens)):
        row = page.get_by_role("row").filter(has=page.get_by_text(key, exact=True))
        expect(row.get_by_text(f"{value:.5g}", exact=True)).to_be_visible()
    expect(page.get_by_text(ui.fingerprint("scores", weight), exact=True)).to_be_visible()


def test_changes_show_in_the_checks_and_after_a_reload_in_the_marks(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/scores?view=checks")
    expect(page.get_by_text("w=0.1, 0.9: up to date")).to_be_visible()
    ui.change(objective={"beta": 0.3})
    words = "w=0.1, 0.9: modpo_models: objective.beta 0.2 -> 0.3"
    expect(page.get_by_text(words)).to_be_visible(timeout=TICKS * 1000)
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible()

    ui.change(objective={"weights": [0.1, float(NEW), 0.9]}, run={"automation": True})
    expect(page.get_by_text("-> 0.1, 0.5, 0.9: reload the definitions")).to_be_visible(timeout=TICKS * 1000)
    page.goto(f"{ui.url}/asset-groups")
    page.get_by_role("button", name="Reload definitions").click()
    expect(page.get_by_text("Definitions reloaded!")).to_be_visible()
    page.goto(f"{ui.url}/assets/score_summary")
    page.get_by_text("Unsynced").hover()
    expect(page.get_by_text("code version").first).to_be_visible()


def test_a_training_that_is_terminated_goes_on_when_it_is_executed_again(ui: HomeUi, page: Page) -> None:
    before = set(ui.runs())
    page.goto(f"{ui.url}/assets/modpo_models")
    launch(page, "Materialize", "Missing", "Launch 1 run")
    wait(lambda: set(ui.runs()) - before, "the run", SOON)
    (run,) = set(ui.runs()) - before
    page.goto(f"{ui.url}/runs/{run}")
    with held_at_a_checkpoint(ui, "modpo_models", NEW):
        page.get_by_role("button", name="Terminate").click()
        page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
        expect(page.get_by_text("Canceling", exact=True).first).to_be_visible()
    wait(lambda: ui.runs()[run]["status"] == "CANCELED", "the run to be canceled", SOON)
    expect(page.get_by_text("Canceled", exact=True).first).to_be_visible()
    assert ui.artifact("modpo_models", NEW) is None

    page.goto(f"{ui.url}/runs/{run}")
    page.get_by_role("button", name="Re-execute").click()
    wait(lambda: ui.artifact("modpo_models", NEW), "the training")
    artifact = ui.artifact("modpo_models", NEW)
    assert artifact is not None
    assert artifact.manifest["metrics"]["resumed_from"] in (2, 4)
    again = next(item for item in ui.runs().values() if item["tags"].get("dagster/parent_run_id") == run)
    wait(lambda: ui.runs()[again["id"]]["status"] == "SUCCESS", "the run to end", SOON)


def test_what_was_trained_is_evaluated_without_a_click(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/automation")
    expect(page.get_by_text("Automation condition sensor")).to_be_visible()
    wait(lambda: not ui.unfinished(), "the scores, the summary and the trade-off")
    experiment = load_experiment(str(ui.path))
    automatic = [run for run in ui.runs().values() if run["tags"].get("dagster/sensor_name") == "automation"]
    made = sorted(asset["path"][0] for run in automatic for asset in run["assetSelection"])
    assert made == sorted([*phases(experiment)["tradeoff_grid"][1:], *phases(experiment)["evaluate"]])
    assert ui.query(f"SELECT count(*) FROM scores WHERE w = {NEW}") == [(8,)]
    page.goto(f"{ui.url}/assets/score_summary")
    expect(page.get_by_text("follows its inputs")).to_be_visible()
    expect(page.get_by_text("Unsynced")).to_be_hidden()

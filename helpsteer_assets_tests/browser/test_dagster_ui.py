"""The Dagster UI as people use it: one story on one home, which begins empty; each test goes on where the last ended.

What is seen in the browser is compared with what lies in the store and the warehouse.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

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
from helpsteer_assets_tests.ui import Ui, wait

GRID = ["0.1", "0.9"]
NEW = "0.5"
"""A weight that joins the grid in the middle of the story."""
SOON = 20.0
"""Seconds for a page to show what is there."""
TICKS = 90.0
"""Seconds for the page to show what the sensor `up_to_date` is to find."""

expect.set_options(timeout=SOON * 1000)


class HomeUi(Ui):
    """The UI, the experiment's file and the home that it shows."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home = write_experiment(folder), folder / "home"
        super().__init__(self.path, self.home)

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
        ui.wait_until_ready()
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


def lies_in_sight(image: Locator) -> bool:
    """Whether an image was decoded and takes up room on the page."""
    expect(image).to_be_visible()
    width: int = image.evaluate("image => image.naturalWidth")
    box = image.bounding_box()
    return width > 0 and box is not None and box["width"] > 100 and box["height"] > 100


def test_everything_is_materialized_from_the_graph_on_an_empty_home(ui: HomeUi, page: Page) -> None:
    found = re.search(r"the graph: (\S+)", ui.log.read_text())
    assert found is not None, "`helpsteer ui` names the graph's address"
    page.goto(found[1])
    expect(page.get_by_text("helpsteer_ratings", exact=True)).to_be_visible()
    assert {item.state for item in ui.status()} == {"missing"}
    backfill = launch_backfill(ui, page, "Materialize all")

    page.goto(f"{ui.url}/runs/b/{backfill}")
    for asset in stages(load_experiment(str(ui.path))):
        expect(page.get_by_role("link", name=asset).first).to_be_visible()
    expect(page.get_by_text("Failed", exact=True)).to_have_count(1)  # the column's head
    assert ui.unfinished() == set()
    rows = ui.query("SELECT w, count(*) FROM scores WHERE policy = 'modpo' GROUP BY w ORDER BY w")
    assert rows == [(0.1, 8), (0.9, 8)]


def test_no_automation_is_there_unless_it_is_switched_on(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/automation")
    expect(page.get_by_text("up_to_date", exact=True)).to_be_visible()
    expect(page.get_by_text("Automation condition sensor")).to_be_hidden()


def test_two_weights_are_backfilled_by_the_job_and_taken_from_the_store(ui: HomeUi, page: Page) -> None:
    scores = "SELECT * EXCLUDE (run_id) FROM scores WHERE policy = 'modpo' ORDER BY w, prompt_id"
    before, grid = ui.query(scores), phases(load_experiment(str(ui.path)))["tradeoff_grid"]
    page.goto(f"{ui.url}/locations/helpsteer_assets.definitions/jobs/tradeoff_grid")
    backfill = launch_backfill(ui, page, "Materialize all")
    runs = [run for run in ui.runs().values() if run["tags"].get("dagster/backfill") == backfill]
    assert sorted(run["tags"]["dagster/partition"] for run in runs) == GRID
    reused = ui.query("SELECT asset, partition, reused FROM materializations WHERE partition IS NOT NULL ORDER BY ALL")
    assert reused == [(asset, w, True) for asset in sorted(grid) for w in GRID]
    assert ui.query(scores) == before


def test_checks_show_their_verdict_in_words(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/margin_adapter?view=checks")
    expect(page.get_by_text("This is a blocking asset check.")).to_be_visible()
    expect(page.get_by_text(re.compile(r"chosen beats rejected in [\d.]+% of \d+ validation pairs"))).to_be_visible()
    expect(page.get_by_text("Passed", exact=True).first).to_be_visible()
    page.goto(f"{ui.url}/assets/tradeoff?view=checks")
    expect(page.get_by_text("margin_follows_weight").first).to_be_visible()
    expect(page.get_by_text("Under the role cost the margin reward").first).to_be_visible()


@pytest.mark.parametrize(
    ("asset", "plot"), [("tradeoff", "front"), ("tradeoff_report", "kl"), ("modpo_models", "loss_curve")]
)
def test_plots_are_seen_in_the_metadata(ui: HomeUi, page: Page, asset: str, plot: str) -> None:
    page.goto(f"{ui.url}/assets/{asset}")
    row = page.get_by_role("row").filter(has=page.get_by_text(plot, exact=True))
    row.get_by_text("[Show Markdown]").click()
    assert lies_in_sight(page.get_by_role("dialog").locator("img"))


def test_the_report_of_a_run_opens_without_a_complaint(ui: HomeUi, page: Page) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    artifact = ui.artifact("tradeoff_report", "all")
    assert artifact is not None
    longest = "SELECT arg_max(prompt_id, length(response)) FROM generations"
    rows = ui.query(f"SELECT prompt_id, response FROM generations WHERE prompt_id = ({longest}) ORDER BY w NULLS FIRST")
    page.goto(f"{artifact.file('report.html').as_uri()}#prompt={rows[0][0]}")
    shown = page.locator(".response .text").all_text_contents()
    assert shown == [response or "(empty response)" for _, response in rows]
    assert page.locator("#front svg .point").count() == len(rows)
    assert complaints == []


def test_numbers_are_plotted_over_weights(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/scores")
    page.get_by_role("button", name="Plots").click()
    expect(page.get_by_text("mean_margin_reward", exact=True)).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()


@pytest.mark.parametrize("weight", GRID)
def test_the_metadata_of_a_weight_are_the_warehouses_numbers(ui: HomeUi, page: Page, weight: str) -> None:
    page.goto(f"{ui.url}/assets/scores?view=partitions&partition={weight}")
    ((words, tokens),) = ui.query(
        f"SELECT avg(response_words), avg(response_tokens) FROM scores WHERE policy = 'modpo' AND w = {weight}"
    )
    for key, value in (("mean_response_words", words), ("mean_response_tokens", tokens)):
        row = page.get_by_role("row").filter(has=page.get_by_text(key, exact=True))
        expect(row.get_by_text(f"{value:.5g}", exact=True)).to_be_visible()
    expect(page.get_by_text(ui.fingerprint("scores", weight), exact=True)).to_be_visible()


def test_the_lineage_of_scores_leads_up_to_the_ratings(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/scores")
    for above in ("modpo_models", "sft_model", "preference_pairs", "helpsteer_ratings"):
        page.get_by_role("link", name=above).first.click()
        expect(page).to_have_url(re.compile(f"/assets/{above}"))
    expect(page.get_by_text(ui.fingerprint("helpsteer_ratings", "all"), exact=True)).to_be_visible()


def test_a_changed_setting_shows_in_the_checks_with_its_weights_and_values(ui: HomeUi, page: Page) -> None:
    page.goto(f"{ui.url}/assets/scores?view=checks")
    expect(page.get_by_text("w=0.1, 0.9: up to date")).to_be_visible()
    ui.change(objective={"beta": 0.3})
    words = "w=0.1, 0.9: modpo_models: objective.beta 0.2 -> 0.3"
    expect(page.get_by_text(words)).to_be_visible(timeout=TICKS * 1000)
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
    page.goto(f"{ui.url}/assets/score_summary?view=checks")
    expect(page.get_by_text("modpo_models: objective.beta 0.2 -> 0.3")).to_be_visible()


def test_a_changed_grid_asks_for_a_reload_and_then_marks_what_is_out_of_date(ui: HomeUi, page: Page) -> None:
    ui.change(objective={"weights": [0.1, float(NEW), 0.9]}, run={"automation": True})
    page.goto(f"{ui.url}/assets/scores?view=checks")
    expect(page.get_by_text("-> 0.1, 0.5, 0.9: reload the definitions")).to_be_visible(timeout=TICKS * 1000)
    page.goto(f"{ui.url}/asset-groups")
    page.get_by_role("button", name="Reload definitions").click()
    expect(page.get_by_text("Definitions reloaded!")).to_be_visible()
    page.goto(f"{ui.url}/assets/score_summary")
    page.get_by_text("Unsynced").hover()
    expect(page.get_by_text("code version").first).to_be_visible()
    (summary,) = [item for item in ui.status() if item.asset == "score_summary"]
    assert summary.state == "out of date"
    assert "objective.weights" in summary.detail


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

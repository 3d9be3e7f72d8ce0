"""Dagster's records in Postgres: a run, its death and what follows, as the manual's page says it."""

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import pytest
import yaml

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.dagster_home import DAGSTER_YAML, dagster_home, make_dagster_home
from helpsteer_assets.execution.executor import GPU_POOL
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home as FolderHome
from helpsteer_assets_tests.finished import quick_experiment
from helpsteer_assets_tests.postgres.conftest import Server

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "postgres.md"
SMALL: dict[str, Any] = {
    "data": {"max_train_prompts": 40},
    "objective": {
        "weights": [0.5],
        "margin": "length_penalty",
        "penalty": 0.01,
        "margin_role": None,
        "margin_beta": None,
    },
    "sft": {"enabled": False},
    "margin_adapter": None,
    "modpo": {"steps": 12, "evaluate_every": 2},
    "evaluation": {"prompts": 4, "kl_samples": 0},
}
"""One weight, and one training."""
TRAINING = 'key:"modpo_models"'
TRAINED = "modpo_models w=0.5: computing"


class Started(NamedTuple):
    """A run that was started, and the file of what it announces."""

    process: ForkProcess
    log: Path

    def wait(self) -> list[str]:
        """What it announced, once it has ended well."""
        self.process.join(600)
        said = self.log.read_text(encoding="utf-8").splitlines()
        assert self.process.exitcode == 0, said
        return said


class Home:
    """A home whose records are in a database, and its experiment."""

    def __init__(self, folder: Path, server: Server, database: str, **connection: Any) -> None:
        self.folder = folder
        self.path = folder / "home"
        self.experiment = self.change()
        config = self.path / "dagster" / self.experiment.name / "dagster.yaml"
        config.parent.mkdir(parents=True)
        # As the manual's page has it, but for the server.
        storage = yaml.safe_load(
            re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)[0]
        )
        there = {"hostname": "127.0.0.1", "port": server.port, "db_name": database}
        storage["storage"]["postgres"]["postgres_db"] |= there | connection
        config.write_text(DAGSTER_YAML.format(pool_limit=1) + yaml.safe_dump(storage), encoding="utf-8")

    def change(self, **changes: Any) -> Experiment:
        """Write the experiment anew."""
        sections = {key: SMALL[key] | changes.get(key, {}) if SMALL.get(key) else changes.get(key) for key in SMALL}
        self.experiment = quick_experiment(self.folder, **sections)
        return self.experiment

    def run(self, announce: Callable[[str], None] = lambda message: None, select: str | None = None) -> list[str]:
        """What a run that went well announced."""
        said: list[str] = []

        def say(message: str) -> None:
            said.append(message)
            announce(message)

        assert run_experiment(self.experiment, FolderHome(self.path), select=select, announce=say), said
        return said

    def start(self, select: str | None = None) -> Started:
        """A run in a process of its own, which is a fork of this one: imports would take it longer than the run."""
        log = Path(tempfile.mkdtemp(dir=self.folder)) / "said"

        def work() -> None:
            with log.open("w", encoding="utf-8") as file:
                complete = run_experiment(
                    self.experiment,
                    FolderHome(self.path),
                    select=select,
                    announce=lambda message: print(message, file=file, flush=True),
                )
            os._exit(int(not complete))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return Started(process, log)

    @contextmanager
    def records(self) -> Iterator[dg.DagsterInstance]:
        with dg.DagsterInstance.from_config(str(dagster_home(FolderHome(self.path), self.experiment.name))) as instance:
            yield instance

    def statuses(self) -> list[str]:
        """Of Dagster's runs, the latest first."""
        with self.records() as instance:
            return [run.status.value for run in instance.get_runs()]


@pytest.fixture(scope="module")
def home(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One home for a story: each test goes on where the last ended."""
    server.create_database("story")
    return Home(tmp_path_factory.mktemp("story"), server, "story")


def test_a_run_that_is_killed_is_ended_and_gone_on_from(home: Home, server: Server) -> None:
    present = fingerprints(home.experiment)["modpo_models", "0.5"].value
    training = ArtifactStore(home.path).partial("modpo_models", "0.5", present)
    started = home.start()
    while not list(training.glob("checkpoints/checkpoint-*/complete.json")):
        assert started.process.is_alive(), started.log.read_text()
        time.sleep(0.01)
    started.process.kill()
    started.process.join()
    assert home.statuses()[0] == "STARTED"
    with home.records() as records:
        assert len(records.event_log_storage.get_concurrency_info(GPU_POOL).active_run_ids) == 1

    said = home.run()

    assert any(line.endswith("what it had begun goes on") for line in said)
    artifact = ArtifactStore(home.path).find("modpo_models", "0.5", present)
    assert artifact is not None and artifact.manifest["metrics"]["resumed_from"] >= 2
    assert sorted(home.statuses()) == ["FAILURE", "SUCCESS", "SUCCESS", "SUCCESS", "SUCCESS"]
    with home.records() as records:
        assert not records.event_log_storage.get_concurrency_info(GPU_POOL).active_run_ids
        event = records.get_latest_materialization_event(dg.AssetKey("modpo_models"))
        assert event is not None and event.asset_materialization is not None
        assert event.asset_materialization.tags["dagster/data_version"] == present
    assert server.query("story", "SELECT count(*) FROM runs") == [(5,)]

    beside = {path.name for path in dagster_home(FolderHome(home.path), "quick").iterdir()}
    assert beside == {"dagster.yaml", "records_id", "storage"}, "logs of steps, and no database"


def test_a_server_that_goes_away_costs_nothing_and_of_two_runs_at_once_then_one_trains(
    home: Home, server: Server
) -> None:
    home.change(objective={"beta": 0.7})

    def stop(message: str) -> None:
        if message == TRAINED:
            server.stop()

    with pytest.raises(HelpsteerError, match="the database of Dagster's records does not serve: connection to server"):
        home.run(stop, select=TRAINING)
    states = {item.asset: item.state for item in status(home.experiment, FolderHome(home.path))}
    assert states["reference_log_probs"] == "complete" and states["modpo_models"] in ("partial", "reusable")
    server.start()
    assert home.statuses()[0] == "STARTED"

    said = [line for started in [home.start(TRAINING), home.start(TRAINING)] for line in started.wait()]

    assert any("died; what it had finished is reused" in line for line in said)
    assert sum(line.startswith(TRAINED) for line in said) <= 1
    assert sum(line.startswith("modpo_models w=0.5: reused") for line in said) >= 1
    assert {item.asset: item.state for item in status(home.experiment, FolderHome(home.path))}[
        "modpo_models"
    ] == "complete"
    assert "STARTED" not in home.statuses()
    assert not [line for line in home.run(select=TRAINING) if ": computing" in line]


def test_processes_that_open_a_fresh_database_at_once_make_its_tables_once(server: Server, tmp_path: Path) -> None:
    server.create_database("fresh")
    home = Home(tmp_path, server, "fresh")

    def make() -> None:
        make_dagster_home(FolderHome(home.path), "quick")
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=make) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    assert home.statuses() == []
    assert server.query("fresh", "SELECT count(*) FROM alembic_version") == [(1,)]


def test_experiments_share_a_database_where_each_has_its_schema(server: Server, tmp_path: Path) -> None:
    server.create_database("shared")
    for schema in ("one", "two"):
        server.query("shared", f"CREATE SCHEMA {schema}")
        (tmp_path / schema).mkdir()
        home = Home(tmp_path / schema, server, "shared", params={"options": f"-csearch_path={schema}"})
        make_dagster_home(FolderHome(home.path), "quick")
        assert home.statuses() == []
        assert server.query("shared", f"SELECT count(*) FROM {schema}.runs") == [(0,)]


def test_a_database_that_holds_the_records_of_another_home_is_refused(
    home: Home, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(HelpsteerError, match=f"holds the records of {home.path}/dagster/quick; each experiment"):
        make_dagster_home(Home(tmp_path, server, "story").path, "quick")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"password": "wrong"},
            'does not serve: .*password authentication failed for user "helpsteer"\n.*dagster.yaml',
        ),
        ({"port": 9}, "does not serve: .*Connection refused"),
        ({"password": {"env": "HELPSTEER_UNSET"}}, 'dagster.yaml cannot be used: .*"HELPSTEER_UNSET" which is not set'),
        ({"scheme": "postgresql"}, "cannot be used: No module named 'psycopg': write `scheme: postgresql\\+psycopg2`"),
        ({"host": "127.0.0.1"}, "cannot be used: .*unexpected config entry"),
    ],
)
def test_what_is_wrong_with_the_storage_is_said_in_words(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    home = Home(tmp_path, server, "postgres", **changes)
    with pytest.raises(HelpsteerError, match=f"(?s){said}"):
        make_dagster_home(FolderHome(home.path), "quick")
    assert "Retrying" not in capfd.readouterr().err
    assert {path.name for path in dagster_home(FolderHome(home.path), "quick").iterdir()} == {"dagster.yaml"}

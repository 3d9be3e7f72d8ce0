"""Clearing up after processes that died, and Dagster's home made once."""

import multiprocessing
import os
import shutil
from pathlib import Path

import dagster as dg
import pytest

from helpsteer_assets.execution.dagster_home import make_dagster_home
from helpsteer_assets.execution.recovery import PROCESS_TAG, alive, recover_dead_runs, recovering
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.conftest import die, run_to_its_death


@pytest.fixture
def instance(tmp_path: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(make_dagster_home(Home(tmp_path), "demo")))


def _make(home: Path) -> None:
    make_dagster_home(Home(home), "demo")
    os._exit(0)


def test_processes_that_open_a_fresh_or_a_half_made_home_at_once_make_its_databases_once(tmp_path: Path) -> None:
    def open_at_once() -> None:
        processes = [multiprocessing.get_context("fork").Process(target=_make, args=(tmp_path,)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * 4

    open_at_once()
    folder = tmp_path / "dagster" / "demo"
    assert not list(folder.glob(".*"))
    shutil.move(folder / "history", folder / ".new-left")  # as one leaves it that died before the last of the renames
    open_at_once()
    with dg.DagsterInstance.from_config(str(make_dagster_home(Home(tmp_path), "demo"))) as instance:
        assert instance.get_runs() == []
    assert not list(folder.glob(".new-*"))


@pytest.mark.parametrize(
    ("status", "then"),
    [
        (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE),
        (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED),
    ],
)
def test_the_run_of_a_dead_process_is_ended_and_that_of_a_living_one_is_not(
    instance: dg.DagsterInstance, tmp_path: Path, status: dg.DagsterRunStatus, then: dg.DagsterRunStatus
) -> None:
    def run_and_die() -> None:
        with alive(Home(tmp_path)) as tags:
            instance.add_run(dg.DagsterRun("job", "dead", status=status, tags=tags))
            die()

    run_to_its_death(run_and_die)
    said: list[str] = []
    with alive(Home(tmp_path)) as tags:
        instance.add_run(dg.DagsterRun("job", "living", status=status, tags=tags))
        recover_dead_runs(instance, Home(tmp_path), said.append)
        found = {run.run_id: run.status for run in instance.get_runs()}
    assert found == {"dead": then, "living": status}
    assert len(said) == 1 and said[0].startswith("run dead died; ")


def test_locks_of_the_dead_are_removed_and_those_of_the_living_stay(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    def live_and_die() -> None:
        with alive(Home(tmp_path)):
            die()

    run_to_its_death(live_and_die)
    locks = tmp_path / "locks" / "running"
    assert len(list(locks.glob("*.lock"))) == 1
    with alive(Home(tmp_path)) as tags, recovering(instance, Home(tmp_path), tags, print):
        assert [path.stem for path in locks.glob("*.lock")] == [tags[PROCESS_TAG]]
    assert list(locks.iterdir()) == []

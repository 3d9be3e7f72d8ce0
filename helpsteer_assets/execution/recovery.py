"""Clears up after processes that died: ends their runs in Dagster's records, and frees their slots in pools.

A killed process leaves its run as started and its pool slot taken, and the next run would wait for that slot for ever.
Dagster looks after runs that the UI launched only while that UI runs, and never after those of `helpsteer run`. So each
process that executes runs holds a lock for as long as it lives, and a tag of its runs names that lock: if the lock is
free, the process is dead.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_in_use, lock_if_free, process_lock, remove_locks_of_dead_processes

PROCESS_TAG = "helpsteer/process"
"""Tag of a run: the name of the lock that its process holds (`process_lock`)."""

_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_WATCH_SECONDS = 2.0

logger = logging.getLogger(__name__)


@contextmanager
def alive(home: Home) -> Iterator[dict[str, str]]:
    """Use the home for the block; yields the tags that mark runs of this process as those of a living one."""
    with home_in_use(home.path, "a run") as name:
        yield {PROCESS_TAG: name}


@contextmanager
def recovering(
    instance: dg.DagsterInstance, home: Home, tags: dict[str, str], announce: Callable[[str], None]
) -> Iterator[None]:
    """Clear up after dead processes now, and every two seconds during the block: this one may wait for what they hold.

    Args:
        instance: Dagster's records.
        home: the home.
        tags: of this process's runs.
        announce: is told of runs that died, and once of each pool that this process waits for.
    """
    recover_dead_runs(instance, home, announce)
    remove_locks_of_dead_processes(home.path)
    ended, told = threading.Event(), set[str]()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            try:
                recover_dead_runs(instance, home, announce)
                for pool, holders in _waited_for(instance, tags).items():
                    if pool not in told:
                        announce(f"waiting for a place in pool {pool}, which run {', '.join(holders)} holds")
                    told.add(pool)
            except Exception as error:  # the run itself says what is wrong with the disk
                logger.debug("cannot look for runs that died: %s", error)

    thread = threading.Thread(target=watch, name="recovery", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def recover_dead_runs(instance: dg.DagsterInstance, home: Home, announce: Callable[[str], None]) -> None:
    """End the runs of dead processes, and free the slots that no living run holds."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED)):
        if (name := run.tags.get(PROCESS_TAG)) is None:
            continue
        with lock_if_free(process_lock(home.path, name)) as is_dead:
            if is_dead:
                announce(f"run {run.run_id} died; what it had finished is reused, and what it had begun goes on")
                if run.status == dg.DagsterRunStatus.CANCELING:
                    instance.report_run_canceled(run, "The process of this run died while it was being canceled.")
                else:
                    instance.report_run_failed(run, "The process of this run died.")
                process_lock(home.path, name).unlink(missing_ok=True)
    _free_slots(instance)


def _waited_for(instance: dg.DagsterInstance, tags: dict[str, str]) -> dict[str, list[str]]:
    """The pools in which runs with these tags wait for a place, and the runs that hold the places."""
    own = {run.run_id for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED, tags=tags))}
    pools = map(instance.event_log_storage.get_concurrency_info, instance.event_log_storage.get_concurrency_keys())
    return {pool.concurrency_key: sorted(pool.active_run_ids) for pool in pools if pool.pending_run_ids & own}


def cancel_runs(instance: dg.DagsterInstance, tags: dict[str, str]) -> None:
    """End the runs of this process, which is about to end, as canceled, and free their slots."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED, tags=tags)):
        instance.report_run_canceled(run, "The process of this run was interrupted.")
    _free_slots(instance)


def _free_slots(instance: dg.DagsterInstance) -> None:
    """Free the pool slots of runs that have ended."""
    storage = instance.event_log_storage
    for pool in storage.get_concurrency_keys():
        info = storage.get_concurrency_info(pool)
        for run_id in {slot.run_id for slot in info.claimed_slots} | {step.run_id for step in info.pending_steps}:
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                storage.free_concurrency_slots_for_run(run_id)


class MarkedRuns(dg.Executor):
    """An executor that marks its runs with the lock of its process, so that a run shows whether its process lives."""

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self) -> Any:
        """The inner executor's."""
        return self._executor.retries

    @property
    def step_dependency_config(self) -> Any:
        """The inner executor's."""
        return self._executor.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        """Let the inner executor execute the run, while this process uses the home."""
        with alive(Home.from_environment()) as tags:
            self._tag(plan_context.instance, plan_context.run_id, tags)
            yield from self._executor.execute(plan_context, execution_plan)

    def _tag(self, instance: dg.DagsterInstance, run_id: str, tags: dict[str, str]) -> None:
        instance.add_run_tags(run_id, tags)

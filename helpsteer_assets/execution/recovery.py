"""Runs of processes that died: found, ended in Dagster's records, and relieved of the pool slots they held.

A killed process leaves its run as started and its pool slot taken, and whoever comes next would wait for that slot for
ever. Dagster sees to runs that the UI launched only while that UI runs, and to those of `helpsteer run` not at all. So
each process that executes runs holds a lock for as long as it lives, which its runs name in a tag: where the lock is
free, the process is dead.
"""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from helpsteer_assets.store.home import home_path
from helpsteer_assets.store.locks import exclusive_lock, lock_if_free
from helpsteer_assets.store.uses import bury_dead

PROCESS_TAG = "helpsteer/process"
"""Tag of a run whose process holds the lock of that name."""

_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_WATCH_SECONDS = 2.0

logger = logging.getLogger(__name__)


@contextmanager
def alive(home: Path) -> Iterator[dict[str, str]]:
    """Hold this process's lock for the block; yields the tags that its runs are to bear."""
    name = uuid.uuid4().hex
    path = process_lock(home, name)
    with ExitStack() as stack:
        with _counting(home):
            stack.enter_context(exclusive_lock(path))
        stack.callback(path.unlink, missing_ok=True)
        yield {PROCESS_TAG: name}


def _counting(home: Path) -> AbstractContextManager[object]:
    """Held while a process's lock is made, and while those of dead ones are removed: keep it short."""
    return exclusive_lock(home / "locks" / "runs.lock")


def _remove_locks_of_the_dead(home: Path) -> None:
    with _counting(home):
        for path in (home / "locks" / "runs").glob("*.lock"):
            with lock_if_free(path) as dead:
                if dead:
                    path.unlink(missing_ok=True)


@contextmanager
def recovering(
    instance: dg.DagsterInstance, home: Path, tags: dict[str, str], announce: Callable[[str], None]
) -> Iterator[None]:
    """Clear up after dead processes now and, as some may die while this one waits for what they hold, during the block.

    Args:
        instance: Dagster's records.
        home: the home.
        tags: of this process's runs.
        announce: is told of runs that died, and once of a pool that this process waits for.
    """
    recover_dead_runs(instance, home, announce)
    _remove_locks_of_the_dead(home)
    bury_dead(home)
    ended, told = threading.Event(), set[str]()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            try:
                recover_dead_runs(instance, home, announce)
                for pool, holders in _waited_for(instance, tags).items():
                    if pool not in told:
                        announce(f"waiting for a place in pool {pool}, which run {', '.join(holders)} holds")
                    told.add(pool)
            except Exception as error:  # The run itself will say what is wrong with the disk.
                logger.debug("cannot look for runs that died: %s", error)

    thread = threading.Thread(target=watch, name="recovery", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def recover_dead_runs(instance: dg.DagsterInstance, home: Path, announce: Callable[[str], None]) -> None:
    """End the runs of dead processes, and free the slots that no living run holds."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED)):
        if (name := run.tags.get(PROCESS_TAG)) is None:
            continue
        with lock_if_free(process_lock(home, name)) as dead:
            if dead:
                announce(f"run {run.run_id} died; what it had finished is reused, and what it had begun goes on")
                if run.status == dg.DagsterRunStatus.CANCELING:
                    instance.report_run_canceled(run, "The process of this run died while it was being canceled.")
                else:
                    instance.report_run_failed(run, "The process of this run died.")
                process_lock(home, name).unlink(missing_ok=True)
    _free_slots(instance)


def _waited_for(instance: dg.DagsterInstance, tags: dict[str, str]) -> dict[str, list[str]]:
    """Pools in which runs with these tags wait for a place, and the runs that hold the places."""
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
        held = storage.get_concurrency_info(pool)
        for run_id in {slot.run_id for slot in held.claimed_slots} | {step.run_id for step in held.pending_steps}:
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                storage.free_concurrency_slots_for_run(run_id)


def process_lock(home: Path, name: str) -> Path:
    """What a living process of that name holds."""
    return home / "locks" / "runs" / f"{name}.lock"


class Living(dg.Executor):
    """Whose runs can be told from those of dead processes, also when the UI that launched them is gone."""

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
        """Let the inner executor execute, while this process holds a lock in the home."""
        with alive(home_path()) as tags:
            self._tag(plan_context.instance, plan_context.run_id, tags)
            yield from self._executor.execute(plan_context, execution_plan)

    def _tag(self, instance: dg.DagsterInstance, run_id: str, tags: dict[str, str]) -> None:
        instance.add_run_tags(run_id, tags)

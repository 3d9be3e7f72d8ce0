"""Runs of processes that died: found, ended in Dagster's records, and relieved of the pool slots they held.

A killed process leaves its run as started and its pool slot taken, and whoever comes next would wait for that slot for
ever. Dagster's run monitoring sees to runs that the UI launched, while its daemon runs; `helpsteer run` has no daemon.
So each such process holds a lock for as long as it lives, which its runs name in a tag: where the lock is free, the
process is dead.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from helpsteer_assets.resources.locks import exclusive_lock, lock_if_free

PROCESS_TAG = "helpsteer/process"
"""Tag of a run whose process holds the lock of that name."""

_UNFINISHED = [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]


@contextmanager
def alive(home: Path) -> Iterator[dict[str, str]]:
    """Hold this process's lock for the block; yields the tags that its runs are to bear."""
    name = uuid.uuid4().hex
    path = _lock(home, name)
    try:
        with exclusive_lock(path):
            yield {PROCESS_TAG: name}
    finally:
        path.unlink(missing_ok=True)


def recover_dead_runs(instance: dg.DagsterInstance, home: Path, announce: Callable[[str], None]) -> None:
    """End the runs of dead `helpsteer run` processes, free slots that no living run holds, say what is waited for."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED)):
        if (name := run.tags.get(PROCESS_TAG)) is None:
            continue
        with lock_if_free(_lock(home, name)) as dead:
            if dead:
                announce(f"run {run.run_id} died; what it had finished is reused, and its checkpoints are gone on from")
                instance.report_run_failed(run, "The process of this run died.")
                _lock(home, name).unlink(missing_ok=True)
    _free_slots(instance)
    storage = instance.event_log_storage
    for pool in storage.get_concurrency_keys():
        held = storage.get_concurrency_info(pool)
        if held.claimed_slots and len(held.claimed_slots) >= held.slot_count:
            holders = ", ".join(sorted({slot.run_id for slot in held.claimed_slots}))
            announce(f"pool {pool} is full: waiting for run {holders} (Deployment > Concurrency in the UI shows it)")


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


def _lock(home: Path, name: str) -> Path:
    return home / "locks" / "runs" / f"{name}.lock"

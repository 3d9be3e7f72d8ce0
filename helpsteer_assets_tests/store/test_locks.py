"""Locks: one holder at a time, a dead one's is free at once, a living one's never; who uses a home, and who waits."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.locks import (
    exclusive_lock,
    home_alone,
    home_in_use,
    lock_if_free,
    process_lock,
    remove_locks_of_dead_processes,
)

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "a.lock"


def enter(block: Callable[[], AbstractContextManager[object]], entered: Event, leave: Event) -> None:
    with block():
        entered.set()
        leave.wait(60)


@contextmanager
def inside(block: Callable[[], AbstractContextManager[object]]) -> Iterator[tuple[int, Event]]:
    """Another process is in the block until the event is set, or its process killed."""
    entered, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=enter, args=(block, entered, leave))
    process.start()
    assert entered.wait(60) and process.pid is not None
    yield process.pid, leave
    if process.is_alive():  # to wake a killed one would wait for ever
        leave.set()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)


def kill(pid: int) -> None:
    """Kill the process, and wait until the kernel has closed its files; it stays a zombie for its parent."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Exclusive locks


@pytest.mark.parametrize("kind", [FORK.Process, threading.Thread])
def test_one_process_or_thread_holds_a_lock_at_a_time(
    lock: Path, tmp_path: Path, kind: Callable[..., multiprocessing.Process | threading.Thread]
) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(20):
            with exclusive_lock(lock):
                value = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(value + 1))

    workers = [kind(target=count) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert counter.read_text() == "80"


def test_the_lock_of_a_stopped_process_is_held_and_that_of_a_killed_one_is_free_at_once(lock: Path) -> None:
    with inside(lambda: exclusive_lock(lock)) as (pid, _):
        os.kill(pid, signal.SIGSTOP)
        with lock_if_free(lock) as free:
            assert not free
        kill(pid)
        with lock_if_free(lock) as free:
            assert free


def test_a_lock_whose_file_was_removed_or_replaced_is_noticed(lock: Path) -> None:
    with exclusive_lock(lock) as held:
        held.check()
        shutil.rmtree(lock.parent)
        with pytest.raises(HelpsteerError, match=rf"{lock} was removed or replaced .*run the same command again"):
            held.check()
        with exclusive_lock(lock):  # by another path of execution, which nothing keeps out now
            with pytest.raises(HelpsteerError, match="nothing was finished"):
                held.check()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_in_words(
    lock: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = rf"cannot lock {lock}: .*no working locks \({os.strerror(number)}\).* set HELPSTEER_HOME to a folder"
    with pytest.raises(HelpsteerError, match=words):
        exclusive_lock(lock).__enter__()
    with pytest.raises(HelpsteerError, match="no working locks"):
        home_in_use(lock.parent, "training").__enter__()


def test_a_forked_child_keeps_neither_the_lock_nor_the_home(lock: Path, tmp_path: Path) -> None:
    with exclusive_lock(lock), home_in_use(tmp_path, "training"):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    with lock_if_free(lock) as free, home_alone(tmp_path):
        assert free
    child.kill()
    child.join()


# The lock of a home


def test_a_home_in_use_is_refused_to_who_wants_it_alone_at_once_and_in_words(tmp_path: Path) -> None:
    with inside(lambda: home_in_use(tmp_path, "modpo_models w=0.1")) as (pid, _):
        words = rf"^the home {tmp_path} is in use: .*process {pid} on \S+ \(modpo_models w=0.1, since 2\d\d\d-.*UTC\)"
        with home_in_use(tmp_path, "any number of others"), pytest.raises(HelpsteerError, match=words) as refused:
            home_alone(tmp_path).__enter__()
        assert "any number of others" in str(refused.value)
    with home_alone(tmp_path):
        assert list((tmp_path / "locks" / "running").iterdir()) == []


def test_who_wants_to_use_a_home_waits_for_its_cleaning_and_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with inside(lambda: home_alone(tmp_path)) as (_, leave):
        with pytest.raises(HelpsteerError, match="is in use: another `gc --delete`"):
            home_alone(tmp_path).__enter__()
        threading.Timer(0.3, leave.set).start()
        with home_in_use(tmp_path, "training", told.append):
            assert leave.is_set()
    assert told == [f"waiting for the removal of files from the home {tmp_path}"]


def test_a_killed_process_uses_nothing_and_its_lock_is_removed_while_those_of_the_living_stay(tmp_path: Path) -> None:
    with inside(lambda: home_in_use(tmp_path, "training")) as (pid, _):
        kill(pid)
        with home_in_use(tmp_path, "living") as name:
            remove_locks_of_dead_processes(tmp_path)
            assert list((tmp_path / "locks" / "running").iterdir()) == [process_lock(tmp_path, name)]
            assert json.loads(process_lock(tmp_path, name).read_text())["doing"] == "living"
    with home_alone(tmp_path):
        pass

"""Locks: one holder at a time, a dead one is recovered, a living one is never robbed."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store import locks
from helpsteer_assets.store.locks import exclusive_lock, lock_if_free

FORK = multiprocessing.get_context("fork")
ELSEWHERE = {"process": 7, "host": "node2", "machine": "node2 m", "boot": "another boot", "token": "t", "beat": 3}


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "a.lock"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lease that dies in a second instead of a minute."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    yield


def leave(lock: Path, **holder: object) -> Path:
    lease = lock.with_suffix(".lease")
    lease.parent.mkdir(exist_ok=True)
    lease.write_text(json.dumps(ELSEWHERE | holder))
    return lease


def hold(lock: Path, holds: Event, until: Event) -> None:
    with exclusive_lock(lock):
        holds.set()
        until.wait(60)


def holder_of(lock: Path) -> tuple[multiprocessing.Process, Event]:
    holds, until = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(lock, holds, until))
    process.start()
    assert holds.wait(60)
    return process, until


def test_who_holds_it_is_told_to_who_waits_and_nothing_is_left_but_the_lock_file(lock: Path) -> None:
    process, until = holder_of(lock)
    told: list[str] = []
    threading.Timer(0.3, until.set).start()
    with exclusive_lock(lock, told.append) as lease:
        lease.check()
        with lock_if_free(lock) as free:
            assert not free
    process.join(60)
    assert told == [f"waiting for process {process.pid} on {os.uname().nodename}"]
    assert [path.name for path in lock.parent.iterdir()] == ["a.lock"]


def test_one_holder_at_a_time(lock: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(20):
            with exclusive_lock(lock):
                value = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(value + 1))

    processes = [FORK.Process(target=count) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert counter.read_text() == "80"


def test_a_dead_process_s_lock_is_free_at_once(lock: Path) -> None:
    process, _ = holder_of(lock)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert lock.with_suffix(".lease").exists()
    with lock_if_free(lock) as free:
        assert free


def test_a_stopped_process_keeps_its_lock_whatever_its_lease(lock: Path, impatient: None) -> None:
    process, until = holder_of(lock)
    os.kill(process.pid or 0, signal.SIGSTOP)
    try:
        for _ in range(3):
            time.sleep(0.5)
            with lock_if_free(lock) as free:
                assert not free
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)
        until.set()
        process.join(60)
    assert process.exitcode == 0


def test_letting_go_amid_a_sign_of_life_is_no_loss(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.0)
    for _ in range(300):
        with exclusive_lock(lock) as lease:
            pass
        assert not lease.lost
        assert not lease.path.exists()


def test_a_silent_holder_on_another_machine_is_taken_for_dead(lock: Path, impatient: None) -> None:
    leave(lock)
    told: list[str] = []
    with exclusive_lock(lock, told.append) as lease:
        lease.check()
    assert told == ["waiting for process 7 on node2, which is taken to be dead if it stays silent for 1 s"]
    assert not lock.with_suffix(".lease").exists()


def test_a_living_holder_on_another_machine_is_waited_for(lock: Path, impatient: None) -> None:
    lease = leave(lock)
    let_go = threading.Event()

    def live() -> None:
        for beat in range(30):
            lease.write_text(json.dumps(ELSEWHERE | {"beat": beat}))
            time.sleep(0.1)
        let_go.set()
        lease.unlink()

    threading.Thread(target=live).start()
    with lock_if_free(lock) as free:
        assert not free
    with exclusive_lock(lock):
        assert let_go.is_set()


def test_clocks_decide_nothing(lock: Path, impatient: None) -> None:
    lease = leave(lock)
    stop = threading.Event()

    def live() -> None:
        beat = 0
        while not stop.wait(0.1):
            beat += 1
            lease.write_text(json.dumps(ELSEWHERE | {"beat": beat}))
            os.utime(lease, (0, 0))

    thread = threading.Thread(target=live)
    thread.start()
    with lock_if_free(lock) as free:
        assert not free
    stop.set()
    thread.join()
    os.utime(lease, (2**32, 2**32))  # Silent now, with a time in the far future.
    with lock_if_free(lock) as free:
        assert free


def test_a_lease_from_before_a_restart_of_this_machine_is_dead_at_once(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_machine", lambda: {"machine": "here 1234", "boot": "today"})
    leave(lock, host="here", machine="here 1234", boot="yesterday")
    monkeypatch.setattr(locks, "_is_silent", lambda lease: pytest.fail("watched"))
    with lock_if_free(lock) as free:
        assert free


def test_who_was_taken_over_is_interrupted_and_told(lock: Path, impatient: None) -> None:
    # Ignored where tests run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(HelpsteerError, match=r"another machine has taken over the work on a, .*suspended"):
        with exclusive_lock(lock) as lease:
            leave(lock)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.05)
            pytest.fail("not interrupted")
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() < deadline, "not interrupted"
    assert lease.lost
    assert json.loads(lock.with_suffix(".lease").read_text()) == ELSEWHERE, (
        "the new holder's lease is not ours to remove"
    )


def test_a_lease_is_looked_at_when_it_matters(lock: Path) -> None:
    with exclusive_lock(lock) as lease:
        leave(lock)
        with pytest.raises(HelpsteerError, match="nothing was written"):
            lease.check()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"process": 1}', "\0\0"])
def test_a_damaged_lease_is_watched_and_then_taken(lock: Path, impatient: None, content: str) -> None:
    lease = leave(lock)
    lease.write_text(content)
    with lock_if_free(lock) as free:
        assert free


def test_without_kernel_locks_the_lease_alone_keeps_others_out(
    lock: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    process, until = holder_of(lock)
    with lock_if_free(lock) as free:
        assert not free
    threading.Timer(0.5, until.set).start()
    with exclusive_lock(lock) as lease:
        lease.check()
    process.join(60)
    assert process.exitcode == 0

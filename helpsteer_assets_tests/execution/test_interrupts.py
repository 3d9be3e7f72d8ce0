"""Signals end a run in words, wherever its main thread is."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpsteer_assets.execution.interrupts import ends_on_signal

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, sys, time
from helpsteer_assets.execution.interrupts import ends_on_signal

def raise_it(*_):
    raise RuntimeError("as Dagster does")

def leave(what):
    print(what, flush=True)
    time.sleep({leaving})
    print("left", flush=True)

with ends_on_signal(leave):
    # Dagster puts handlers of its own in place of whatever is there.
    signal.signal(signal.SIGINT, raise_it)
    try:
        print("ready", flush=True)
        {main}
    except RuntimeError:
        print("main thread goes on", flush=True)
print("main thread at its end", flush=True)
"""
WAITING = "time.sleep(60)"


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    for process in started:
        process.kill()


def as_in_a_terminal() -> None:
    """Where tests run in the background, or under nohup, these are ignored, and would stay so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    main: str = WAITING, leaving: float = 0.3, preexec_fn: Callable[[], object] = as_in_a_terminal, **how: object
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(main=main, leaving=leaving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=preexec_fn,
        **how,
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "told to end"),
        (signal.SIGHUP, "its terminal was closed"),
    ],
)
def test_each_signal_ends_the_process_in_words_whatever_the_main_thread_makes_of_it(number: int, words: str) -> None:
    process = start()
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert words in said and said.endswith("left\n")
    assert "main thread at its end" not in said
    assert process.returncode == 128 + number


def test_a_main_thread_that_is_deep_in_a_library_is_no_obstacle() -> None:
    process = start(main="__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")  # hours in C
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines() == ["told to end", "left"]
    assert process.returncode == 143


def test_the_second_signal_ends_it_at_once() -> None:
    process = start(leaving=600)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "told to end\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == ""
    assert process.returncode == 143


def test_processes_started_meanwhile_do_not_hear_ctrl_c() -> None:
    child = "import time; print('child', flush=True); time.sleep(3); print('unharmed', flush=True)"
    process = start(main=f"__import__('subprocess').run([sys.executable, '-c', {child!r}])", process_group=0)
    assert process.stdout is not None and process.stdout.readline() == "child\n"
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "unharmed" in said and "Traceback" not in said
    assert process.returncode == 130


def test_what_was_ignored_stays_ignored() -> None:
    process = start(main="time.sleep(1)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert said == "main thread at its end\n"
    assert process.returncode == 0


def test_ctrl_c_that_was_ignored_stays_so_whatever_dagster_does() -> None:
    """A stage that a script runs in its background would fail by it."""
    program = """
import time
from dagster._utils.interrupts import raise_interrupts_as
from helpsteer_assets.execution.interrupts import ends_on_signal

with ends_on_signal(lambda what: print(what, flush=True)):
    with raise_interrupts_as(RuntimeError):
        print("ready", flush=True)
        time.sleep(2)
print("at its end", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    said, _ = process.communicate(timeout=60)
    assert said == "at its end\n"
    assert process.returncode == 0


def test_where_ctrl_c_is_ignored_kill_still_ends_it_whatever_dagster_does() -> None:
    program = """
import time
from dagster._utils.interrupts import capture_interrupts
from helpsteer_assets.execution.interrupts import ends_on_signal

with ends_on_signal(lambda what: print(what, flush=True)):
    with capture_interrupts():
        pass
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # As a script starts what it ends with `&`.
        preexec_fn=lambda: (as_in_a_terminal(), signal.signal(signal.SIGINT, signal.SIG_IGN)),
    )
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == "told to end\n"
    assert process.returncode == 143


def test_it_ends_with_nobody_left_to_tell() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(main=WAITING, leaving=0)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
    )
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129


def test_afterwards_signals_are_what_they_were() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = threading.active_count()
    with ends_on_signal(lambda what: None):
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with ends_on_signal(lambda what: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]

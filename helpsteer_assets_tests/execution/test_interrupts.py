"""Signals end a run in words, wherever its main thread is."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpsteer_assets.execution.interrupts import ends_on_signal

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, subprocess, sys, time
from dagster._utils.interrupts import capture_interrupts, raise_interrupts_as
from helpsteer_assets.execution.interrupts import ends_on_signal

def leave(what):
    print(what, flush=True)
    time.sleep({leaving})
    print("left", flush=True)

with ends_on_signal(leave):
    try:
{main}
    except RuntimeError:
        print("main thread goes on", flush=True)
print("at its end", flush=True)
"""
AS_DAGSTER_DOES = """
with raise_interrupts_as(RuntimeError):
    print("ready", flush=True)
    {}
"""
WAITING = AS_DAGSTER_DOES.format("time.sleep(60)")
IN_C = AS_DAGSTER_DOES.format("__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")  # for hours

started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    for process in started:
        process.kill()


def ignoring(*numbers: int) -> Callable[[], None]:
    """As in a terminal but for these signals; where tests run in the background, others are ignored as well."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in numbers else signal.SIG_DFL)

    return prepare


def start(main: str = WAITING, leaving: float = 0.3, ignored: tuple[int, ...] = (), **how: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(main=textwrap.indent(main, " " * 8), leaving=leaving)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | how,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=ignoring(*ignored),
    )
    started.append(process)
    if process.stdout is not None:
        assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


@pytest.mark.parametrize(
    ("number", "main", "words"),
    [
        (signal.SIGINT, WAITING, "interrupted"),
        (signal.SIGTERM, WAITING, "told to end"),
        (signal.SIGTERM, IN_C, "told to end"),
        (signal.SIGHUP, WAITING, "its terminal was closed"),
    ],
)
def test_each_signal_ends_the_process_in_words_whatever_the_main_thread_does(
    number: int, main: str, words: str
) -> None:
    process = start(main)
    process.send_signal(number)
    code, said = end(process)
    assert code == 128 + number
    assert words in said and said[-1] == "left" and "at its end" not in said


def test_the_second_signal_ends_it_at_once() -> None:
    process = start(leaving=600)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "its terminal was closed\n"
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    assert code == 143 and "left" not in said


def test_what_was_ignored_stays_so_whatever_dagster_does() -> None:
    """A stage that a script runs in its background would fail by Ctrl-C."""
    process = start(AS_DAGSTER_DOES.format("time.sleep(2)"), ignored=(signal.SIGINT, signal.SIGHUP))
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert end(process) == (0, ["at its end"])


def test_afterwards_signals_are_what_they_were_and_outside_the_main_thread_they_stay_so() -> None:
    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def look() -> None:
        with ends_on_signal(lambda what: None):
            seen.append(handlers())

    before, seen = handlers(), []
    look()
    assert seen[0] != before and handlers() == before
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen[1] == before
    assert not [thread for thread in threading.enumerate() if thread.name in ("signals", "leaving")]

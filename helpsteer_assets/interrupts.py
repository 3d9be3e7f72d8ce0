"""Ctrl-C, `kill` and a closed terminal: said in words, and the process ends, as safely as in a crash.

Dagster makes an interrupt an exception in whatever code is running. A step would count it as a failure and be tried
again, and a library that is being imported would be left half-imported. So a thread answers it here, wherever the main
thread is.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "told to end",
    signal.SIGHUP: "its terminal was closed",
}


@contextmanager
def ends_on_signal(leave: Callable[[str], None]) -> Iterator[None]:
    """For the block, SIGINT, SIGTERM and SIGHUP call `leave` with what happened in words, and then end the process.

    The main thread goes on meanwhile, into whatever Dagster makes of the signal, but not beyond the block. The second
    signal ends the process at once. A signal that was ignored stays so (`nohup`). Without effect outside the main
    thread, which signals are handled in.
    """
    leaving = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # The kernel's signals reach the pipe whatever handlers Dagster puts in place of these.
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_answer, args=(reading, leave, leaving), name="signals", daemon=True).start()
    try:
        yield
    finally:
        if leaving.is_set():
            threading.Event().wait()  # for the end
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # which ends the thread


def _answer(reading: int, leave: Callable[[str], None], leaving: threading.Event) -> None:
    first = _next(reading)
    if first is None:
        os.close(reading)
        return
    leaving.set()

    def leave_in_words() -> None:
        # With the terminal gone, nobody can be told; ending is what matters.
        with suppress(Exception):
            leave(_SIGNALS[first])
        os._exit(128 + first)

    threading.Thread(target=leave_in_words, name="leaving", daemon=True).start()
    while (again := _next(reading)) is not None:
        os._exit(128 + again)


def _next(reading: int) -> signal.Signals | None:
    """The next of the signals; None at the end."""
    while number := os.read(reading, 1):
        if number[0] in _SIGNALS:
            return signal.Signals(number[0])
    return None

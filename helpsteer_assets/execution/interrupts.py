"""Ctrl-C, `kill` and a closed terminal: said in words, and the process ends, as safely as in a crash.

Dagster makes an interrupt an exception in whatever code is running. A step would count it as a failure and be tried
again, and a library that is being imported would be left half-imported. So a thread answers it here, wherever the main
thread is.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "told to end",
    signal.SIGHUP: "its terminal was closed",
}
_END = b"\0"
_RAISED = ("DagsterExecutionInterruptedError", "KeyboardInterrupt")


@contextmanager
def ends_on_signal(leave: Callable[[str], None]) -> Iterator[None]:
    """For the block, SIGINT, SIGTERM and SIGHUP call `leave` with what happened in words, and then end the process.

    The main thread goes on meanwhile, into whatever Dagster makes of the signal, but not beyond the block. The second
    signal ends the process at once. A signal that was ignored stays so (`nohup`). Without effect outside the main
    thread, which signals are handled in.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # Raised where Python cannot pass it on (in a weak reference's callback), Dagster's exception would be printed.
    shown = sys.unraisablehook
    sys.unraisablehook = lambda what: None if what.exc_type.__name__ in _RAISED else shown(what)
    heeded = {number: said for number, said in _SIGNALS.items() if before[number] is not signal.SIG_IGN}
    answering = threading.Thread(target=_answer, args=(reading, leave, heeded), name="signals", daemon=True)
    # A terminal sends Ctrl-C to every process of ours. Those that are started from here on inherit that they do not get
    # it, and print no traceback of their own; in this process, the answering thread does. Where it was ignored, no
    # thread may, since Dagster's handlers know of no ignoring.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, () if signal.SIGINT in heeded else {signal.SIGINT})
    answering.start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # The kernel's signals reach the pipe whatever handlers Dagster puts in place of these.
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number, handler in before.items():
        # Dagster makes SIGTERM's handler what SIGINT's is: ignored, in a script's background, where SIGINT is.
        if number == signal.SIGINT or handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        os.write(writing, _END)
        answering.join()  # for ever, if a signal came before the end
        sys.unraisablehook = shown
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.close(writing)
        os.close(reading)


def _answer(reading: int, leave: Callable[[str], None], heeded: dict[signal.Signals, str]) -> None:
    first = _next(reading, heeded)
    if first is None:
        return

    def leave_in_words() -> None:
        # With the terminal gone, nobody can be told; ending is what matters.
        with suppress(Exception):
            leave(heeded[first])
        os._exit(128 + first)

    threading.Thread(target=leave_in_words, name="leaving", daemon=True).start()
    while (again := _next(reading, heeded)) is None:
        pass  # The main thread is at its end, and waits.
    os._exit(128 + again)


def _next(reading: int, heeded: dict[signal.Signals, str]) -> signal.Signals | None:
    """The next of the signals that are heeded; None at the end of the block."""
    while (byte := os.read(reading, 1)) != _END:
        if byte[0] in heeded:
            return signal.Signals(byte[0])
    return None

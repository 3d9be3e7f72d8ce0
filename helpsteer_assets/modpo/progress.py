"""Progress of long work: in numbers, in a log, and as a bar on a terminal."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO

from tqdm import tqdm


class Progress(Protocol):
    """Called as long work advances; the caller decides what to show and how often.

    `done` of `total` units are finished; `numbers` are measurements at this point (loss, tokens per second, ...).
    """

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Report that `done` of `total` units are finished."""


def silent(done: int, total: int, **numbers: float) -> None:
    """Reports nothing."""


LOG_INTERVAL_S = 10.0
"""Seconds that lie between two lines of a log at least."""


class ProgressReporter:
    """A `Progress` that logs and draws. Use it as a context manager, which closes the bar."""

    def __init__(self, label: str, log: Callable[[str], None], terminal: TextIO | None = None) -> None:
        self._label = label
        self._log = log
        self._terminal = terminal
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None
        self._done, self._total = 0, 0
        self._logged = time.monotonic()

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Show where the work stands."""
        now = time.monotonic()
        if self._first is None or total != self._total or done < self._done:
            # The first call, or the next part of the work, which counts anew. The speed is measured from here: work
            # that an earlier attempt has done says nothing about it.
            self._first = (done, now)
            self._close()
        self._done, self._total = done, total
        measured = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        if self._terminal is not None:
            if self._bar is None:
                self._bar = tqdm(total=total, initial=done, desc=self._label, file=self._terminal, leave=False)
            self._bar.set_postfix_str(measured, refresh=False)
            self._bar.update(done - self._bar.n)
        if now - self._logged >= LOG_INTERVAL_S or done == total:
            self._logged = now
            parts = [f"{self._label}: {done} of {total}", measured, self._remaining(done, total, now)]
            self._log(", ".join(part for part in parts if part))

    def _remaining(self, done: int, total: int, now: float) -> str:
        assert self._first is not None  # set by the caller
        started_at, started = self._first
        if done in (total, started_at):
            return ""
        seconds = (now - started) / (done - started_at) * (total - done)
        return f"about {_duration(seconds)} left"

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

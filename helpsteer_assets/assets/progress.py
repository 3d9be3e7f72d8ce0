"""Progress of long work: in the Dagster log at sensible intervals, and as a bar where a person watches a terminal."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL_S = 10.0
"""At least so many seconds lie between two lines of a log."""


class ProgressReporter:
    """A `Progress` that logs and draws. Use it as a context manager, which closes the bar."""

    def __init__(self, label: str, log: Callable[[str], None], *, bar: bool | None = None) -> None:
        self._label = label
        self._log = log
        self._draw = sys.stderr.isatty() if bar is None else bar
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None
        self._logged = time.monotonic()

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Show where the work stands."""
        now = time.monotonic()
        if self._first is None:
            # What an earlier attempt had done says nothing about this one's speed.
            self._first = (done, now)
        measured = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        if self._draw:
            self._bar = self._bar or tqdm(total=total, initial=done, desc=self._label, file=sys.stderr, leave=False)
            self._bar.n = done
            self._bar.set_postfix_str(measured)
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
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

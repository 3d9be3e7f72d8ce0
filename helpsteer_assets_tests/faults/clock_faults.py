"""The system's clock is set back by an hour, or years ahead, between runs and during them."""

import datetime
import itertools
import os
import sys
import time
from functools import partial
from pathlib import Path

from helpsteer_assets_tests.faults.campaign import Trial, fault
from helpsteer_assets_tests.faults.homes import finished_home, forget, wait_or_end

JUMPS = {"an hour back": -3_600, "a day ahead": 86_400, "ten years ahead": 315_360_000, "to 1971": -1_700_000_000}
"""Seconds."""


def jump(seconds: int, after: int) -> None:
    """Set the clock, as this process sees it, once it has been read `after` times."""
    readings = itertools.count()
    seconds_now, nanoseconds_now, original = time.time, time.time_ns, datetime.datetime

    def offset() -> int:
        return seconds if next(readings) >= after else 0

    class AnyDatetime(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    class Clock(datetime.datetime, metaclass=AnyDatetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> "Clock":
            return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    time.time = lambda: seconds_now() + offset()
    time.time_ns = lambda: nanoseconds_now() + offset() * 10**9
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.startswith(("helpsteer_assets.", "dagster")) and getattr(module, "datetime", None) is original:
            module.datetime = Clock  # type: ignore[attr-defined]


@fault("a clock that jumps in mid-run")
def clock_jumps(trial: Trial) -> None:
    asset = trial.random.choice(trial.assets)
    trial.begin_with(asset)
    name, seconds = trial.random.choice(list(JUMPS.items()))
    after = round(2 ** trial.random.uniform(0, 12))
    trial.note = f"{name} at reading {after}, with what comes before {asset} there"
    command = trial.run("run", before=partial(jump, seconds, after))
    assert command.wait() == 0, command.output


@fault("files of another time")
def files_of_another_time(trial: Trial) -> None:
    """What an earlier run left bears times of another clock."""
    finished_home(trial)
    asset = trial.random.choice(trial.assets)
    forget(trial, asset)
    name, seconds = trial.random.choice(list(JUMPS.items()))
    trial.note = f"files of {name}, {asset} to be made"
    for path in [trial.home, *trial.home.rglob("*")]:
        shift(path, seconds)
    status = trial.run("status")
    assert status.wait() == 0, status.output
    assert status.output.count("complete") == sum(key[0] != asset for key in trial.undisturbed.fingerprints), (
        status.output
    )


def shift(path: Path, seconds: int) -> None:
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns + seconds * 10**9, times.st_mtime_ns + seconds * 10**9))


@fault("two writers with different clocks")
def two_clocks(trial: Trial) -> None:
    """A lock of a living process is not taken for a dead one's because its files look old."""
    asset, partition = trial.random.choice(list(trial.undisturbed.fingerprints))
    trial.begin_with(asset)
    name, seconds = trial.random.choice(list(JUMPS.items()))
    trial.note = f"the second's clock is {name}; it starts while the first makes {asset} {partition}"
    first = trial.start("run")
    wait_or_end(trial, first, trial.partial(asset, partition).exists, f"{asset} to begin")
    second = trial.start("run", before=partial(jump, seconds, 0))
    assert first.wait() == 0, first.output
    assert second.wait() == 0, second.output

"""The moments of a run at which something may happen to it: before each of its file operations in the home.

Python's audit events tell of every file that is opened for writing, made, renamed or removed; fsync, which has no such
event, is wrapped. Dagster's own files are left out. An operation belongs to the artifact that is being made.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE_ALL = "the start"
"""What operations belong to that come before the first artifact is begun."""


@dataclass(frozen=True)
class Moment:
    """Before operation `number` (0, 1, ...) of those made for an artifact, or `delay` seconds after that."""

    artifact: str
    """`<asset> <partition>`, or BEFORE_ALL."""
    number: int
    delay: float


def note_operations(home: Path, file: Path) -> None:
    """From now on, write the artifact of each operation of this process into `file`, one a line."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _watch(home, lambda artifact: os.write(descriptor, f"{artifact}\n".encode()))


def act_at(home: Path, moment: Moment, action: Callable[[], object]) -> None:
    """Do something in this process when a moment has come."""
    before = 0

    def reached(artifact: str) -> None:
        nonlocal before
        if artifact != moment.artifact:
            return
        if before == moment.number:
            if moment.delay:
                threading.Timer(moment.delay, action).start()
            else:
                action()
        before += 1

    _watch(home, reached)


def kill() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power_at(home: Path, moment: Moment, seed: int) -> None:
    """At a moment, lose what this process wrote and did not sync, or some of it, and die."""
    begun, chance = time.time_ns(), random.Random(seed)
    synced: dict[int, tuple[int, int]] = {}
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = (status.st_mtime_ns, status.st_size)

    def lose_and_die() -> None:
        for path in sorted(path for path in home.rglob("*") if path.is_file()):
            with suppress(FileNotFoundError):  # the other threads go on
                lose(path)
        kill()

    def lose(path: Path) -> None:
        status = path.stat()
        unsynced = status.st_mtime_ns >= begun and synced.get(status.st_ino) != (status.st_mtime_ns, status.st_size)
        if unsynced and not path.is_relative_to(home / "dagster") and chance.random() < 0.7:
            os.truncate(path, chance.randint(0, status.st_size))

    os.fsync = syncing
    act_at(home, moment, lose_and_die)


def _watch(home: Path, reached: Callable[[str], object]) -> None:
    """Call `reached` with the artifact before each operation in the home."""
    artifact, busy = BEFORE_ALL, threading.local()

    def tell(path: Path) -> None:
        nonlocal artifact
        if not path.is_relative_to(home) or path.is_relative_to(home / "dagster") or getattr(busy, "telling", False):
            return
        parts = path.relative_to(home).parts
        if len(parts) > 3 and parts[0] == "artifacts":
            artifact = f"{parts[1]} {parts[2]}"
        busy.telling = True  # what `reached` does itself is no operation of the run
        try:
            reached(artifact)
        finally:
            busy.telling = False

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                tell(Path(arguments[0]))
        elif event == "os.rename":
            tell(Path(os.fsdecode(arguments[1])))
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            folder = arguments[-1]  # shutil.rmtree names a file by the descriptor of its folder
            tell(Path(_opened(folder) if folder >= 0 else "", os.fsdecode(arguments[0])))

    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        tell(_opened(descriptor))
        fsync(descriptor)

    os.fsync = syncing
    sys.addaudithook(audited)


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()

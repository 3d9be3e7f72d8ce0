"""Every file operation of a process in its home, one after the other: what to die before, or in the middle of.

Python's audit events tell of each file that is opened for writing, made, renamed or removed; what they do not tell of
(fsync, and the libraries that write in C++) is wrapped here. Dagster's own files are left out.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

INSIDE = ("save", "serialize_file", "write_table", "connect")
"""Operations that take a while in C++, so that there is a middle of them to die in."""
MIDDLE_SECONDS = 0.02


def trace(home: Path, file: Path) -> None:
    """Note every operation in `file`, a JSON list a line: artifact being made, operation, path in the home."""
    from helpsteer_assets_tests.faults import campaign

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(operation: str, path: Path) -> None:
        line = json.dumps([campaign.being_made, operation, str(path.relative_to(home))])
        os.write(descriptor, line.encode() + b"\n")

    _watch(home, note)


def die(home: Path, artifact: str, number: int, seed: int, power_cut: bool) -> None:
    """Die by SIGKILL before operation `number` (0, 1, ...) of those while `artifact` is made, or in its middle.

    With `power_cut` the machine dies: of what was not synced, the disk holds some part, or all.
    """
    from helpsteer_assets_tests.faults import campaign

    chance, begun, seen = random.Random(seed), time.time_ns(), 0
    synced: dict[int, tuple[int, int]] = {}

    def kill() -> NoReturn:
        if power_cut:
            _lose_unsynced(home, begun, synced, chance)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def count(operation: str, path: Path) -> None:
        nonlocal seen
        if campaign.being_made != artifact:
            return
        if seen == number:
            if operation not in INSIDE or chance.random() < 0.3:
                kill()
            threading.Timer(chance.uniform(0, MIDDLE_SECONDS), kill).start()
        seen += 1

    _watch(home, count, lambda status: synced.update({status.st_ino: (status.st_mtime_ns, status.st_size)}))


def _lose_unsynced(home: Path, begun: int, synced: dict[int, tuple[int, int]], chance: random.Random) -> None:
    """Cut files that were written in this process and not synced since; the file system would at best keep them."""
    for path in sorted(home.rglob("*")):
        status = path.stat()
        written = status.st_mtime_ns >= begun and synced.get(status.st_ino) != (status.st_mtime_ns, status.st_size)
        if path.is_file() and written and not path.is_relative_to(home / "dagster") and chance.random() < 0.7:
            os.truncate(path, chance.randint(0, status.st_size))


def _watch(
    home: Path, reached: Callable[[str, Path], None], synced: Callable[[os.stat_result], object] = lambda _: None
) -> None:
    """Call `reached` before each operation in the home, and `synced` after a file was."""
    import duckdb
    import pyarrow.parquet
    import safetensors.torch
    import torch

    busy = threading.local()

    def tell(operation: str, path: Path) -> None:
        inside = path.is_relative_to(home) and not path.is_relative_to(home / "dagster")
        if inside and not getattr(busy, "telling", False):
            busy.telling = True  # what `reached` does itself is no operation of the process
            try:
                reached(operation, path)
            finally:
                busy.telling = False

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                tell(event, Path(arguments[0]))
        elif event == "os.rename":
            tell(event, Path(os.fsdecode(arguments[1])))
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            # shutil.rmtree names a file by the descriptor of its folder.
            folder = arguments[-1]
            tell(event, Path(_opened(folder) if folder >= 0 else "", os.fsdecode(arguments[0])))

    sys.addaudithook(audited)

    def wrap(owner: Any, name: str, path_at: int) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if len(arguments) > path_at and isinstance(arguments[path_at], str | Path):
                tell(name, Path(arguments[path_at]))
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    wrap(torch, "save", 1)
    wrap(safetensors.torch, "serialize_file", 1)
    wrap(pyarrow.parquet, "write_table", 1)
    wrap(duckdb, "connect", 0)
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        tell("fsync", _opened(descriptor))
        fsync(descriptor)
        synced(os.fstat(descriptor))

    os.fsync = syncing


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()

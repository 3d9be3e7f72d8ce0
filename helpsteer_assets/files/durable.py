"""Writes that survive a crash, safe names, and room on the disk."""

import glob
import os
import shutil
import socket
from pathlib import Path

from helpsteer_assets.errors import HelpsteerError


def checked_name(kind: str, name: str) -> str:
    """`name` itself. Raises HelpsteerError, which names `kind` and the value, if it cannot be a file's name."""
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise HelpsteerError(
            f"{kind} {name!r} cannot be a folder's name: it must not be empty, start with a dot, or contain / or \\"
        )
    return name


def sync(path: Path) -> None:
    """Waits until the file's or folder's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader, also after a crash at any moment, sees the whole old or new content."""
    mine = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f"{glob.escape(mine)}*"):
        if not Path("/proc", leftover.name.removeprefix(mine)).exists():  # its process died while writing it
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{mine}{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def free_space(path: Path) -> tuple[Path, int]:
    """The nearest folder of the path that exists, and the free bytes of its disk."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return existing, shutil.disk_usage(existing).free


def size_in_words(count: int) -> str:
    """The number of bytes for people, such as `1.2 GB`."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} bytes"

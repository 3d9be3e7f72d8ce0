"""What the store and the warehouse share about files: safe names, durable writes, locks, readable errors."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helpsteer_assets.errors import HelpsteerError

_REMEDIES = {
    errno.ENOSPC: "free some space and run again: finished work is kept",
    errno.EDQUOT: "free some space and run again: finished work is kept",
    errno.EACCES: "make it accessible, or set HELPSTEER_HOME to a folder that is",
    errno.EPERM: "make it accessible, or set HELPSTEER_HOME to a folder that is",
    errno.EROFS: "make it writable, or set HELPSTEER_HOME to a folder that is",
    errno.EEXIST: "a file stands where a folder must be: move it away, or set HELPSTEER_HOME to another folder",
    errno.ENOTDIR: "a file stands where a folder must be: move it away, or set HELPSTEER_HOME to another folder",
}


@contextmanager
def readable_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a HelpsteerError that names what could not be done, and the path.

    Example: `cannot write /data/home/artifacts: No space left on device; free some space and run again`.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and the file system")
        where = error.filename if isinstance(error.filename, str) else path
        raise HelpsteerError(f"cannot {action} {where}: {error.strerror or error}; {remedy}") from error


def checked_name(kind: str, name: str) -> str:
    """`name`, if it can be one folder or file name; HelpsteerError, which names `kind` and the value, if not."""
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
    """Writes a text file such that a reader, or a crash at any moment, meets the old or the new content whole."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
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


def _acquired(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock file `path` for the block; waits without bound for another holder, thread or process.

    The kernel releases it when the holder dies, however it dies. The file stays: removing it would let two processes
    hold locks of two files of the same name. `on_wait` is told once, before waiting, who holds it.
    """
    with readable_os_errors("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        with readable_os_errors("lock", path):
            if not _acquired(file.fileno()):
                if on_wait is not None:
                    on_wait(f"waiting for {_holder(path)}")
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            file.truncate(0)
            file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        try:
            yield
        finally:
            # Closing alone would leave the lock with a forked child that still has the descriptor.
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Like `exclusive_lock`, but never waits: yields False, without the lock, where another holds it."""
    with readable_os_errors("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        yield _acquired(file.fileno())


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The holder has the lock and has not yet written its name.
        return "another process"

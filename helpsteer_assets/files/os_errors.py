"""Errors of the operating system, and of libraries that read and write files, in words that say what to do.

The command line, a stage's step and a rank of a training use it; all other code lets such errors through.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.durable import free_space

_REMEDIES = {
    errno.ENOSPC: "free some space and run again: finished work is kept",
    errno.EDQUOT: "free some space and run again: finished work is kept",
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.EROFS: "make it writable",
    errno.EEXIST: "a file stands where a folder must be: move it away",
    errno.ENOTDIR: "a file stands where a folder must be: move it away",
    errno.EISDIR: "a folder stands where a file must be: move it away",
    errno.EIO: "check the file system",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}
_WORDS = {
    "no space left": errno.ENOSPC,
    "disk is full": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "permission denied": errno.EACCES,
    "read-only file system": errno.EROFS,
    "input/output error": errno.EIO,
    "file too large": errno.EFBIG,
}
"""How safetensors, pyarrow, DuckDB and SQLite say it."""
_VAGUE = (
    "pytorchstreamwriter",
    "unexpected pos",
    "disk i/o error",
    "unable to open database file",
    "readonly database",
)
"""Messages of torch and SQLite that name no reason."""
_NEARLY_FULL = 2**20
"""With fewer bytes free, a write that failed without a reason is taken to have failed for the full disk."""
_LOCKED = ("locking protocol", "database is locked")
"""Messages of SQLite, which only Dagster's records are kept in, about another process that keeps its lock."""


@contextmanager
def readable_errors(home: Path) -> Iterator[None]:
    """Turns errors of files inside the block into a HelpsteerError that names the file, or else the home.

    All other errors go through: those of the network, say, and those that a library explains in its own way.
    Example: `cannot read or write /data/home/artifacts: No space left on device; free some space and run again`.
    """
    try:
        yield
    except HelpsteerError:
        raise
    except Exception as error:
        if (words := _words(error, home)) is None:
            raise
        raise HelpsteerError(words) from error


def _words(error: Exception, home: Path) -> str | None:
    said = str(error).lower()
    if any(words in said for words in _LOCKED):
        return (
            f"{home / 'dagster'}: another process, which may be a stopped one, keeps a database of Dagster's records "
            "locked: let it go on (kill -CONT) or end it, and run the same command again"
        )
    if isinstance(error, OSError):
        named = isinstance(error.filename, str)
        if not (named or error.errno in _REMEDIES or isinstance(error, FileNotFoundError)):
            return None
        where = error.filename2 or error.filename if named else str(home)  # the second: where a file was to go
        number, reason = error.errno, error.strerror or str(error)
    else:
        number = next((number for words, number in _WORDS.items() if words in said), None) or _guess(said, home)
        if number is None:
            return None
        where, reason = str(home), os.strerror(number)
    remedy = _REMEDIES.get(number or 0, "check the path and the file system")
    elsewhere = number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
    if elsewhere and Path(where).absolute().is_relative_to(home):
        remedy += ", or set HELPSTEER_HOME to another folder"
    return f"cannot read or write {where}: {reason}; {remedy}"


def _guess(said: str, home: Path) -> int | None:
    """The reason of a message that names none, by the state of the home's disk; None for any other message."""
    if not any(words in said for words in _VAGUE):
        return None
    folder, free = free_space(home)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return errno.EROFS
    if free < _NEARLY_FULL:
        return errno.ENOSPC
    if "readonly database" in said or "unable to open" in said or not os.access(folder, os.W_OK):
        return errno.EACCES
    return errno.EIO

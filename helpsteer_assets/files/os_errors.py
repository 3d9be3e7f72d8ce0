"""Errors of the operating system, and of libraries that write files, in words that say what to do."""

import errno
import os
from collections.abc import Iterator
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


_WORDS = {
    "no space left": errno.ENOSPC,
    "disk is full": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "permission denied": errno.EACCES,
    "read-only file system": errno.EROFS,
    "input/output error": errno.EIO,
    "file too large": errno.EFBIG,
}
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


@contextmanager
def readable_library_errors(folder: Path) -> Iterator[None]:
    """Turns errors of libraries that cannot write to `folder` into a HelpsteerError; lets all others through.

    safetensors, torch, pyarrow, DuckDB and SQLite each have their own words for it, and torch gives no reason.
    """
    try:
        yield
    except HelpsteerError:
        raise
    except Exception as error:
        number = _reason(error, folder)
        if number is None:
            raise
        with readable_os_errors("write", folder):
            named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else str(folder)
            raise OSError(number, os.strerror(number), named) from error


def _reason(error: Exception, folder: Path) -> int | None:
    if isinstance(error, OSError) and error.errno in (*_WORDS.values(), *_REMEDIES):
        # pyarrow gives no filename; its message names it.
        named = isinstance(error.filename, str) and Path(error.filename).absolute().is_relative_to(folder)
        inside = named or str(folder) in str(error)
        return error.errno if inside or error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    said = str(error).lower()
    for words, number in _WORDS.items():
        if words in said:
            return number
    if not any(words in said for words in _VAGUE):
        return None
    volume = os.statvfs(folder)
    if volume.f_flag & os.ST_RDONLY:
        return errno.EROFS
    if volume.f_bavail * volume.f_frsize < _NEARLY_FULL:
        return errno.ENOSPC
    if "readonly database" in said or "unable to open" in said or not os.access(folder, os.W_OK):
        return errno.EACCES
    return errno.EIO

"""Digests of files, and JSON that holds its own digest, so that a flipped bit is noticed before the content is used."""

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.durable import write_atomically

SEAL = "sha256"
"""The key of the digest; it covers all other keys."""
_SETTLED_NS = 2_000_000_000
"""Age from which a file's time identifies its content: file systems count time in steps of up to two seconds."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int | str]]:
    """Size (`bytes`) and `sha256` of files, by their path relative to the folder. Raises OSError."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its own digest; numbers must be finite. Tuples become lists, as JSON reads them back."""
    content = json.loads(json.dumps(content, allow_nan=False))
    return {**content, SEAL: _digest(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether the content, as read back from JSON, is what was sealed."""
    try:
        return content.get(SEAL) == _digest({key: value for key, value in content.items() if key != SEAL})
    except ValueError:  # a number that is not finite, which nothing sealed holds
        return False


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def content_digest(path: Path, cache: Path | None = None) -> str:
    """SHA-256, 64 hex digits, over the names and contents of a file or of all files under a folder.

    A folder's own name and place do not matter; the names inside it do, and so does a single file's name. Hidden files
    and folders (`.git`, `.cache`) are left out, and so are pipes, sockets and devices.

    Args:
        path: file or folder.
        cache: JSON file that keeps each file's digest by absolute path, size and modification time, so that an
            unchanged file is not read again. It may be missing or damaged, and several processes may share it.

    Raises HelpsteerError where the path does not exist, holds no file, or cannot be read.
    """
    path = path.absolute()
    remembered = _read_cache(cache) if cache else {}
    learnt: dict[str, list[object]] = {}
    total = hashlib.sha256()
    count = 0
    try:
        for file in _visible_files(path):
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                continue  # reading it might never end
            known = remembered.get(str(file))
            if known and known[:2] == [status.st_size, status.st_mtime_ns]:
                digest = str(known[2])
            else:
                digest = file_sha256(file)
                # A file written just now may be written again within the same tick of its modification time.
                if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
                    learnt[str(file)] = [status.st_size, status.st_mtime_ns, digest]
            name = file.name if file == path else file.relative_to(path).as_posix()
            total.update(os.fsencode(name) + b"\x00" + digest.encode())
            count += 1
    except FileNotFoundError as error:
        raise HelpsteerError(f"{error.filename} does not exist: check the path") from error
    except OSError as error:
        raise HelpsteerError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    if not count:
        raise HelpsteerError(f"{path} holds no files: point at the folder that holds them")
    if cache and learnt:
        _write_cache(cache, learnt)
    return total.hexdigest()


def _visible_files(path: Path) -> Iterator[Path]:
    """The file itself, or a folder's files in a stable order, links followed and hidden names left out."""
    if not path.is_dir():
        yield path
        return
    files: list[Path] = []

    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=stop):
        here = Path(os.path.realpath(folder))
        # A link to a folder above would never end.
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not here.is_relative_to(os.path.realpath(Path(folder, name)))
        ]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    yield from sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _read_cache(cache: Path) -> dict[str, list[object]]:
    """The entries of the cache file; empty where it is missing or damaged."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or not is_intact(content):
        return {}  # a wrong digest would make every artifact out of date
    del content[SEAL]
    return content


def _write_cache(cache: Path, learnt: dict[str, list[object]]) -> None:
    """Add entries to those that other processes wrote. Errors are ignored: without the cache all is only slower."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(sealed(_read_cache(cache) | learnt), indent=0, sort_keys=True))

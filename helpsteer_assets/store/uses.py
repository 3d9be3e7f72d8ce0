"""Which artifacts living processes make or read, so that cleaning up leaves them alone.

    <home>/locks/uses.lock              held while a process registers, and while gc decides and sets aside
    <home>/locks/uses/<id>.lock         held by the process for as long as it uses the artifacts
    <home>/locks/uses/<id>.json         the artifacts: [asset, partition, fingerprint], ...

The first lock makes the two exclude each other: what a process has registered before it looks is not deleted under it,
and what was deleted it does not find. A killed process leaves its files, without anybody holding the lock.
"""

import json
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.durable import write_atomically
from helpsteer_assets.files.os_errors import readable_os_errors
from helpsteer_assets.store.locks import exclusive_lock, lock_if_free

ArtifactName = tuple[str, str, str]
"""Asset, partition and fingerprint."""


@contextmanager
def using(home: Path, artifacts: Collection[ArtifactName]) -> Iterator[None]:
    """Keep gc away from these artifacts, finished, begun or not there yet, for the block.

    Raises HelpsteerError for a file system that refuses.
    """
    lock = _folder(home) / f"{uuid.uuid4().hex}.lock"
    listing = lock.with_suffix(".json")
    with ExitStack() as stack:
        # The lock goes last, for a list without a lock counts as a dead process's.
        stack.callback(_forget, lock)
        with registering(home):
            stack.enter_context(exclusive_lock(lock))
            stack.callback(_forget, listing)
            with readable_os_errors("write", listing):
                write_atomically(listing, json.dumps(sorted(artifacts)))
        yield


@contextmanager
def registering(home: Path) -> Iterator[None]:
    """Nobody else registers, and nothing is deleted, for the block: keep it short."""
    with exclusive_lock(home / "locks" / "uses.lock"):
        yield


def in_use(home: Path) -> set[ArtifactName]:
    """The artifacts that living processes use. Changes nothing, and works in a home that cannot be written to.

    Raises HelpsteerError where a living process's list cannot be read.
    """
    found: set[ArtifactName] = set()
    for listing in _files(home):
        if listing.suffix == ".json" and not listing.name.startswith(".") and is_held(listing.with_suffix(".lock")):
            try:
                found |= {(asset, partition, value) for asset, partition, value in json.loads(listing.read_bytes())}
            except FileNotFoundError:
                continue  # it has just finished
            except (OSError, ValueError, TypeError) as error:
                raise HelpsteerError(
                    f"{listing} cannot be read, so nobody knows what its process uses ({error}): wait until that "
                    "process has ended"
                ) from error
    return found


def left_behind(home: Path) -> list[Path]:
    """Files of processes that died; certain only while `registering` is held."""
    return [path for path in _files(home) if not is_held(path.with_suffix(".lock"))]


def bury_dead(home: Path) -> None:
    """Remove the files of processes that died."""
    if _folder(home).is_dir():
        with registering(home):
            for path in left_behind(home):
                _forget(path)


def _files(home: Path) -> list[Path]:
    folder = _folder(home)
    with readable_os_errors("read", folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []


def is_held(lock: Path) -> bool:
    """Whether a living process holds the lock, or may hold it, in a home that cannot be written to. Makes no file."""
    try:
        if not lock.exists():
            return False
        with lock_if_free(lock) as free:
            return not free
    except (HelpsteerError, OSError):
        return True


def _folder(home: Path) -> Path:
    return home / "locks" / "uses"


def _forget(path: Path) -> None:
    # What cannot be removed is as a killed process leaves it.
    with suppress(OSError):
        path.unlink(missing_ok=True)

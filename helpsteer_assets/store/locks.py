"""Locks between processes and threads, by the kernel: it lets go of a lock however its holder ends.

    <home>/locks/<asset>/<partition>/<fingerprint>.lock   held by the one process that makes the artifact
    <home>/locks/home.lock                                shared by all that use the home; held alone by `gc --delete`
    <home>/locks/running/<name>.lock                      held by a process that uses the home; says what it does

The file of a lock says who holds it, and stays when the lock is let go. A file system without working locks is refused.
"""

import errno
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from helpsteer_assets.errors import HelpsteerError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of flock(2) on a file system that has no locks."""
_working_devices: set[int] = set()
"""File systems on which this process has seen that a locked file cannot be locked again."""


class HeldLock:
    """A lock file of this process."""

    def __init__(self, path: Path, doing: str = "") -> None:
        self.path = path
        self._doing = doing
        self._file: os.stat_result | None = None
        # A lock that exists by its file alone (the library's fallback) would outlive a killed process.
        self._lock = FileLock(
            path, thread_local=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=self._sign
        )

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; False where another thread or process holds it and is not to be waited for.

        Raises HelpsteerError for a file system that has no working locks, and OSError for one that refuses.
        """
        with _readable_lock_errors(self.path):
            try:
                self._lock.acquire(blocking=wait)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        """Let the lock go. A forked child does not keep it: the library closes the child's copy."""
        self._lock.release()

    def check(self) -> None:
        """Raise HelpsteerError where the lock's file was removed or replaced: it keeps nobody out any more."""
        assert self._file is not None
        if self.path.exists() and os.path.samestat(self.path.stat(), self._file):
            return
        raise HelpsteerError(
            f"{self.path} was removed or replaced while this process held that lock, so another process may be doing "
            "the same work; nothing was finished. Leave the folder `locks` of a home alone, and run the same command "
            "again: it goes on from what was begun"
        )

    def _sign(self, descriptor: int) -> None:
        """Write into the locked file who holds it."""
        self._file = os.fstat(descriptor)
        if self._file.st_dev not in _working_devices:
            with self.path.open("r+b") as second:
                if lock_descriptor(second.fileno(), blocking=False):
                    raise _without_locks(self.path, "a file that is locked can be locked a second time")
            _working_devices.add(self._file.st_dev)
        holder = {"process": os.getpid(), "host": socket.gethostname()}
        if self._doing:
            holder |= {"doing": self._doing, "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


@contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[HeldLock]:
    """Hold the lock `path` for the block; waits without bound for another holder, thread or process.

    `on_wait` is told once, before waiting, who holds the lock. Raises as `HeldLock.acquire`.
    """
    lock = HeldLock(path)
    if not lock.acquire(wait=False):
        on_wait(f"waiting for {_holder(path)}")
        lock.acquire(wait=True)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Like `exclusive_lock`, but yields False at once, without the lock, where another thread or process holds it."""
    lock = HeldLock(path)
    if not lock.acquire(wait=False):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def home_in_use(home: Path, doing: str, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[str]:
    """Keep `gc --delete` out of the home for the block. Any number of processes can use a home at once.

    Args:
        home: the home. One that is there and cannot be written to is used without a lock.
        doing: what the block does, for people.
        on_wait: is told once if `gc --delete` has to be waited for.

    Yields the name of the lock that this process holds meanwhile (`process_lock`).
    """
    name = uuid.uuid4().hex
    if home.is_dir() and not os.access(home, os.W_OK):
        yield name
        return
    with ExitStack() as stack:
        stack.enter_context(_home_lock(home, fcntl.LOCK_SH, on_wait))
        lock = HeldLock(process_lock(home, name), doing)
        lock.acquire(wait=True)
        stack.callback(lock.release)
        stack.callback(lock.path.unlink, missing_ok=True)
        yield name


@contextmanager
def home_alone(home: Path) -> Iterator[None]:
    """Keep all others from using the home for the block.

    Raises HelpsteerError at once, with what they do, where others use it.
    """
    with _home_lock(home, fcntl.LOCK_EX, None):
        yield


def process_lock(home: Path, name: str) -> Path:
    """The lock of a process that uses the home."""
    return home / "locks" / "running" / f"{name}.lock"


def remove_locks_of_dead_processes(home: Path) -> None:
    """Remove what processes that used the home left behind when they were killed."""
    for path in process_lock(home, "*").parent.glob("*.lock"):
        with lock_if_free(path) as is_dead:
            if is_dead:
                path.unlink(missing_ok=True)


@contextmanager
def _home_lock(home: Path, kind: int, on_wait: Callable[[str], None] | None) -> Iterator[None]:
    path = home / "locks" / "home.lock"
    with _readable_lock_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # NFS wants a file that was opened for reading and writing
    with file:
        with _readable_lock_errors(path):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise HelpsteerError(f"the home {home} is in use: {_users(home)}. Wait for its end") from None
                on_wait(f"waiting for the removal of files from the home {home}")
                fcntl.flock(file, kind)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave the lock with a forked child


def _users(home: Path) -> str:
    remove_locks_of_dead_processes(home)
    return "; ".join(sorted(map(_holder, process_lock(home, "*").parent.glob("*.lock")))) or "another `gc --delete`"


def _holder(path: Path) -> str:
    """Who holds the lock, for people, as its file says."""
    try:
        holder = json.loads(path.read_bytes())
        named = f"process {holder['process']} on {holder['host']}"
        return f"{named} ({holder['doing']}, since {holder['since']})" if "doing" in holder else named
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


@contextmanager
def _readable_lock_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise _without_locks(path, os.strerror(error.errno)) from error


def _without_locks(path: Path, reason: str) -> HelpsteerError:
    return HelpsteerError(
        f"cannot lock {path}: the file system has no working locks ({reason}), and two processes could write the same "
        "result; set HELPSTEER_HOME to a folder on a local disk, or on a file system that has them (NFS 4, or Lustre "
        "mounted with -o flock)"
    )

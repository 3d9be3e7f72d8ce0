"""Locks between processes, on one machine and across machines that share a file system.

    <name>.lock     locked by flock(2) for as long as its holder lives: the kernel lets go of it however the holder dies
    <name>.lease    who holds it, with a counter that the holder raises every few seconds; gone when it lets go

On one machine flock alone decides, at once. Some shared file systems do not carry it from machine to machine, so a lock
is held only by who made its lease too, which is one atomic operation everywhere. A lease that is left over is judged by
its counter: a holder on another machine (or before this one's restart) that has not raised it for `LEASE_SECONDS` is
dead. These seconds are the watcher's own, so that clocks that jump, or differ, decide nothing.
"""

import _thread
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.os_errors import readable_os_errors

LEASE_SECONDS = 60.0
"""Without a sign of life for so long, a holder on another machine is dead."""
BEAT_SECONDS = 10.0
"""How often a holder gives one."""
_WATCH_SECONDS = 1.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

logger = logging.getLogger(__name__)


class Lease:
    """A lock that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = False
        """Whether another machine took it over, having seen no sign of life."""
        self._holder = {"process": os.getpid(), "host": socket.gethostname(), **_machine(), "token": uuid.uuid4().hex}
        self._beat = 0
        self._released = threading.Event()
        self._sign = threading.Lock()
        """Held for a sign of life and for letting go: a lease that we are removing is not one that was taken over."""

    def check(self) -> None:
        """Raise HelpsteerError where another process has taken the lock over: what it guards is no longer ours."""
        if self.lost or not self._is_ours():
            self.lost = True
            raise HelpsteerError(
                f"another machine has taken over the work on {self.path.stem}, since this process gave no sign of life "
                f"for {LEASE_SECONDS:g} s (was it suspended?); nothing was written, and the work goes on there"
            )

    def _make(self) -> bool:
        """Make the lease file; False where there is one."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self._text())
                file.flush()
                os.fsync(file.fileno())  # What a power cut leaves unreadable would be waited for as another machine's.
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _text(self) -> str:
        return json.dumps(self._holder | {"beat": self._beat})

    def _keep(self) -> None:
        """Give signs of life until released."""
        # Whoever ignores Ctrl-C blocks it where he can, and this thread would hear of it for him.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while not self._released.wait(BEAT_SECONDS):
            with self._sign:
                if self._released.is_set():
                    return
                try:
                    if not self._is_ours():
                        self.lost = True
                        logger.error("%s was taken over by another machine", self.path)
                        _thread.interrupt_main()  # Two would write into one folder.
                        return
                    self._beat += 1
                    # In place: a file that replaced this one would bring a taken-over lease back.
                    with self.path.open("r+") as file:
                        file.write(self._text())
                except OSError as error:
                    logger.warning("no sign of life can be given in %s: %s", self.path, error)

    def _is_ours(self) -> bool:
        if (content := _bytes(self.path)) is None:
            return False
        # What cannot be read is being written, by our own heartbeat: others replace the file.
        return _parsed(content).get("token", self._holder["token"]) == self._holder["token"]

    def _release(self) -> None:
        with self._sign:
            self._released.set()
            if self._is_ours():
                self.path.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """Holds the lock `path` (`<name>.lock`) for the block; waits without bound for another holder, thread or process.

    The lock file stays: removing it would let two processes hold locks of two files of the same name. `on_wait` is told
    once, before waiting, who holds it.
    """
    with _locked(path, wait=True, on_wait=on_wait) as lease:
        assert lease is not None  # it waited
        yield lease


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Like `exclusive_lock`, but yields False, without the lock, where a living process holds it.

    Returns at once, unless a lease was left by another machine or before a restart: that is watched for
    `LEASE_SECONDS`.
    """
    with _locked(path, wait=False, on_wait=None) as lease:
        yield lease is not None


@contextmanager
def _locked(path: Path, *, wait: bool, on_wait: Callable[[str], None] | None) -> Iterator[Lease | None]:
    told = False

    def tell(lease: Path, why: str = "") -> None:
        nonlocal told
        if on_wait is not None and not told:
            on_wait(f"waiting for {_holder(lease)}{why}")
            told = True

    lease = Lease(path.with_suffix(".lease"))
    with readable_os_errors("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        with readable_os_errors("lock", path):
            reaches_here = _flock(file.fileno(), lambda: tell(lease.path), wait=wait)
            held = reaches_here is not None and _take(lease, reaches_here, tell, wait=wait)
        if not held:
            yield None
            return
        threading.Thread(target=lease._keep, name=f"lease of {path.name}", daemon=True).start()
        try:
            yield lease
        except BaseException:
            if lease.lost:  # What was raised is the interrupt.
                lease.check()
            raise
        finally:
            lease._release()
            # Closing alone would leave the lock with a forked child that still has the descriptor.
            if reaches_here:
                fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _flock(descriptor: int, tell: Callable[[], None], *, wait: bool) -> bool | None:
    """True with the kernel's lock, None where another has it, False where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return None
        tell()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _take(lease: Lease, has_flock: bool, tell: Callable[[Path, str], None], *, wait: bool) -> bool:
    """Make the lease, in place of one whose holder is dead; False where it lives and is not to be waited for."""
    while not lease._make():
        found = _parsed(_bytes(lease.path) or b"")
        was_here = found.get("machine") == _machine()["machine"] is not None
        same_boot = found.get("boot") == _machine()["boot"]
        dead = (same_boot and has_flock) or (was_here and not same_boot)
        if not dead:
            tell(lease.path, f", which is taken to be dead if it stays silent for {LEASE_SECONDS:g} s")
            dead = _is_silent(lease.path)
        if dead:
            # Renamed first: of two machines that judged alike, one removes it, and the other looks again.
            aside = lease.path.with_name(f".{lease.path.name}.{uuid.uuid4().hex}")
            try:
                lease.path.rename(aside)
            except FileNotFoundError:
                continue
            aside.unlink(missing_ok=True)
        elif not wait:
            return False
    return True


def _is_silent(lease: Path) -> bool:
    """Whether the lease stays as it is for `LEASE_SECONDS`; False as soon as it changes or goes."""
    first, deadline = _bytes(lease), time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        if first is None or _bytes(lease) != first:
            return False
        time.sleep(min(_WATCH_SECONDS, LEASE_SECONDS / 10))
    return True


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lease says; empty while it is being written."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(lease: Path) -> str:
    found = _parsed(_bytes(lease) or b"")
    return f"process {found['process']} on {found['host']}" if {"process", "host"} <= set(found) else "another process"


@cache
def _machine() -> dict[str, str | None]:
    """Names this machine, and its time since the last start: processes of one boot share the kernel's locks."""

    def content(file: str) -> str | None:
        try:
            return Path(file).read_text(encoding="ascii").strip() or None
        except OSError:
            return None

    # Copies of one disk image share the id, and machines that share a name have other ids.
    identity = content("/etc/machine-id")
    machine = None if identity is None else f"{socket.gethostname()} {identity}"
    return {"machine": machine, "boot": content("/proc/sys/kernel/random/boot_id") or str(uuid.getnode())}

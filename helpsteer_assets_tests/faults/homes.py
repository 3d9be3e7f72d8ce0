"""Homes for faults of files and disks: finished ones, small ones, and what a clear error looks like."""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from helpsteer_assets_tests.faults.campaign import Command, Trial

TRACEBACK = re.compile(r'Traceback|^ +File "', re.MULTILINE)
_KEPT_CAPABILITIES = ~0b1111
"""Without CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER permission bits bind root too."""
_VERSION_3 = 0x20080522


def finished_home(trial: Trial) -> None:
    """Give the trial a copy of the undisturbed home: artifacts, warehouse and Dagster's state, at another path."""
    shutil.copytree(trial.undisturbed.home, trial.home, dirs_exist_ok=True)


def forget(trial: Trial, *assets: str) -> None:
    """Take the artifacts of some assets away."""
    for asset in assets:
        shutil.rmtree(trial.home / "artifacts" / asset)


@cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs: root may, and whoever is root in `unshare --user --map-root-user -m`."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return tried.returncode == 0


def mount_home(trial: Trial, size: str = "64m") -> Path:
    """Put the trial's home on a file system of its own, which is returned; gone when the trial ends."""
    disk = trial.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    trial.cleanup.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
    trial.home = disk / "home"
    trial.home.mkdir()
    return disk


def remount(disk: Path, option: str) -> bool:
    """Mount a file system anew, `ro` or `rw`; False where it is busy."""
    tried = subprocess.run(["mount", "-o", f"remount,{option}", disk], capture_output=True, check=False)
    return tried.returncode == 0


def obey_permissions() -> None:
    """Make permission bits count for this process, were it root's."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))

    class Capabilities(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc = ctypes.CDLL(None, use_errno=True)
    header, found = Header(_VERSION_3, 0), (Capabilities * 2)()
    assert libc.capget(ctypes.byref(header), found) == 0, os.strerror(ctypes.get_errno())
    found[0].effective &= _KEPT_CAPABILITIES
    found[0].permitted &= _KEPT_CAPABILITIES
    assert libc.capset(ctypes.byref(header), found) == 0, os.strerror(ctypes.get_errno())


def wait_or_end(trial: Trial, command: Command, done: Callable[[], object], what: str) -> None:
    """Wait until something holds or the command has ended."""
    trial.wait(lambda: done() or not command.running, what)


def says_what_is_wrong(command: Command, *words: str) -> bool:
    """Assert that a command ended well, or in words that say one of `words` and no traceback; True where it failed."""
    code, output = command.wait(), command.output
    assert not TRACEBACK.search(output), f"a traceback:\n{output[-6000:]}"
    if code == 0:
        return False
    assert code in (1, 2), f"it ended with {code}: {output[-3000:]}"
    assert any(word in output for word in words), f"it does not say {' or '.join(words)}: {output[-3000:]}"
    return True

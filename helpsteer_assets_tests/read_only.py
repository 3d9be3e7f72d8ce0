"""A folder as a process sees it on a read-only file system, for root and for everybody else."""

import subprocess
import sys
from pathlib import Path

import pytest

_ENTER = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def run_read_only(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the arguments where `folder` is mounted read-only; skips where that is not allowed."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        refused = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if refused.returncode:
        pytest.skip(f"needs a mount namespace: {refused.stderr.strip()}")
    command = [*unshare, "sh", "-c", _ENTER, str(folder), sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True)

"""What tests that start processes share."""

from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below one, wherever they moved their session."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    below, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        below += children
        waiting += children
    return below

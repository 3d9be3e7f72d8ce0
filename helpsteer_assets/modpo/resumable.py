"""Rows of long work, kept as they are finished."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ResumableRows:
    """JSON lines appended batch by batch, so that a killed computation goes on after its last whole batch."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> Iterator[dict[str, Any]]:
        """The rows of an earlier attempt; a line that its death cut short is left out, and cut off the file."""
        if self._path is None or not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                yield json.loads(line)
                whole += len(line)
        os.truncate(self._path, whole)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add finished rows and see them to the disk."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

"""Finished rows of long work, kept on disk while the work goes on."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ResumableRows:
    """A file of finished rows: lines of a checksum and a JSON object. A killed computation goes on after them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # The checksum covers the file's name and the two folders above it, so that rows of another artifact are not
        # taken for this one's, and a home can be moved.
        self._place = 0 if path is None else zlib.crc32("/".join(path.parts[-3:]).encode())

    def read(self) -> Iterator[dict[str, Any]]:
        """The rows of an earlier attempt, up to the first damaged line; the file is cut off there."""
        if self._path is None or not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                checksum, _, text = line.partition(b" ")
                if not line.endswith(b"\n") or checksum != self._checksum(text):
                    break
                yield json.loads(text)
                whole += len(line)
        os.truncate(self._path, whole)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add finished rows, and wait until they are on disk."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(row)}\n".encode() for row in rows]
        with self._path.open("ab") as file:
            file.write(b"".join(self._checksum(line) + b" " + line for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _checksum(self, line: bytes) -> bytes:
        return b"%08x" % zlib.crc32(line, self._place)

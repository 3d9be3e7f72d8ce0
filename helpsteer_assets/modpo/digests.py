"""Digests of files, and JSON that vouches for itself: a flipped bit is noticed before its content is believed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"
"""Key of the digest of everything beside it."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content, as JSON gives it back, with its own digest; numbers must be finite."""
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

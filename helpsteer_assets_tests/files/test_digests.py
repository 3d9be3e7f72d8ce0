"""Digests of sources: what changes them, and when a file is read again."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpsteer_assets.files import digests
from helpsteer_assets.files.digests import content_digest, file_sha256


def old(path: Path, content: str) -> Path:
    """A file written a minute ago, and so of a settled modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    then = time.time_ns() - 60_000_000_000
    os.utime(path, ns=(then, then))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    old(tmp_path / "model/config.json", "{}")
    old(tmp_path / "model/weights/one.bin", "1")
    old(tmp_path / "model/weights/two.bin", "2")
    return tmp_path / "model"


NAMES = st.sampled_from(["one.bin", "two.bin", "weights/one.bin", "weights/two.bin", "weightsone.bin", "a/b/c"])
TREES = st.dictionaries(NAMES, st.sampled_from(["", "1", "2", "one.bin"]), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=TREES, other=TREES)
def test_two_folders_have_one_digest_where_names_and_contents_are_equal(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, str], other: dict[str, str]
) -> None:
    found = []
    for tree in (one, other):
        place = tmp_path_factory.mktemp("tree")
        for name, content in tree.items():
            old(place / name, content)
        old(place / ".git/HEAD", place.name)  # hidden files do not count
        found.append(content_digest(place))
    assert (found[0] == found[1]) == (one == other)


def test_links_are_followed_and_a_circle_ends(folder: Path, tmp_path: Path) -> None:
    blob = old(tmp_path / "blobs/0123", "linked")
    (folder / "linked").symlink_to(blob.parent)
    before = content_digest(folder)
    (folder / "weights/up").symlink_to(folder)
    assert content_digest(folder) == before
    blob.write_text("changed")
    assert content_digest(folder) != before


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []

    def spy(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(digests, "file_sha256", spy)
    return names


def test_a_file_is_read_again_only_after_a_change_of_its_time_or_size(
    folder: Path, tmp_path: Path, read: list[str]
) -> None:
    cache = tmp_path / "state/digests.json"
    first = content_digest(folder / "weights", cache)
    content_digest(folder / "config.json", cache)
    assert read == ["one.bin", "two.bin", "config.json"]
    whole = content_digest(folder, cache)
    assert content_digest(folder / "weights", cache) == first
    assert len(read) == 3 and whole == content_digest(folder)
    del read[:]
    config = folder / "config.json"
    old(config, "[]")
    assert content_digest(folder, cache) != whole
    before = config.stat()
    config.write_text("[1]")
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_digest(folder, cache) == content_digest(folder)
    assert read[:2] == ["config.json", "config.json"]
    assert [path.name for path in cache.parent.iterdir()] == ["digests.json"]


def test_a_file_written_just_now_is_not_trusted_yet(folder: Path, tmp_path: Path) -> None:
    cache, file = tmp_path / "digests.json", folder / "config.json"
    file.write_text("{1}")
    status = file.stat()
    before = content_digest(folder, cache)
    file.write_text("{2}")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_digest(folder, cache) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: "",
        lambda cache: "[]",
        lambda cache: "\udcff",
        lambda cache: re.sub(r'"\w{63}(\w)"', f'"{"0" * 64}"', cache),
    ],
)
def test_a_damaged_cache_is_as_none_and_mended(folder: Path, tmp_path: Path, damage: Callable[[str], str]) -> None:
    cache = tmp_path / "digests.json"
    expected = content_digest(folder, cache)
    cache.write_text(damage(cache.read_text()), encoding="utf-8", errors="surrogateescape")
    assert content_digest(folder, cache) == expected
    assert len(json.loads(cache.read_text())) == 4  # three files, and its own digest

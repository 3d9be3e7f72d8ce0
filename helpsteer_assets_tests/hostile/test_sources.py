"""Folders and paths: what lies beside the data, what a name can hold, where links lead."""

import os
from pathlib import Path

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.hostile.inputs import read


@pytest.mark.parametrize("path", ["", "train.jsonl", "zero"])
def test_a_pipe_or_a_device_is_refused_and_not_read(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(HelpsteerError, match=r"is no regular file|data.source: "):
        read(tmp_path / path)


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a\\b", "s3://bucket/home", "file:///tmp/home"])
def test_a_home_that_a_database_reads_as_another_or_that_is_a_url_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SQLite would cut the path at `?` and read %41 as A, DuckDB takes a backslash for a slash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELPSTEER_HOME", name)
    with pytest.raises(HelpsteerError, match=r"set HELPSTEER_HOME to another folder|is a URL"):
        Home.from_environment()


@pytest.mark.parametrize("linked", ["", "checkpoints"])
def test_a_link_out_of_the_home_is_not_followed(tmp_path: Path, linked: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    store = ArtifactStore(tmp_path / "home")
    place = store.partial("scores", "0.1", "f" * 32) / linked
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)

    def compute(folder: Path) -> dict[str, object]:
        for file in (folder / "checkpoints" / "state", folder / "rows"):
            file.parent.mkdir(exist_ok=True)
            file.write_text("new")
        return {}

    store.build("scores", "0.1", "f" * 32, manifest={}, compute=compute, on_wait=print)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "kept"}

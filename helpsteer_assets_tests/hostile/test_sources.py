"""Folders and paths: what lies beside the data, what a name can hold, where links lead."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.digests import content_digest
from helpsteer_assets.modpo.data.tables import literal_path, query
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.hostile.inputs import examples, jsonl, read, row


def test_what_else_lies_in_a_folder_does_not_matter(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes(jsonl([row("asked", f"answer {n}", n, 1, 1, 1, n) for n in range(3)]))
    expected = read(data)
    (data / os.fsdecode(b"train-\xff.jsonl")).write_bytes(b"x")
    (data / "train.jsonl\n").write_bytes(b"x")
    (data / "train.jsonl.bak").mkdir()
    (data / "data").write_bytes(b"a file")
    digest = content_digest(data)
    os.mkfifo(data / "pipe.jsonl")
    (data / "zero").symlink_to("/dev/zero")
    assert content_digest(data) == digest
    (data / "nothing").symlink_to(tmp_path / "nowhere")
    (data / "circle").symlink_to(data)
    assert read(data) == expected


@pytest.mark.parametrize("path", ["", "train.jsonl", "zero"])
def test_a_pipe_or_a_device_is_refused_and_not_read(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(HelpsteerError, match=r"is no regular file|data.source: "):
        read(tmp_path / path)


names = st.text(st.sampled_from("*?[]!-^{},\\'\"$%#;=:~ \n\tab é😀"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)


@examples(40)
@given(name=names)
def test_a_path_is_one_file_whatever_its_characters_mean(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("paths")
    for other in ("a", "b", "ab", "a b", "xx", "ababab"):
        (folder / other).mkdir()
        pq.write_table(pa.table({"n": [0]}), folder / other / "n.parquet")
    (folder / name).mkdir(exist_ok=True)
    file = folder / name / "n.parquet"
    pq.write_table(pa.table({"n": [1]}), file)
    if "\\" in name and set("*?[") & set(name):
        with pytest.raises(HelpsteerError, match="rename the folder"):
            literal_path(file)
    else:
        assert query("SELECT n FROM numbers", numbers=file).to_pylist() == [{"n": 1}]


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

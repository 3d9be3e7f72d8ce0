"""Folders and paths: what lies beside the data, what a name can hold, where links lead."""

import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.digests import content_digest
from helpsteer_assets.modpo.data.pairs import build_pairs
from helpsteer_assets.modpo.data.tables import literal_path, query
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import home_path
from helpsteer_assets_tests.experiment.test_experiment import changed
from helpsteer_assets_tests.hostile.inputs import examples, read, row
from helpsteer_assets_tests.hostile.test_readers import jsonl, parquet

ROWS = [row("asked", f"answer {number}", number, 1, 1, 1, number) for number in range(3)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(ROWS))
    return folder


def test_what_else_lies_in_a_folder_does_not_matter(data: Path, tmp_path: Path) -> None:
    expected = read(data, validation_share=1e-9)
    (data / "notes.txt").write_bytes(b"\xff\x00")
    (data / "traín.jsonl").write_bytes(b"x")
    (data / os.fsdecode(b"train-\xff.jsonl")).write_bytes(b"x")
    (data / "train.jsonl\n").write_bytes(b"x")
    (data / "train.jsonl.bak").mkdir()
    (data / "data").write_bytes(b"a file")
    os.mkfifo(data / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(data / "socket", Path.cwd()))
    (data / "nothing").symlink_to(tmp_path / "nowhere")
    (data / "circle").symlink_to(data)
    assert read(data, validation_share=1e-9) == expected


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "link to a folder"])
@pytest.mark.parametrize("name", ["train.jsonl", "validation.parquet", "data/train.csv.gz"])
def test_a_ratings_name_on_what_is_no_file_is_refused(data: Path, kind: str, name: str) -> None:
    (data / "train.jsonl").rename(data / "kept.jsonl")
    place = data / name
    place.parent.mkdir(exist_ok=True)
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(data if kind == "link to a folder" else "nowhere")
    with pytest.raises(HelpsteerError, match=rf"{name} has the name of a file of ratings, and is no regular file"):
        read(data)


@pytest.mark.parametrize("name", ["pipe.jsonl", "null", "zero"])
def test_a_source_that_is_neither_a_file_nor_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for device in ("null", "zero"):
        (tmp_path / device).symlink_to(f"/dev/{device}")
    with pytest.raises(HelpsteerError, match=rf"{name} is neither a folder nor a regular file"):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "circle/x"])
def test_a_path_that_the_system_refuses_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(HelpsteerError, match=r"data.source: .* (cannot be read|does not exist)"):
        read(tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(data: Path) -> None:
    (data / "train.jsonl").chmod(0)
    with pytest.raises(HelpsteerError, match=r"train.jsonl cannot be read: Permission denied"):
        read(data)
    data.chmod(0)
    try:
        for path in (data, data / "train.jsonl"):
            with pytest.raises(HelpsteerError, match=r"cannot be read: Permission denied"):
                read(path)
    finally:
        data.chmod(0o700)


def test_a_source_may_be_a_link(data: Path, tmp_path: Path) -> None:
    expected = read(data, validation_share=1e-9)
    (tmp_path / "linked").symlink_to(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").symlink_to(data / "train.jsonl")
    for link in (tmp_path / "linked", tmp_path / "folder"):
        assert read(link, validation_share=1e-9) == expected
        assert content_digest(link) == content_digest(data)


def test_a_digest_waits_for_no_pipe_and_ends_on_a_device(data: Path) -> None:
    before = content_digest(data)
    os.mkfifo(data / "pipe")
    (data / "zero").symlink_to("/dev/zero")
    assert content_digest(data) == before
    with pytest.raises(HelpsteerError, match="holds no files"):
        content_digest(Path("/dev/zero"))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"x": ' * 100_000, "\x00", "1e999", '{"%s": [NaN, Infinity, "x"]}']
)
def test_a_hostile_digest_cache_is_as_none(data: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(content.replace("%s", str(data / "train.jsonl")), encoding="utf-8")
    assert content_digest(data, cache) == content_digest(data)


# Names that mean something to a shell or to a database

names = st.text(st.sampled_from("*?[]!-^{},\\'\"$%#;=:~ \n\tab é😀"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)


@examples(25)
@given(name=names)
def test_a_path_is_one_file_whatever_its_characters_mean(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("paths")
    for other in ("a", "b", "ab", "aa", "bab", "a b", "xx", "ababab"):
        (folder / other).mkdir()
        pq.write_table(pa.table({"n": [0]}), folder / other / "n.parquet")
    (folder / name).mkdir(exist_ok=True)
    file = folder / name / "n.parquet"
    pq.write_table(pa.table({"n": [1]}), file)
    if "\\" in name and set("*?[") & set(name):
        with pytest.raises(HelpsteerError, match="rename the folder"):
            literal_path(file)
        return
    assert query("SELECT n FROM numbers", numbers=file).to_pylist() == [{"n": 1}]
    (folder / name / "train.parquet").write_bytes(parquet(ROWS))
    file.unlink()
    table, _ = read(folder / name, validation_share=1e-9)
    pq.write_table(table, folder / name / "ratings.parquet")
    ratings, pairs = folder / name / "ratings.parquet", folder / name / "pairs.parquet"
    assert build_pairs(ratings, "helpfulness", 0.0, pairs)["train"] == pq.read_metadata(pairs).num_rows == 3


# Homes and links: nothing is written beside the home


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a\\b"])
def test_a_home_whose_path_a_database_reads_as_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SQLite would cut the path at `?` and read %41 as A, DuckDB takes a backslash for a slash."""
    monkeypatch.setenv("HELPSTEER_HOME", str(tmp_path / name))
    with pytest.raises(HelpsteerError, match="set HELPSTEER_HOME to another folder"):
        home_path()


@pytest.mark.parametrize("name", ["s3://bucket/home", "s3:/bucket/home", "gs://bucket", "file:///tmp/home"])
def test_a_home_that_is_a_url_is_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELPSTEER_HOME", name)
    with pytest.raises(HelpsteerError, match="is a URL, and a home is a folder"):
        home_path()


@pytest.mark.parametrize("linked", ["partial", "checkpoints"])
def test_a_link_out_of_the_home_is_not_followed(tmp_path: Path, linked: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept", encoding="utf-8")
    store = ArtifactStore(tmp_path / "home")
    place = store.partial("scores", "0.1", "f" * 32) / ("checkpoints" if linked == "checkpoints" else "")
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)

    def compute(folder: Path) -> dict[str, object]:
        for file in (folder / "checkpoints" / "state", folder / "rows"):
            file.parent.mkdir(exist_ok=True)
            file.write_text("new", encoding="utf-8")
        return {}

    artifact, _ = store.build("scores", "0.1", "f" * 32, manifest={}, compute=compute, on_wait=print)
    assert artifact.file("rows").read_text(encoding="utf-8") == "new"
    assert {path.name: path.read_text(encoding="utf-8") for path in outside.iterdir()} == {"precious": "kept"}


def test_an_error_shows_what_a_terminal_would_obey_or_refuse(data: Path) -> None:
    (data / "train.jsonl").rename(data / os.fsdecode(b"\xff\x1b[2J\xe2\x80\xae.jsonl"))
    with pytest.raises(HelpsteerError, match="holds no train file") as caught:
        read(data)
    assert str(caught.value).encode().isascii()
    assert "\\udcff\\x1b[2J\\u202e.jsonl" in str(caught.value)


@pytest.mark.parametrize("source", ["/" + "x" * 300, "/" + "x/" * 3000])
def test_a_source_that_the_system_refuses_is_named_before_a_run(source: str) -> None:
    with pytest.raises(HelpsteerError, match=r"data.source: .* does not exist"):
        fingerprints(Experiment.model_validate(changed({"data.source": source})))

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.files.rows import ResumableRows


def test_rows_come_back_in_order(tmp_path: Path):
    rows = ResumableRows(tmp_path / "folder" / "rows.jsonl")
    assert list(rows.read()) == []
    rows.append([{"index": 1, "text": "a\nb"}])
    rows.append([{"index": 2, "text": "ä"}, {"index": 3, "value": 0.1 + 0.2}])
    assert list(rows.read()) == [
        {"index": 1, "text": "a\nb"},
        {"index": 2, "text": "ä"},
        {"index": 3, "value": 0.30000000000000004},
    ]
    nowhere = ResumableRows(None)
    nowhere.append([{"index": 1}])
    assert list(nowhere.read()) == []


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 200))
def test_a_line_that_a_death_cut_short_is_left_out_and_what_is_added_then_is_whole(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    written = [{"index": index, "text": "é" * index} for index in range(8)]
    ResumableRows(file).append(written)
    content = file.read_bytes()[:cut]
    file.write_bytes(content)
    whole = content.count(b"\n")
    rows = ResumableRows(file)
    assert list(rows.read()) == written[:whole]
    rows.append([{"index": 99}])
    assert list(rows.read()) == [*written[:whole], {"index": 99}]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_costs_its_line_and_those_after_it_and_nothing_wrong_is_read(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    written = [{"index": index, "log_probs": [-1.25 * index]} for index in range(8)]
    ResumableRows(file).append(written)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    damaged = bytes(content[:place]).count(b"\n")
    rows = ResumableRows(file)
    assert list(rows.read()) == written[:damaged]
    rows.append([{"index": 99}])
    assert list(rows.read()) == [*written[:damaged], {"index": 99}]


def test_rows_of_another_artifact_are_not_believed(tmp_path: Path):
    one, other = (tmp_path / name / "checkpoints" / "log_probs.jsonl" for name in ("one.partial", "other.partial"))
    for file in (one, other):
        ResumableRows(file).append([{"index": 0, "log_probs": [-1.0]}])
    other.write_bytes(one.read_bytes())
    assert list(ResumableRows(other).read()) == []
    moved = tmp_path / "moved" / "one.partial" / "checkpoints" / "log_probs.jsonl"
    moved.parent.mkdir(parents=True)
    one.rename(moved)
    assert list(ResumableRows(moved).read()) == [{"index": 0, "log_probs": [-1.0]}]

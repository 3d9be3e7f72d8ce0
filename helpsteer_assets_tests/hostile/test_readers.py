"""Files of ratings: whatever stands in one, it ends in correct rows or in words that name the file."""

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.readers import COLUMNS
from helpsteer_assets_tests.hostile.inputs import TEXTS, examples, jsonl, read, row

ROWS = [row(f"{text}{number % 3}", text, helpfulness=number % 5) for number, text in enumerate(TEXTS)]


def csv_file(rows: list[dict[str, Any]], end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=7, compression="none", use_dictionary=False)
    return buffer.getvalue()


CONTENTS: dict[str, bytes] = {
    "rows.jsonl": jsonl(ROWS),
    "array.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows.csv": csv_file(ROWS),
    "rows.parquet": parquet(ROWS),
}
TOKENS = [*rb'" , { } [ ] : prompt verbosity NaN 1e999 \ud800 null 4 \ '.split(b" "), b"\n", b"\r", b"\x00", b"\xff"]
TOKENS += [codecs.BOM_UTF8, ",".join(COLUMNS).encode() + b"\n"]
DAMAGES = {
    "set": lambda rest, new: new + rest[len(new) :],
    "insert": lambda rest, new: new + rest,
    "delete": lambda rest, new: rest[len(new) :],
    "repeat": lambda rest, new: rest[: 50 * len(new)] + rest,
    "end": lambda rest, new: b"",
}
Cut = tuple[str, float, bytes]
cuts = st.tuples(st.sampled_from([*DAMAGES]), st.floats(0, 1), st.binary(min_size=1, max_size=9))


def damaged(content: bytes, changes: list[Cut]) -> bytes:
    for kind, share, new in changes:
        position = int(share * len(content))
        content = content[:position] + DAMAGES[kind](content[position:], new)
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For files that one example after another overwrites."""
    return tmp_path_factory.mktemp("readers")


@pytest.mark.parametrize("name", CONTENTS)
@examples(80)
@given(
    changes=st.lists(cuts, min_size=1, max_size=4),
    other=st.none() | st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=40).map(b"".join),
    gzipped=st.sampled_from(["no", "then damaged", "damaged"]),
    on_bad_rows=st.sampled_from(["error", "drop"]),
)
def test_any_bytes_are_rows_or_refused_in_words_that_name_the_file(
    folder: Path, name: str, changes: list[Cut], other: bytes | None, gzipped: str, on_bad_rows: str
) -> None:
    content = CONTENTS[name] if other is None else other
    if gzipped == "then damaged":
        content = damaged(gzip.compress(content), changes)
    else:
        content = damaged(content, changes)
        content = gzip.compress(content) if gzipped == "damaged" else content
    file = folder / (name if gzipped == "no" else f"{name}.gz")
    file.write_bytes(content)
    try:
        read(file, on_bad_rows)
    except HelpsteerError as error:
        assert file.name in str(error) and len(str(error)) < 3000


good_texts = (st.sampled_from(TEXTS) | st.text(min_size=1, max_size=30)).filter(str.strip)
good_rows = st.builds(row, good_texts, good_texts, helpfulness=st.integers(0, 4))


@examples(40)
@given(rows=st.lists(good_rows, min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_csv_keeps_every_text_whatever_its_line_ends_are(
    folder: Path, rows: list[dict[str, Any]], end: str, mark: bool
) -> None:
    (folder / "rows.csv").write_bytes(codecs.BOM_UTF8 * mark + csv_file(rows, end))
    table, _ = read(folder / "rows.csv", "error")
    for column in COLUMNS:
        assert table[column].to_pylist() == [r[column] for r in rows]


NESTED = [
    jsonl([row("a", complexity=7)]).replace(b": 7", b": " + b"[" * depth + b"]" * depth)
    for depth in (500, *range(900, 1000, 7), 10**5)
]
"""The parser's limit is reached, or that of what shows the value."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", jsonl([row("a")]).decode().encode("utf-16"), "is UTF-16 text"),
        ("rows.csv", b"prompt," + csv_file([row("a")]), "has 2 columns prompt"),
        ("rows.jsonl", b'{"prompt": "a", "prompt": "b"}\n' + jsonl([row("a")]), "an object with 2 keys prompt"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS)) + b"something else", "is not gzip"),
        ("rows.jsonl", jsonl([row("a", complexity="x" * 10**6)]), "complexity is the text 'xxx"),
        ("rows.jsonl", b"".join(NESTED), f"{len(NESTED)} of {len(NESTED)} rows are bad"),
    ],
    ids=["UTF-16", "a column twice", "a key twice", "more than gzip", "a long value", "nested values"],
)
def test_what_would_be_read_wrong_is_refused_in_few_words(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HelpsteerError, match=message) as caught:
        read(tmp_path / name, "error")
    assert name in str(caught.value) and len(str(caught.value)) < 1500

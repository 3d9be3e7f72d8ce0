"""Files of ratings: whatever stands in one, it ends in correct rows or in words that name the file."""

import codecs
import csv
import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.pairs import build_pairs, describe_pairs
from helpsteer_assets.modpo.data.ratings import prompt_id
from helpsteer_assets.modpo.data.readers import COLUMNS
from helpsteer_assets_tests.hostile.inputs import TEXTS, examples, read, row

ROWS = [row(f"{text}{number % 3}", text, helpfulness=number % 5) for number, text in enumerate(TEXTS)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def csv_file(rows: list[dict[str, Any]], end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


CONTENTS: dict[str, bytes] = {
    "rows.jsonl": jsonl(ROWS),
    "array.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows.csv": csv_file(ROWS),
    "rows.parquet": parquet(ROWS, row_group_size=7, compression="none", use_dictionary=False),
}
TOKENS = [*rb'" , { } [ ] : prompt verbosity NaN 1e999 \ud800 null 4 \ '.split(b" "), b"\n", b"\r", b"\x00", b"\xff"]
TOKENS += [codecs.BOM_UTF8, ",".join(COLUMNS).encode() + b"\n"]
cuts = st.tuples(
    st.sampled_from(["set", "insert", "delete", "repeat", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in changes:
        position = int(share * len(content))
        before, after = content[:position], content[position:]
        content = (
            before
            + {
                "set": new + after[len(new) :],
                "insert": new + after,
                "delete": after[len(new) :],
                "repeat": after[: 50 * len(new)] + after,
                "end": b"",
            }[kind]
        )
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
    folder: Path,
    name: str,
    changes: list[tuple[str, float, bytes]],
    other: bytes | None,
    gzipped: str,
    on_bad_rows: str,
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
        read(file, on_bad_rows=on_bad_rows)
    except HelpsteerError as error:
        assert file.name in str(error)


good_texts = (st.sampled_from(TEXTS) | st.text(min_size=1, max_size=30)).filter(str.strip)
good_rows = st.builds(row, good_texts, good_texts, helpfulness=st.integers(0, 4))


@examples(40)
@given(rows=st.lists(good_rows, min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_csv_keeps_every_text_whatever_its_line_ends_are(
    folder: Path, rows: list[dict[str, Any]], end: str, mark: bool
) -> None:
    (folder / "rows.csv").write_bytes(codecs.BOM_UTF8 * mark + csv_file(rows, end))
    table, _ = read(folder / "rows.csv", on_bad_rows="error")
    for column in COLUMNS:
        assert table[column].to_pylist() == [r[column] for r in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", jsonl([row("a")]).decode().encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
        ("rows.csv", csv_file([row("a")]).decode().encode("utf-16-be"), "is UTF-16 text"),
        ("rows.csv", b"prompt," + csv_file([row("a")]), "has 2 columns prompt: rename all but the one meant"),
        ("rows.csv", csv_file([row("a")]) + b'a"b"c,"d"e,1,1,1,1,1\n', "is not valid CSV near line 3"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS)) + b"something else", "is not gzip, .* or not to its end"),
        ("array.json", b"[" * 100_000, "is JSON nested too deeply"),
        ("rows.jsonl", jsonl([row("a", complexity=[[[2]]] * 10**5)]), "complexity is \\[\\[\\[2\\]\\], "),
        ("rows.jsonl", jsonl([row("a", complexity="x" * 10**6)]), "complexity is the text 'xxx"),
        ("rows.jsonl", b'{"prompt": "a", "prompt": "b"}\n' + jsonl([row("a")]), "an object with 2 keys prompt"),
        ("rows.jsonl", b"".join(b'{"%d%s": 1}\n' % (n, b"k" * 1000) for n in range(2000)), "column prompt, .* missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_few_words(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HelpsteerError, match=message) as caught:
        read(tmp_path / name, on_bad_rows="error")
    assert name in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("depth", [500, *range(900, 1000, 7), 10**5])
def test_a_deeply_nested_value_is_a_bad_row(tmp_path: Path, depth: int) -> None:
    """The parser's limit is reached, or that of what shows the value."""
    nested = jsonl([row("a", complexity=7)]).replace(
        b'"complexity": 7', b'"complexity": ' + b"[" * depth + b"]" * depth
    )
    (tmp_path / "rows.jsonl").write_bytes(jsonl([row("first")]) + nested)
    table, report = read(tmp_path / "rows.jsonl")
    assert (len(table), report["bad_rows"]["count"]) == (1, 1)


# Much of it

MEASURED = """
import sys
from pathlib import Path
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data import ratings, tables

def kilobytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

ratings._BATCH_CHARACTERS = tables.ROW_GROUP_BYTES = 2**22
before = kilobytes()
options = {"validation_share": 0.1, "max_train_prompts": None, "max_validation_prompts": None}
try:
    ratings.read_ratings(Path(sys.argv[1]), Path(sys.argv[2]), on_bad_rows="error", **options)
except HelpsteerError as error:
    print(error)
print((kilobytes() - before) // 1024)
"""


def read_alone(source: Path) -> tuple[str, int]:
    """Read a source in a new process; returns the error in its words, and the memory in MB that it took."""
    command = [sys.executable, "-c", MEASURED, str(source), str(source.parent / "ratings.parquet")]
    *error, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(error), int(megabytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
class TestMemory:
    def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(self, tmp_path: Path) -> None:
        with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(600):
                file.write(b"x" * 2**20)
        error, megabytes = read_alone(tmp_path / "rows.jsonl.gz")
        assert re.search(r"is no file of ratings: line \d is longer than", error)
        assert megabytes < 500

    def test_as_many_rows_as_fit_are_read_at_a_time_where_texts_are_long(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(jsonl([row("x" * 2**20, f"{n}") for n in range(2)]) * 100)
        error, megabytes = read_alone(tmp_path / "rows.jsonl")
        assert not error and megabytes < 180  # 200 MB of text


def test_thousands_of_equal_rows_take_no_longer_than_one(tmp_path: Path) -> None:
    """Every two of them compared, as rows, would be ten thousand million comparisons for each attribute."""
    repeated = [row("asked", f"answer {n}", n, 2, 2, 2, n) for n in range(3)]
    content = jsonl(repeated) * 9_000 + jsonl([row("asked", "answer 2", 2, 2, 2, 2, 3), row("v", "w")])
    (tmp_path / "rows.jsonl").write_bytes(content)
    table, _ = read(tmp_path / "rows.jsonl", on_bad_rows="error")
    ratings = tmp_path / "ratings.parquet"
    pq.write_table(table, ratings)
    assert build_pairs(ratings, "helpfulness", 0.0, tmp_path / "pairs.parquet")["train"] == 3
    described = describe_pairs(tmp_path / "pairs.parquet", ratings, "helpfulness", "verbosity")
    assert described["duplicate_responses"] == 3 * 9_000 + 1 - 3


def test_a_prompt_with_all_too_many_responses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpsteer_assets.modpo.data.pairs._MOST_COMPARED", 500)
    rows = [row("few", f"{n}", n, 1, 1, 1, 1) for n in range(4)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows + [row("many", f"{n}", n % 5, 1, 1, 1, 1) for n in range(30)]))
    table, _ = read(tmp_path / "rows.jsonl")
    pq.write_table(table, tmp_path / "ratings.parquet")
    with pytest.raises(HelpsteerError, match=rf"{prompt_id('many')} has 30 different .* 916 comparisons"):
        build_pairs(tmp_path / "ratings.parquet", "helpfulness", 0.0, tmp_path / "pairs.parquet")

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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.pairs import build_pairs, describe_pairs
from helpsteer_assets.modpo.data.ratings import prompt_id
from helpsteer_assets.modpo.data.readers import COLUMNS
from helpsteer_assets_tests.hostile.inputs import TEXTS, examples, read, row

ROWS = [row(f"{text}{number % 3}", text, helpfulness=number % 5) for number, text in enumerate(TEXTS)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def csv_file(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
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
    "rows.parquet": parquet(ROWS, row_group_size=7),
    "plain.parquet": parquet(ROWS, compression="none", use_dictionary=False),
    "rows.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(csv_file(ROWS)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For files that one example after another overwrites."""
    return tmp_path_factory.mktemp("readers")


def read_or_refuse(file: Path, content: bytes, **options: Any) -> tuple[pa.Table, dict[str, Any]] | None:
    """Rows of which all that must hold was asserted, or None after an error in words that name the file."""
    file.write_bytes(content)
    try:
        return read(file, **options)
    except HelpsteerError as error:
        assert file.name in str(error)
        return None


@pytest.mark.parametrize("name", CONTENTS)
def test_odd_texts_pass_unchanged_through_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    table, report = read(tmp_path / name)
    assert report["bad_rows"]["count"] == 0
    for column in COLUMNS:
        assert table[column].to_pylist() == [r[column] for r in ROWS]


# Any bytes at all

cuts = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "repeat", "end"]), st.floats(0, 1), st.binary(max_size=9)
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in changes:
        position = int(share * max(0, len(content) - 1))
        before, after = content[:position], content[position:]
        match kind:
            case "flip":
                content = before + bytes(byte ^ (1 << len(new) % 8) for byte in after[:1]) + after[1:]
            case "set":
                content = before + new + after[len(new) :]
            case "insert":
                content = before + new + after
            case "delete":
                content = before + after[1 + len(new) :]
            case "repeat":
                content = before + after[: 50 * len(new)] + after
            case "end":
                content = before
    return content


@pytest.mark.parametrize("name", CONTENTS)
@examples(40)
@given(changes=st.lists(cuts, min_size=1, max_size=4), on_bad_rows=st.sampled_from(["error", "drop"]))
def test_a_damaged_file_is_read_or_refused_in_words(
    folder: Path, name: str, changes: list[tuple[str, float, bytes]], on_bad_rows: str
) -> None:
    read_or_refuse(folder / name, damaged(CONTENTS[name], changes), on_bad_rows=on_bad_rows)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "array.json.gz", "rows.csv.gz"])
@examples(25)
@given(changes=st.lists(cuts, min_size=1, max_size=4))
def test_a_file_that_was_damaged_before_it_was_compressed(
    folder: Path, name: str, changes: list[tuple[str, float, bytes]]
) -> None:
    read_or_refuse(folder / name, gzip.compress(damaged(gzip.decompress(CONTENTS[name]), changes)))


TOKENS = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"prompt",
    b"response",
    b"NaN",
    b"-Infinity",
    b"1e999",
]
TOKENS += [b"\\ud800", b"\xff", b"\x00", b"\xef\xbb\xbf", b" ", b"null", b"true", b"4", b"verbosity", b"'", b"\\"]


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv", "rows.csv.gz", "rows.parquet"])
@examples(40)
@given(content=st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(TOKENS), max_size=40).map(b"".join)))
def test_any_bytes_are_refused_in_words(folder: Path, name: str, content: bytes) -> None:
    header = ",".join(COLUMNS).encode() + b"\n" if "csv" in name else b""
    content = gzip.compress(header + content) if name.endswith(".gz") else header + content
    read_or_refuse(folder / name, content)


# Any values

good_texts = st.one_of(st.sampled_from(TEXTS), st.text(min_size=1, max_size=30)).filter(str.strip)
numbers = st.one_of(st.integers(0, 4), st.integers(0, 4).map(float))
any_text = st.text(st.characters(exclude_categories=()), max_size=9)
any_value = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 7),
        st.integers(),
        st.floats(),
        st.sampled_from(["3", " 3 ", "٣", "", " ", "NaN", 10**400, 1e-300]),
        any_text,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=5,
)
good_rows = st.tuples(good_texts, good_texts, *[numbers] * 5).map(lambda values: row(*values))
any_rows = st.one_of(
    good_rows,
    st.tuples(good_rows, st.dictionaries(st.sampled_from(COLUMNS), any_value, min_size=1)).map(lambda t: t[0] | t[1]),
    st.tuples(good_rows, st.sets(st.sampled_from(COLUMNS), min_size=1)).map(
        lambda t: {key: value for key, value in t[0].items() if key not in t[1]}
    ),
    any_value,
)


def is_good(value: Any) -> bool:
    """The rule, said once more: seven columns, two texts, five whole numbers from 0 to 4."""
    if not isinstance(value, dict) or any(column not in value for column in COLUMNS):
        return False
    for column in COLUMNS:
        entry = value[column]
        if column in ATTRIBUTES:
            if type(entry) not in (int, float) or entry not in (0, 1, 2, 3, 4):
                return False
        elif not isinstance(entry, str) or not entry.strip() or any(0xD800 <= ord(c) <= 0xDFFF for c in entry):
            return False
    return True


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json"])
@examples(25)
@given(values=st.lists(any_rows, max_size=25), ascii=st.booleans())
@example(values=[row("\ud83d\ude00", "two halves make one")], ascii=True)
def test_exactly_the_good_rows_of_json_are_kept(folder: Path, name: str, values: list[Any], ascii: bool) -> None:
    values = [row("the first", "is good"), *values]
    encoded = [json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass") for value in values]
    if name.endswith(".json"):
        content = b"[" + b",\n".join(encoded) + b"]"
        if not all(is_utf8(line) for line in encoded):
            assert read_or_refuse(folder / name, content) is None
            return
    else:
        content = b"\n".join(encoded)
    (folder / name).write_bytes(content)
    table, report = read(folder / name, validation_share=1e-9)
    understood = [json.loads(line) if is_utf8(line) else None for line in encoded]
    good = [number for number, value in enumerate(understood, 1) if is_good(value)]
    assert table["row"].to_pylist() == good
    assert report["bad_rows"]["count"] == len(values) - len(good)
    for found in table.to_pylist():
        assert {column: found[column] for column in COLUMNS} == {
            column: understood[found["row"] - 1][column] for column in COLUMNS
        }


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@examples(40)
@given(rows=st.lists(good_rows, min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_csv_keeps_every_text_whatever_its_line_ends_are(
    folder: Path, rows: list[dict[str, Any]], end: str, mark: bool
) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "rows.csv").write_bytes(codecs.BOM_UTF8 * mark + text.getvalue().encode())
    table, _ = read(folder / "rows.csv", on_bad_rows="error", validation_share=1e-9)
    for column in COLUMNS:
        assert table[column].to_pylist() == [r[column] for r in rows]


COLUMN_TYPES = [
    pa.array([True, None]),
    pa.array(["3", "4"]),
    pa.array([[1], [2]]),
    pa.array([{"a": 1}, None]),
    pa.array([b"\xff", b"b"]),
    pa.array([2**62, 1], pa.timestamp("ns")),
    pa.array([2**31 - 1, 0], pa.date32()),
    pa.array([1, 2], pa.duration("ns")),
    pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    pa.array(['{"a": 1}', "{}"], pa.json_()),
]


@pytest.mark.parametrize("column", ["prompt", "verbosity"])
@pytest.mark.parametrize("values", COLUMN_TYPES, ids=[str(values.type) for values in COLUMN_TYPES])
def test_a_parquet_column_of_another_type_is_named(tmp_path: Path, column: str, values: pa.Array) -> None:
    table = pa.Table.from_pylist([row("a"), row("b")])
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, tmp_path / "rows.parquet")
    if column == "prompt" and values.type == pa.string():
        assert read(tmp_path / "rows.parquet")[1]["bad_rows"]["count"] == 0
        return
    with pytest.raises(HelpsteerError, match=rf"rows.parquet: column {column} is of type .*, not (text|numbers)"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "values",
    [
        pa.array(np.array([1, 2], np.float16)),
        pa.array([1, 2], pa.uint64()),
        pa.array([1, 2], pa.int8()).dictionary_encode(),
        pa.array([1, 2], pa.decimal256(40, 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_numbers_and_texts_of_every_parquet_type_are_read(tmp_path: Path, values: pa.Array) -> None:
    table = pa.Table.from_pylist([row("a"), row("b")])
    table = table.set_column(2, "helpfulness", values)
    for number, kind in enumerate((pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))):
        table = table.set_column(0, "prompt", pa.array(["a", "b"], kind))
        pq.write_table(table, tmp_path / f"{number}.parquet")
        found, _ = read(tmp_path / f"{number}.parquet", on_bad_rows="error", validation_share=1e-9)
        assert (found["prompt"].to_pylist(), found["helpfulness"].to_pylist()) == (["a", "b"], [1, 2])


def test_an_encrypted_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return key_bytes.hex().encode()

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return bytes.fromhex(wrapped_key.decode())

    properties = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(footer_key="footer", column_keys={"column": list(COLUMNS)}),
    )
    table = pa.Table.from_pylist(ROWS)
    with pq.ParquetWriter(tmp_path / "rows.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(HelpsteerError, match=r"rows.parquet is no readable parquet file"):
        read(tmp_path / "rows.parquet")


NESTED = b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "response": "b"' + b"}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", jsonl([row("a")]).decode().encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
        ("rows.jsonl.gz", gzip.compress(jsonl([row("a")]).decode().encode("utf-16-le")), "is UTF-16 text"),
        ("rows.csv", csv_file([row("a")]).decode().encode("utf-16-be"), "is UTF-16 text"),
        ("array.json", json.dumps([row("a")]).encode("utf-32"), "is UTF-16 text"),
        ("rows.csv", ",".join(COLUMNS).encode() + b"\r\n", "is empty: it holds no rows"),
        ("rows.parquet", parquet([row("a")])[:-4], "is no readable parquet file"),
        ("rows.csv", csv_file([row("a")]).replace(b"correctness", b"prompt"), "has no column correctness"),
        ("rows.csv", b"prompt," + csv_file([row("a")]), "has 2 columns prompt: rename all but the one meant"),
        ("rows.csv", csv_file([row("a")]) + b'"a,b\n' * 50, "is not valid CSV near line"),
        ("rows.csv", csv_file([row("a")]) + b'a"b"c,"d"e,1,1,1,1,1\n', "is not valid CSV near line 3"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "is damaged gzip"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS)) + b"something else", "is not gzip, .* or not to its end"),
        ("array.json", b"[" * 100_000, "is JSON nested too deeply"),
        ("array.json", b"[" + b'{"prompt": "a", "prompt": "b"}' + b"]", "is an object with 2 keys prompt"),
        ("rows.jsonl", b'{"k%d": 1}\n' * 5, "has no column prompt, response"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HelpsteerError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "an object with 2 keys prompt"),
        (json.dumps(row("\ud800")).encode(), "prompt holds half a surrogate pair"),
        (json.dumps(row("a", complexity=float("inf"))).encode(), "complexity is inf, not an integer 0 to 4"),
        (json.dumps(row("a", complexity=2)).encode().replace(b"y\": 2", b"y\": 1e400"), "complexity is inf"),
        (json.dumps(row("a", complexity=float("nan"))).encode(), "complexity is nan, not an integer"),
        (json.dumps(row("a", complexity=[[[2]]] * 1000)).encode(), "complexity is [[[2]], [[2]], "),
        (json.dumps(row("a", complexity="x" * 10**6)).encode(), "complexity is the text 'xxx"),
        (json.dumps(row(["a"] * 10**5)).encode(), "prompt is ['a', 'a', "),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_value_is_shown_in_few_words(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl([row("first")]) + line + b"\n")
    with pytest.raises(HelpsteerError) as caught:
        read(tmp_path / "rows.jsonl", on_bad_rows="error")
    assert f"rows.jsonl, row 2: {reason}" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("depth", [100, 500, *range(900, 1000, 7), 2000, 10**5])
def test_a_deeply_nested_value_is_a_bad_row(tmp_path: Path, depth: int) -> None:
    line = jsonl([row("a", helpfulness=0)]).replace(
        b'"helpfulness": 0', b'"helpfulness": ' + b"[" * depth + b"]" * depth
    )
    (tmp_path / "rows.jsonl").write_bytes(jsonl([row("first")]) + line)
    table, report = read(tmp_path / "rows.jsonl", validation_share=1e-9)
    assert (len(table), report["bad_rows"]["count"]) == (1, 1)


def test_thousands_of_odd_columns_make_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"".join(b'{"%d%s": 1}\n' % (n, b"k" * 1000) for n in range(2000)))
    (tmp_path / "rows.csv").write_bytes(b",".join(b"%d%s" % (n, b"k" * 1000) for n in range(2000)) + b"\n1\n")
    for name in ("rows.jsonl", "rows.csv"):
        with pytest.raises(HelpsteerError, match="has no column prompt") as caught:
            read(tmp_path / name)
        assert len(str(caught.value)) < 1500


# Much of it


MEASURED = """
import sys
from pathlib import Path

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data import ratings
from helpsteer_assets.modpo.data import tables

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
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *error, megabytes = done.stdout.splitlines()
    return "\n".join(error), int(megabytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
class TestMemory:
    @pytest.mark.parametrize("name", ["rows.jsonl.gz", "array.json.gz", "rows.csv.gz"])
    def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(self, tmp_path: Path, name: str) -> None:
        beginning = ",".join(COLUMNS).encode() + b"\n" if "csv" in name else b" "
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(beginning)
            for _ in range(600):
                file.write(b"x" * 2**20)
        error, megabytes = read_alone(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 5 * 2**20
        assert re.search(r"is no file of ratings: line \d is longer than", error)
        assert megabytes < 500

    def test_as_many_rows_as_fit_are_read_at_a_time_where_texts_are_long(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(jsonl([row("x" * 2**20, f"{n}") for n in range(2)]) * 100)
        error, megabytes = read_alone(tmp_path / "rows.jsonl")
        assert not error
        assert megabytes < 180  # 200 MB of text


def test_texts_of_ten_megabytes_pass(tmp_path: Path) -> None:
    rows = [
        row(f"{p} " + "long 😀 " * 10**6, f"{r} " + "x\n" * 10**6, r, 1, 2, 3, r) for p in range(2) for r in range(2)
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    table, _ = read(tmp_path / "rows.jsonl", on_bad_rows="error", validation_share=1e-9)
    assert len(table["prompt"][0].as_py().encode()) > 10**7
    assert table["prompt"].to_pylist() == [r["prompt"] for r in rows]
    assert table["response"].to_pylist() == [r["response"] for r in rows]
    pq.write_table(table, tmp_path / "ratings.parquet")
    build_pairs(tmp_path / "ratings.parquet", "helpfulness", 0.0, tmp_path / "pairs.parquet")
    pairs = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert sorted(p["chosen"] for p in pairs) == sorted(r["response"] for r in rows if r["helpfulness"])


def test_thousands_of_equal_rows_take_no_longer_than_one(tmp_path: Path) -> None:
    """Every two of them compared, as rows, would be ten thousand million comparisons for each attribute."""
    repeated = [row("asked", f"answer {n}", n, 2, 2, 2, n) for n in range(3)]
    content = jsonl(repeated) * 9_000 + jsonl([row("asked", "answer 2", 2, 2, 2, 2, 3), row("v", "w")])
    (tmp_path / "rows.jsonl").write_bytes(content)
    table, _ = read(tmp_path / "rows.jsonl", on_bad_rows="error", validation_share=1e-9)
    ratings = tmp_path / "ratings.parquet"
    pq.write_table(table, ratings)
    assert build_pairs(ratings, "helpfulness", 0.0, tmp_path / "pairs.parquet")["train"] == 3
    described = describe_pairs(tmp_path / "pairs.parquet", ratings, "helpfulness", "verbosity")
    assert described["duplicate_responses"] == 3 * 9_000 + 1 - 3
    # The odd row rates the third answer a 3 on verbosity: it is tied with nothing.
    assert described["ties"] == 0
    assert build_pairs(ratings, "verbosity", 0.0, tmp_path / "pairs.parquet")["train"] == 3


def test_a_prompt_with_all_too_many_responses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpsteer_assets.modpo.data.pairs._MOST_COMPARED", 500)
    rows = [row("few", f"{n}", n, 1, 1, 1, 1) for n in range(4)] + [
        row("many", f"{n}", n % 5, 1, 1, 1, 1) for n in range(30)
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    table, _ = read(tmp_path / "rows.jsonl", validation_share=1e-9)
    pq.write_table(table, tmp_path / "ratings.parquet")
    with pytest.raises(HelpsteerError, match=rf"{prompt_id('many')} has 30 different .* 916 comparisons"):
        build_pairs(tmp_path / "ratings.parquet", "helpfulness", 0.0, tmp_path / "pairs.parquet")

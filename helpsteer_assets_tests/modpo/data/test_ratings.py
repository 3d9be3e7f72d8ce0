import csv
import gzip
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data import ratings as ratings_module
from helpsteer_assets.modpo.data import tables
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.ratings import RATINGS_SCHEMA, hash_share, prompt_id, response_id
from helpsteer_assets.modpo.data.readers import COLUMNS
from helpsteer_assets.modpo.data.tables import query

Row = dict[str, Any]


def row(prompt: Any = "How?", response: Any = "So.", *ratings: Any, **changes: Any) -> Row:
    return dict(zip(COLUMNS, (prompt, response, *(ratings or (1, 2, 3, 4, 0))), strict=True)) | changes


def many_rows(prompts: int, responses: int = 3, tag: str = "") -> list[Row]:
    return [
        row(f"{tag}prompt {p}, über\nalles", f'"response" {r}, 行 ', p % 5, r, 2, 3, (p + r) % 5)
        for p in range(prompts)
        for r in range(responses)
    ]


def read(path: Path, **changes: Any) -> tuple[pa.Table, Row]:
    given = {"on_bad_rows": "error", "validation_share": 0.2, "max_train_prompts": None, "max_validation_prompts": None}
    with tempfile.TemporaryDirectory() as folder:
        report = ratings_module.read_ratings(path, Path(folder) / "ratings.parquet", **given | changes)
        assert [file.name for file in Path(folder).iterdir()] == ["ratings.parquet"]
        return pq.read_table(Path(folder) / "ratings.parquet"), report


def rows_to_ratings(rows: dict[str, list[Row]], **changes: Any) -> tuple[pa.Table, Row]:
    with tempfile.TemporaryDirectory() as folder:
        report = ratings_module.rows_to_ratings(rows, Path(folder) / "ratings.parquet", **changes)
        return pq.read_table(Path(folder) / "ratings.parquet"), report


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in rows))


def write_gzip(path: Path, rows: list[Row]) -> None:
    write_jsonl(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def write_json_array(path: Path, rows: list[Row]) -> None:
    path.write_text("\n" + json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


FORMATS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gzip,
    "rows.json": write_json_array,
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}
ODD = ("zero\x00byte", "\u2028line\u2029", "e\u0301", "é", "👩\u200d👩", "\u00a0nbsp\u00a0", "\ufeffbom", "tab\tcr\r")
LONG = "longer than the csv module allows " * 5000


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_format_reads_to_the_same_table(self, tmp_path: Path, name: str) -> None:
        rows = [row(prompt, response, annotator="ignored") for prompt in ODD for response in (*ODD, LONG)]
        FORMATS[name](tmp_path / name, rows)
        table, report = read(tmp_path / name)
        assert table.schema == RATINGS_SCHEMA
        for column in COLUMNS:
            assert table[column].to_pylist() == [r[column] for r in rows]
        assert table["prompt_id"].to_pylist() == [prompt_id(r["prompt"]) for r in rows]
        assert table["response_id"].to_pylist() == [response_id(r["prompt"], r["response"]) for r in rows]
        assert len(set(table["response_id"].to_pylist())) == len(rows)
        assert report["files"] == [{"file": name, "split": None, "rows": len(rows)}]

    def test_the_hub_repository_of_helpsteer(self, tmp_path: Path) -> None:
        write_gzip(tmp_path / "train.jsonl.gz", many_rows(20))
        write_gzip(tmp_path / "validation.jsonl.gz", many_rows(4, tag="held out "))
        (tmp_path / "README.md").write_text("# HelpSteer")
        (tmp_path / ".gitattributes").write_text("*.gz filter=lfs")
        table, report = read(tmp_path)
        assert report == {
            "files": [
                {"file": "train.jsonl.gz", "split": "train", "rows": 60},
                {"file": "validation.jsonl.gz", "split": "validation", "rows": 12},
            ],
            "bad_rows": {"count": 0, "first": []},
            "validation_by_hash": False,
            "removed_from_validation": {"rows": 0, "prompts": 0},
            "limits": {
                "train": {"max_prompts": None, "rows": 0, "prompts": 0},
                "validation": {"max_prompts": None, "rows": 0, "prompts": 0},
            },
            "splits": {"train": {"rows": 60, "prompts": 20}, "validation": {"rows": 12, "prompts": 4}},
        }
        assert table["split"].to_pylist() == ["train"] * 60 + ["validation"] * 12
        assert table["row"].to_pylist() == [*range(1, 61), *range(1, 13)]
        json.dumps(report)

    def test_integers_may_be_spelled_as_floats_and_in_csv_as_text(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "rows.jsonl", [row("a", "b", 0, 1.0, 2, 3.0, 4)])
        write_csv(tmp_path / "rows.csv", [row("a", "b", "0", "1.0", " 2 ", "3", "4.00")])
        decimals = [Decimal(value) for value in ("0.0", "1.0", "2.0", "3.0", "4.0")]
        write_parquet(tmp_path / "rows.parquet", [row("a", "b", *decimals)])
        for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
            table, _ = read(tmp_path / name, validation_share=1e-9)
            assert [table[attribute][0].as_py() for attribute in ATTRIBUTES] == [0, 1, 2, 3, 4]


class TestSplits:
    def test_a_hash_of_the_prompt_alone_splits_a_single_source(self, tmp_path: Path) -> None:
        rows = many_rows(200)
        write_jsonl(tmp_path / "train.jsonl", rows)
        whole, report = read(tmp_path)
        part, _ = rows_to_ratings({"train": rows[::-1][:99]}, validation_share=0.2)
        split_of = dict(zip(whole["prompt_id"].to_pylist(), whole["split"].to_pylist(), strict=True))
        assert report["validation_by_hash"]
        assert 20 < report["splits"]["validation"]["prompts"] < 60
        for prompt, split in zip(part["prompt_id"].to_pylist(), part["split"].to_pylist(), strict=True):
            assert split_of[prompt] == split

    def test_validation_prompts_that_stand_in_train_are_removed_and_counted(self) -> None:
        rows = {"train": many_rows(10, 2), "validation": [*many_rows(3, 4), *many_rows(2, 2, tag="new ")]}
        table, report = rows_to_ratings(rows)
        assert report["removed_from_validation"] == {"rows": 12, "prompts": 3}
        assert report["splits"]["validation"] == {"rows": 4, "prompts": 2}
        assert len(table) == 24

    def test_limits_keep_the_prompts_with_the_smallest_hash(self) -> None:
        rows = {"train": many_rows(40), "validation": many_rows(20, tag="new ")}
        table, report = rows_to_ratings(rows, max_train_prompts=7, max_validation_prompts=5)
        for split, kept in (("train", 7), ("validation", 5)):
            every = sorted({prompt_id(r["prompt"]) for r in rows[split]})
            assert {r["prompt_id"] for r in table.to_pylist() if r["split"] == split} == set(every[:kept])
            assert report["limits"][split] == {
                "max_prompts": kept,
                "rows": 3 * (len(every) - kept),
                "prompts": len(every) - kept,
            }
            assert report["splits"][split] == {"rows": 3 * kept, "prompts": kept}

    def test_hash_shares_are_uniform_and_independent_of_one_another(self) -> None:
        ids = pa.table({"id": [prompt_id(str(number)) for number in range(4000)]})
        shares = query(f"SELECT {hash_share('one', 'id')} AS one, {hash_share('two', 'id')} AS two FROM ids", ids=ids)
        pairs = list(zip(shares["one"].to_pylist(), shares["two"].to_pylist(), strict=True))
        assert all(0 <= one < 1 for one, _ in pairs)
        for low in (0, 0.25, 0.5, 0.75):
            assert 800 < sum(low <= one < low + 0.25 for one, _ in pairs) < 1200
            assert 400 < sum(low <= one < low + 0.25 and two < 0.5 for one, two in pairs) < 600


BAD_ROWS = [
    (row(prompt=None), "prompt is null"),
    (row(coherence=2.5), "coherence is 2.5, not an integer 0 to 4"),
    (row(complexity="3"), "complexity is the text '3', not an integer 0 to 4"),
    (row(response="\ud800"), "response is not valid UTF-8"),
    (row(prompt="", verbosity=9), "prompt is empty; verbosity is 9, not an integer 0 to 4"),
    ({"prompt": "a"}, "column response, helpfulness, correctness, coherence, complexity, verbosity is missing"),
]
BAD_LINES = [
    (b'{"prompt": "a", ', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8"),
]


class TestBadRows:
    @pytest.mark.parametrize(
        ("line", "reason"), [*((json.dumps(bad).encode(), reason) for bad, reason in BAD_ROWS), *BAD_LINES]
    )
    def test_a_bad_row_stops_with_its_file_row_and_reason_or_is_dropped(
        self, tmp_path: Path, line: bytes, reason: str
    ) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join([json.dumps(row("a")).encode(), line, b"", json.dumps(row("b")).encode()]))
        with pytest.raises(HelpsteerError, match=r"data.on_bad_rows: drop") as caught:
            read(path)
        said = str(caught.value)
        assert f"{path}: 1 of 3 rows are bad:\n  rows.jsonl, row 2: " in said and reason in said
        table, report = read(path, on_bad_rows="drop", validation_share=1e-9)
        assert table["row"].to_pylist() == [1, 4], "a blank line is a line and no row"
        assert report["bad_rows"]["count"] == 1

    def test_nothing_good_is_an_error_even_where_bad_rows_are_dropped(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [row(""), row("")])
        with pytest.raises(HelpsteerError, match=r"no train rows are left of 2, 2 of them bad:\n  .* prompt is empty"):
            read(tmp_path, on_bad_rows="drop")

    def test_the_result_does_not_depend_on_how_many_rows_are_read_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = many_rows(20)
        rows[11]["verbosity"] = rows[30]["verbosity"] = 9
        del rows[40]["prompt"]
        given: dict[str, Any] = {"on_bad_rows": "drop", "validation_share": 0.3, "max_train_prompts": 9}
        expected = rows_to_ratings({"train": rows}, **given)
        monkeypatch.setattr(ratings_module, "BATCH_ROWS", 7)
        monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 7)
        assert rows_to_ratings({"train": rows}, **given) == expected


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.jsonl", b"", "rows.jsonl is empty: it has 0 bytes"),
            ("rows.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "rows.jsonl.gz is damaged gzip"),
            ("rows.parquet", b"PAR1 damaged PAR1", "rows.parquet is no readable parquet file"),
            ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
            ("rows.txt", b"prompt", "rows.txt is of no known format. Known are .jsonl, .json, .csv, .parquet"),
        ],
    )
    def test_a_file_that_is_bad_as_a_whole(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HelpsteerError, match=message):
            read(tmp_path / name, on_bad_rows="drop")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], r"data.source: .* does not exist"),
            (["training.jsonl", "validation.jsonl"], "holds no train file.*found training.jsonl, validation.jsonl"),
            (["train.jsonl", "train.jsonl.gz"], "more than one set of train files"),
            (["train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"], "holds 2 train shards .* there are 3"),
        ],
    )
    def test_a_folder_that_is_no_source(self, tmp_path: Path, names: list[str], message: str) -> None:
        for name in names:
            write_jsonl(tmp_path / "source" / name, [row()])
        with pytest.raises(HelpsteerError, match=message):
            read(tmp_path / "source")

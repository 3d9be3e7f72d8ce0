"""Ratings: rows of (prompt, response, five integers), read from files or memory, validated, identified and split.

Every row passes one validator, whatever it was read from. A file is read as a stream, so that a damaged row is known by
its number and costs nothing but itself; ids, splits and limits are then computed at once, in SQL.

Splits and limits depend on hashes of the prompts alone: the same prompts fall to the same side whatever else the
source holds and in whatever order, and a larger limit keeps all that a smaller one kept.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.attributes import ATTRIBUTES

HIGHEST_RATING = 4
COLUMNS = ("prompt", "response", *ATTRIBUTES)
"""What a source must hold; other columns are ignored."""

RATINGS_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("response_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        *(pa.field(attribute, pa.int8(), nullable=False) for attribute in ATTRIBUTES),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""`split` is train or validation; `file` is relative to the source, `row` counts from 1 (a line in jsonl)."""

Split = Literal["train", "validation"]
_SPLITS: tuple[Split, ...] = ("train", "validation")
_NAME = re.compile(
    r"(?P<split>train|validation)(?:-\d+-of-(?P<shards>\d+)(?:-[0-9a-f]+)?)?"
    r"(?P<format>\.jsonl|\.jsonl\.gz|\.json|\.json\.gz|\.csv|\.csv\.gz|\.parquet)"
)
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_LFS_POINTER = b"version https://git-lfs"
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_SHOWN = 10
_BATCH_ROWS = 10_000
_NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)

_Record = dict[str, Any] | str
"""A row's columns, or the reason why it could not be decoded."""


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the SHA-256 of the prompt in UTF-8."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def response_id(prompt: str, response: str) -> str:
    """First 16 hex digits of the SHA-256 of prompt, a zero byte and response in UTF-8."""
    return hashlib.sha256(prompt.encode() + b"\x00" + response.encode()).hexdigest()[:16]


def hash_share(salt: str, column: str) -> str:
    """SQL for a number in [0, 1) that depends on `column` alone; two salts give independent numbers."""
    return f"(('0x' || left(sha256('{salt}:' || {column}), 8))::UBIGINT / 4294967296.0)"


def query(sql: str, parameters: dict[str, Any] | None = None, **tables: pa.Table) -> pa.Table:
    """The result of an SQL query over Arrow tables, each known by its argument's name.

    A database in memory that never spills to disk, on two threads, since assets may run side by side. The row order
    is the query's ORDER BY and nothing else.
    """
    with duckdb.connect(":memory:", config={"threads": 2, "temp_directory": ""}) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        # Text columns of one batch must stay below Arrow's 2 GiB, hence batches of a bounded number of rows.
        return connection.sql(sql, params=parameters or {}).to_arrow_reader(_BATCH_ROWS).read_all()


def read_ratings(
    path: Path,
    *,
    on_bad_rows: str,
    validation_share: float,
    max_train_prompts: int | None,
    max_validation_prompts: int | None,
) -> tuple[pa.Table, dict[str, Any]]:
    """The validated ratings of a folder or a file, and a report of what was read, dropped and kept.

    A folder holds `train` and `validation` files (`train.jsonl.gz`, `train-00000-of-00002.parquet`, ...), itself or in
    its subfolder `data`. From a single file, and from a folder without validation files, a stable hash of the prompt
    takes the validation prompts.

    Args:
        path: folder or file; jsonl, json (an array, or lines), csv or parquet, all but the last gzipped or not.
        on_bad_rows: `error` stops at bad rows, `drop` drops and counts them.
        validation_share: share of the prompts that becomes validation where the source doesn't say, in (0, 1).
        max_train_prompts: keep the so many train prompts with the smallest prompt_id; None: all.
        max_validation_prompts: the same for validation.

    Returns the rows in reading order (RATINGS_SCHEMA) and a report that is JSON-able:
        files: `file`, `split` (null where a hash splits) and `rows` of each;
        bad_rows: `count` and the `first` ten as "file, row 3: reason";
        validation_by_hash: whether the source named no validation rows;
        removed_from_validation: `rows` and `prompts` that stand in train too;
        limits: per split, `max_prompts` and the `rows` and `prompts` it left out;
        splits: `rows` and `prompts` kept in each.

    Raises HelpsteerError where nothing is found, a file is damaged or lacks a column, or rows are bad.
    """
    files = _find_files(path)
    root = path if path.is_dir() else path.parent
    sources = ((split, file.relative_to(root).as_posix(), _records(file)) for split, file in files)
    return _validated(
        sources,
        f"the ratings in {path}",
        on_bad_rows=on_bad_rows,
        validation_share=validation_share,
        limits={"train": max_train_prompts, "validation": max_validation_prompts},
    )


def rows_to_ratings(
    rows: dict[str, list[dict[str, Any]]],
    *,
    on_bad_rows: str = "error",
    validation_share: float = 0.05,
    max_train_prompts: int | None = None,
    max_validation_prompts: int | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """As `read_ratings`, of rows in memory by split (`train`, and perhaps `validation`); their file is `embedded`."""
    by_hash = "validation" not in rows
    sources = (
        (None if by_hash else split, "embedded", enumerate(rows[split], 1)) for split in _SPLITS if split in rows
    )
    return _validated(
        sources,
        "the embedded ratings",
        on_bad_rows=on_bad_rows,
        validation_share=validation_share,
        limits={"train": max_train_prompts, "validation": max_validation_prompts},
    )


def _validated(
    sources: Iterable[tuple[Split | None, str, Iterable[tuple[int, _Record]]]],
    origin: str,
    *,
    on_bad_rows: str,
    validation_share: float,
    limits: dict[Split, int | None],
) -> tuple[pa.Table, dict[str, Any]]:
    """Validate (split, file, numbered records) and arrange what is good."""
    collected = _Collected()
    files = []
    for split, file, records in sources:
        rows = collected.add(split, file, records)
        files.append({"file": file, "split": split, "rows": rows})
    listed = "".join(f"\n  {reason}" for reason in collected.first_bad)
    if collected.bad_rows > len(collected.first_bad):
        listed += f"\n  ... and {collected.bad_rows - len(collected.first_bad)} more"
    total = sum(file["rows"] for file in files)
    if collected.bad_rows and on_bad_rows == "error":
        raise HelpsteerError(
            f"{origin}: {collected.bad_rows} of {total} rows are bad:{listed}\n"
            "Mend them, or set `data.on_bad_rows: drop` to drop and count them."
        )
    if collected.bad_rows == total:
        raise HelpsteerError(
            f"{origin}: not one of the {total} rows is good:{listed}\nCheck that `data.source` is meant."
        )
    table, arranged = _arrange(collected.table(), validation_share, limits)
    if not arranged["splits"]["train"]["rows"]:
        raise HelpsteerError(
            f"{origin}: no train rows are left of {total}, {collected.bad_rows} of them bad:{listed}\nGive more rows."
        )
    return table, {
        "files": files,
        "bad_rows": {"count": collected.bad_rows, "first": collected.first_bad},
        "validation_by_hash": all(file["split"] is None for file in files),
        **arranged,
    }


class _Collected:
    """Good rows as Arrow batches, bad ones as reasons."""

    _SCHEMA = pa.schema(
        [
            pa.field("split", pa.string()),
            *(RATINGS_SCHEMA.field(name) for name in (*COLUMNS, "file", "row")),
        ]
    )

    def __init__(self) -> None:
        self.bad_rows = 0
        self.first_bad: list[str] = []
        self._batches: list[pa.RecordBatch] = []

    def table(self) -> pa.Table:
        return pa.Table.from_batches(self._batches, self._SCHEMA)

    def add(self, split: Split | None, file: str, records: Iterable[tuple[int, _Record]]) -> int:
        """Validate a file's records; returns how many there were."""
        count = 0
        good: list[tuple[Any, ...]] = []
        keys: set[str] = set()  # of the records that lack a column
        every_record_lacks_columns = True
        for number, record in records:
            count += 1
            if isinstance(record, dict):
                try:
                    values = [record[column] for column in COLUMNS]
                except KeyError:
                    keys |= record.keys()
                    lacking = [column for column in COLUMNS if column not in record]
                    reason = f"column {', '.join(lacking)} is missing"
                else:
                    every_record_lacks_columns = False
                    ratings = [_rating(value) for value in values[2:]]
                    if None not in ratings and _is_text(values[0]) and _is_text(values[1]):
                        good.append((split, values[0], values[1], *ratings, file, number))
                        if len(good) == _BATCH_ROWS:
                            self._keep(good)
                        continue
                    reason = "; ".join(_complaints(values))
            else:
                reason = record
            self.bad_rows += 1
            if len(self.first_bad) < _SHOWN:
                self.first_bad.append(f"{file}, row {number}: {reason}")
        self._keep(good)
        if not count:
            raise HelpsteerError(f"{file} is empty: it holds no rows. Remove it or give it rows.")
        if keys and every_record_lacks_columns:
            _require_columns(file, keys)
        return count

    def _keep(self, good: list[tuple[Any, ...]]) -> None:
        if good:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*good, strict=True), self._SCHEMA, strict=True)
            ]
            self._batches.append(pa.record_batch(columns, schema=self._SCHEMA))
            good.clear()


def _is_text(value: object) -> bool:
    """Whether it is a string of more than white space that UTF-8 can hold."""
    if not isinstance(value, str) or not value or value.isspace():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rating(value: object) -> int | None:
    """The integer 0 to 4 that a value is (3.0 is 3), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return int(value) if 0 <= value <= HIGHEST_RATING and value == int(value) else None


def _complaints(values: list[Any]) -> Iterator[str]:
    """Why a row with these values, in the order of COLUMNS, is bad."""
    for column, value in zip(COLUMNS, values, strict=True):
        shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
        if value is None:
            yield f"{column} is null"
        elif column in ATTRIBUTES:
            if _rating(value) is None:
                what = f"the text {shown}" if isinstance(value, str) else shown
                yield f"{column} is {what}, not an integer 0 to {HIGHEST_RATING}"
        elif not isinstance(value, str):
            yield f"{column} is {shown}, not text"
        elif not value or value.isspace():
            yield f"{column} is empty"
        elif not _is_text(value):
            undecodable = all("\udc80" <= letter <= "\udcff" for letter in value if "\ud800" <= letter <= "\udfff")
            yield f"{column} is not valid UTF-8" if undecodable else f"{column} holds half a surrogate pair"


def _arrange(
    rows: pa.Table, validation_share: float, limits: dict[Split, int | None]
) -> tuple[pa.Table, dict[str, Any]]:
    """Give rows their ids and split, remove what must not stay; returns the ratings and what was counted."""
    rows = rows.append_column("position", pa.array(range(len(rows)), pa.int64()))
    keys = query(
        f"""
        WITH identified AS (
            SELECT position, left(sha256(prompt), 16) AS prompt_id,
                left(sha256(encode(prompt) || '\\x00'::BLOB || encode(response)), 16) AS response_id, split
            FROM source
        ), divided AS (
            SELECT position, prompt_id, response_id, coalesce(split, CASE
                WHEN {hash_share("validation", "prompt_id")} < $validation_share THEN 'validation' ELSE 'train'
            END) AS split
            FROM identified
        ), judged AS (
            SELECT *, split = 'validation' AND prompt_id IN (
                SELECT prompt_id FROM divided WHERE split = 'train'
            ) AS in_both
            FROM divided
        ), ranked AS (
            SELECT *, dense_rank() OVER (PARTITION BY split, in_both ORDER BY prompt_id) AS prompt_rank FROM judged
        )
        SELECT prompt_id, response_id, split, CASE
            WHEN in_both THEN 'in both'
            WHEN prompt_rank > CASE split WHEN 'train' THEN $train ELSE $validation END THEN 'left out'
            ELSE 'kept' END AS fate
        FROM ranked ORDER BY position
        """,
        {"validation_share": validation_share, **{split: limit or len(rows) for split, limit in limits.items()}},
        source=rows,
    )
    counts = {
        (row["split"], row["fate"]): {"rows": row["rows"], "prompts": row["prompts"]}
        for row in query(
            "SELECT split, fate, count(*) AS rows, count(DISTINCT prompt_id) AS prompts FROM keys GROUP BY split, fate",
            keys=keys,
        ).to_pylist()
    }
    none = {"rows": 0, "prompts": 0}
    columns = {name: rows[name] for name in rows.column_names} | {
        name: keys[name] for name in ("split", "prompt_id", "response_id")
    }
    ratings = pa.Table.from_arrays([columns[field.name] for field in RATINGS_SCHEMA], schema=RATINGS_SCHEMA)
    return ratings.filter(pc.equal(keys["fate"], "kept")), {
        "removed_from_validation": counts.get(("validation", "in both"), none),
        "limits": {
            split: {"max_prompts": limit, **counts.get((split, "left out"), none)} for split, limit in limits.items()
        },
        "splits": {split: counts.get((split, "kept"), none) for split in _SPLITS},
    }


def _find_files(path: Path) -> list[tuple[Split | None, Path]]:
    """(split, file) in reading order; the split is None where a hash of the prompt decides."""
    if path.is_file():
        if not path.name.removesuffix(".gz").endswith(_FORMATS) or path.name.endswith(".parquet.gz"):
            raise HelpsteerError(
                f"data.source: {path} is of no known format. Known are {', '.join(_FORMATS)} by the name's ending, all "
                "but .parquet also with .gz"
            )
        return [(None, path)]
    if not path.is_dir():
        raise HelpsteerError(f"data.source: {path} does not exist. Give a folder or a file that does.")
    try:
        names = sorted(path.iterdir()) + (sorted((path / "data").iterdir()) if (path / "data").is_dir() else [])
    except OSError as error:
        raise HelpsteerError(f"data.source: {error.filename} cannot be read: {error.strerror}") from error
    matches = [(match, file) for file in names if (match := _NAME.fullmatch(file.name)) and file.is_file()]
    found = {split: [(match, file) for match, file in matches if match["split"] == split] for split in _SPLITS}
    for split, candidates in found.items():
        _require_one_set(path, split, candidates)
    if not found["train"]:
        holds = ", ".join(file.relative_to(path).as_posix() for file in names[:_SHOWN]) or "nothing"
        raise HelpsteerError(
            f"data.source: {path} holds no train file. Looked there and in its subfolder data/ for train.jsonl, "
            f"train.json, train.csv (each also with .gz), train.parquet and shards such as "
            f"train-00000-of-00002.parquet; found {holds}. Rename the file, or give its own path"
        )
    split_by_hash = not found["validation"]
    return [(None if split_by_hash else split, file) for split in _SPLITS for _, file in found[split]]


def _require_one_set(folder: Path, split: Split, candidates: list[tuple[re.Match[str], Path]]) -> None:
    """Refuse files that may be copies of one another, and shards that are not all there."""
    listed = ", ".join(file.relative_to(folder).as_posix() for _, file in candidates)
    if len({(file.parent, match["format"], match["shards"]) for match, file in candidates}) > 1:
        raise HelpsteerError(
            f"data.source: {folder} holds more than one set of {split} files ({listed}), and reading both might count "
            "rows twice. Leave one"
        )
    for match, _ in candidates[:1]:
        if match["shards"] and len(candidates) != int(match["shards"]):
            raise HelpsteerError(
                f"data.source: {folder} holds {len(candidates)} {split} shards ({listed}), and their names say there "
                f"are {int(match['shards'])}. Get the others, or rename the files"
            )


def _records(file: Path) -> Iterator[tuple[int, _Record]]:
    """The numbered records of a file, by its name's ending. Raises HelpsteerError where the file as a whole is bad."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if not start:
            raise HelpsteerError(f"{file} is empty: it has 0 bytes. Remove it or get it again")
        if start == _LFS_POINTER:
            raise HelpsteerError(
                f"{file} is a Git LFS pointer, not the data: run `git lfs pull` in its repository, or download it"
            )
        ending = Path(file.name.removesuffix(".gz")).suffix
        if ending == ".parquet":
            yield from _parquet_records(file)
        else:
            read = {".csv": _csv_records, ".json": _json_records, ".jsonl": _json_lines}[ending]
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                yield from read(file, stream)
    except gzip.BadGzipFile as error:
        raise HelpsteerError(f"{file} is not gzip, though its name says so: rename it or get it again") from error
    except (EOFError, zlib.error) as error:
        raise HelpsteerError(f"{file} is damaged gzip ({error}): get it again") from error
    except OSError as error:
        raise HelpsteerError(f"{file} cannot be read: {error.strerror or error}") from error


def _require_columns(file: Path | str, names: Iterable[str]) -> None:
    names = list(names)
    lacking = [column for column in COLUMNS if column not in names]
    if lacking:
        raise HelpsteerError(
            f"{file} has no column {', '.join(lacking)}. It has: {', '.join(sorted(map(str, names))) or 'none'}. "
            f"Needed are {', '.join(COLUMNS)}"
        )


def _json_lines(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, _Record]]:
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line:
            try:
                yield number, _json_object(_decoded_json(line))
            except ValueError as error:
                yield number, str(error)


def _json_records(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    """One array; or lines, which are often named so too."""
    content = stream.read()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_lines(file, content.split(b"\n"))
        return
    try:
        records = _decoded_json(content)
    except ValueError as error:
        raise HelpsteerError(f"{file} is {error}. Mend it or get it again") from error
    for number, record in enumerate(records, 1):
        yield number, _json_object(record)


def _json_object(value: Any) -> _Record:
    return value if isinstance(value, dict) else f"a JSON {_JSON_NAMES[type(value)]}, not an object"


def _decoded_json(content: bytes) -> Any:
    """Raises ValueError with the reason, in words that go on from "is"."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} at {line}character {error.colno}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _csv_records(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    # What is not UTF-8 becomes lone surrogates, which the validator complains of in the row where they stand.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses responses of more than 128 KiB
    reader = csv.reader(text, strict=True)
    try:
        names = next(reader, [])
        _require_columns(file, names)
        for number, fields in enumerate(filter(None, reader), 1):
            if len(fields) != len(names):
                yield number, f"it has {len(fields)} fields, the header names {len(names)}"
                continue
            record = dict(zip(names, fields, strict=True))
            yield number, record | {attribute: _number(record[attribute]) for attribute in ATTRIBUTES}
    except csv.Error as error:
        raise HelpsteerError(
            f"{file} is not valid CSV near line {reader.line_num}: {error}. Mend the quotes there or get it again"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _number(text: str) -> float | str | None:
    """CSV knows text only: the number it spells, None for nothing, else the text."""
    if _NUMBER.fullmatch(text):
        return float(text)
    return text or None


def _parquet_records(file: Path) -> Iterator[tuple[int, _Record]]:
    try:
        with pq.ParquetFile(file) as reader:
            _require_columns(file, reader.schema_arrow.names)
            number = 0
            for batch in reader.iter_batches(_BATCH_ROWS, columns=list(COLUMNS)):
                for values in zip(*(_values(batch.column(column)) for column in COLUMNS), strict=True):
                    number += 1
                    yield number, dict(zip(COLUMNS, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise HelpsteerError(f"{file} is no readable parquet file ({error}): get it again") from error


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values; what is not UTF-8 becomes lone surrogates, as in CSV."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in binary]

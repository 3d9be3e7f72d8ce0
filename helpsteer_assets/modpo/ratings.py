"""Ratings: rows of (prompt, response, five integers), read from files or memory, validated, identified and split.

Every row passes one validator, whatever it was read from. A file is read as a stream, so that a damaged row is known by
its number and costs nothing but itself, and good rows go to disk, so that memory holds some thousand of them at a time,
or some megabytes where texts are long.
Of all rows it holds the ids; from these splits and limits are then computed at once, in SQL.

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
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, AnyStr, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.attributes import ATTRIBUTES
from helpsteer_assets.modpo.tables import BATCH_ROWS, query, write_parquet

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
_SHOWN_CHARACTERS = 40
_BATCH_CHARACTERS = 2**26
"""A batch of rows ends here at the latest: ten thousand texts of a megabyte would fill the memory."""
_PARQUET_ROWS = 1000
_LINE_LIMIT = 2**27
"""Bytes (CSV: characters) of a line; a gzipped file of kilobytes can hold one of gigabytes."""
_ARRAY_LIMIT = 2**30
"""Bytes of a JSON array, which takes several times as much memory."""
_RATINGS = frozenset(range(HIGHEST_RATING + 1))
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


def read_ratings(
    path: Path,
    file: Path,
    *,
    on_bad_rows: str,
    validation_share: float,
    max_train_prompts: int | None,
    max_validation_prompts: int | None,
) -> dict[str, Any]:
    """Write the validated ratings of a folder or a file; returns a report of what was read, dropped and kept.

    A folder holds `train` and `validation` files (`train.jsonl.gz`, `train-00000-of-00002.parquet`, ...), itself or in
    its subfolder `data`. From a single file, and from a folder without validation files, a stable hash of the prompt
    takes the validation prompts.

    Args:
        path: folder or file; jsonl, json (an array, or lines), csv or parquet, all but the last gzipped or not. Of
            these a json array alone has to fit in memory.
        file: the Parquet file to write, rows in reading order (RATINGS_SCHEMA); its folder is used for temporary files.
        on_bad_rows: `error` stops at bad rows, `drop` drops and counts them.
        validation_share: share of the prompts that becomes validation where the source doesn't say, in (0, 1).
        max_train_prompts: keep the so many train prompts with the smallest prompt_id; None: all.
        max_validation_prompts: the same for validation.

    Returns a report that is JSON-able:
        files: `file`, `split` (null where a hash splits) and `rows` of each;
        bad_rows: `count` and the `first` ten as "file, row 3: reason";
        validation_by_hash: whether the source named no validation rows;
        removed_from_validation: `rows` and `prompts` that stand in train too;
        limits: per split, `max_prompts` and the `rows` and `prompts` it left out;
        splits: `rows` and `prompts` kept in each.

    Raises HelpsteerError where nothing is found, a file is damaged or lacks a column, or rows are bad.
    """
    found = _find_files(path)
    root = path if path.is_dir() else path.parent
    sources = ((split, source.relative_to(root).as_posix(), _records(source)) for split, source in found)
    return _validated(
        sources,
        f"the ratings in {path}",
        file,
        on_bad_rows=on_bad_rows,
        validation_share=validation_share,
        limits={"train": max_train_prompts, "validation": max_validation_prompts},
    )


def rows_to_ratings(
    rows: dict[str, list[dict[str, Any]]],
    file: Path,
    *,
    on_bad_rows: str = "error",
    validation_share: float = 0.05,
    max_train_prompts: int | None = None,
    max_validation_prompts: int | None = None,
) -> dict[str, Any]:
    """As `read_ratings`, of rows in memory by split (`train`, and perhaps `validation`); their file is `embedded`."""
    by_hash = "validation" not in rows
    sources = (
        (None if by_hash else split, "embedded", enumerate(rows[split], 1)) for split in _SPLITS if split in rows
    )
    return _validated(
        sources,
        "the embedded ratings",
        file,
        on_bad_rows=on_bad_rows,
        validation_share=validation_share,
        limits={"train": max_train_prompts, "validation": max_validation_prompts},
    )


def _validated(
    sources: Iterable[tuple[Split | None, str, Iterable[tuple[int, _Record]]]],
    origin: str,
    file: Path,
    *,
    on_bad_rows: str,
    validation_share: float,
    limits: dict[Split, int | None],
) -> dict[str, Any]:
    """Validate (split, file, numbered records) and write what is good and kept."""
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=file.parent) as scratch:
        with _Collected(Path(scratch) / "rows.arrow") as collected:
            files = [
                {"file": name, "split": split, "rows": collected.add(split, name, records)}
                for split, name, records in sources
            ]
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
        fates, arranged = _arrange(collected.ids(), validation_share, limits)
        if not arranged["splits"]["train"]["rows"]:
            raise HelpsteerError(
                f"{origin}: no train rows are left of {total}, {collected.bad_rows} of them bad:{listed}\n"
                "Give more rows."
            )
        write_parquet(collected.kept(fates), RATINGS_SCHEMA, file)
    return {
        "files": files,
        "bad_rows": {"count": collected.bad_rows, "first": collected.first_bad},
        "validation_by_hash": all(file["split"] is None for file in files),
        **arranged,
    }


class _Collected:
    """Good rows in a file, their ids in memory, bad rows as reasons."""

    _ROWS = pa.schema([RATINGS_SCHEMA.field(name) for name in (*COLUMNS, "file", "row")])
    _IDS = pa.schema(
        [pa.field("split", pa.string()), RATINGS_SCHEMA.field("prompt_id"), RATINGS_SCHEMA.field("response_id")]
    )

    def __init__(self, path: Path) -> None:
        self.bad_rows = 0
        self.first_bad: list[str] = []
        self._path = path
        self._ids: list[pa.RecordBatch] = []

    def __enter__(self) -> "_Collected":
        self._writer = pa.ipc.new_stream(self._path, self._ROWS, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def ids(self) -> pa.Table:
        """split (null where a hash decides), prompt_id, response_id of the good rows, in the order they came."""
        return pa.Table.from_batches(self._ids, self._IDS)

    def kept(self, fates: pa.Table) -> Iterator[pa.RecordBatch]:
        """The rows to keep, with all columns of RATINGS_SCHEMA.

        Args:
            fates: `split` and `fate` of every row of `ids`.
        """
        fates = fates.combine_chunks()
        position = 0
        with pa.ipc.open_stream(self._path) as batches:
            for rows, ids in zip(batches, self._ids, strict=True):
                (found,) = fates.slice(position, rows.num_rows).to_batches()
                columns = {name: batch[name] for batch in (rows, ids, found) for name in batch.schema.names}
                yield pa.RecordBatch.from_pydict(columns).filter(pc.equal(found["fate"], "kept"))
                position += rows.num_rows

    def add(self, split: Split | None, file: str, records: Iterable[tuple[int, _Record]]) -> int:
        """Validate a file's records; returns how many there were."""
        count, any_complete = 0, False
        keys: set[str] = set()  # of the records that lack a column
        for batch in _batches(records):
            count += len(batch)
            if _all_good(batch):
                any_complete = True
                self._keep(split, file, batch)
                continue
            judged = [(number, record, _reason(record)) for number, record in batch]
            self._keep(split, file, [(number, record) for number, record, reason in judged if reason is None])
            bad = [f"{file}, row {number}: {reason}" for number, _, reason in judged if reason is not None]
            self.bad_rows += len(bad)
            self.first_bad += bad[: _SHOWN - len(self.first_bad)]
            objects = [record for _, record in batch if isinstance(record, dict)]
            incomplete = [record for record in objects if _lacking(record)]
            any_complete |= len(incomplete) < len(objects)
            keys.update(key for record in incomplete for key in record if key in COLUMNS or len(keys) <= _SHOWN)
        if not count:
            raise HelpsteerError(f"{file} is empty: it holds no rows. Remove it or give it rows.")
        if keys and not any_complete:
            _require_columns(file, keys)
        return count

    def _keep(self, split: Split | None, file: str, good: list[tuple[int, Any]]) -> None:
        if not good:
            return
        columns = {column: [record[column] for _, record in good] for column in COLUMNS}
        prompts, responses = columns["prompt"], columns["response"]
        ratings = {attribute: [int(value) for value in columns[attribute]] for attribute in ATTRIBUTES}
        numbers = [number for number, _ in good]
        self._writer.write_batch(
            pa.RecordBatch.from_pydict(
                columns | ratings | {"file": [file] * len(good), "row": numbers}, schema=self._ROWS
            )
        )
        ids = {
            "split": [split] * len(good),
            "prompt_id": list(map(prompt_id, prompts)),
            "response_id": list(map(response_id, prompts, responses)),
        }
        self._ids.append(pa.RecordBatch.from_pydict(ids, schema=self._IDS))


def _batches(records: Iterable[tuple[int, _Record]]) -> Iterator[list[tuple[int, _Record]]]:
    """Records by the so many, fewer where their texts are long."""
    batch, characters = [], 0
    for numbered in records:
        batch.append(numbered)
        record = numbered[1]
        if isinstance(record, dict):
            characters += sum([len(value) for value in record.values() if type(value) is str])
        if len(batch) >= BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _all_good(records: list[tuple[int, _Record]]) -> bool:
    """Whether no record is bad, found out by the column: most records are good, and this is faster than one by one."""
    try:
        prompts, responses, *ratings = ([record[column] for _, record in records] for column in COLUMNS)  # type: ignore[index]
    except (KeyError, TypeError):
        return False
    return all(map(_all_texts, (prompts, responses))) and all(map(_all_ratings, ratings))


def _all_texts(values: list[Any]) -> bool:
    """Whether `_is_text` holds for all."""
    if set(map(type, values)) != {str} or not all(values) or any(map(str.isspace, values)):
        return False
    return _is_text(".".join(values))


def _all_ratings(values: list[Any]) -> bool:
    """Whether `_rating` finds one in all; True, which equals 1, is none."""
    return set(map(type, values)) <= {int, float, Decimal} and set(values) <= _RATINGS


def _lacking(record: dict[str, Any]) -> list[str]:
    return [column for column in COLUMNS if column not in record]


def _reason(record: _Record) -> str | None:
    """Why a record is bad; None where it is good."""
    if isinstance(record, str):
        return record
    if lacking := _lacking(record):
        return f"column {', '.join(lacking)} is missing"
    return "; ".join(_complaints([record[column] for column in COLUMNS])) or None


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
        if value is None:
            yield f"{column} is null"
        elif column in ATTRIBUTES:
            if _rating(value) is None:
                what = f"the text {_shown(value)}" if isinstance(value, str) else _shown(value)
                yield f"{column} is {what}, not an integer 0 to {HIGHEST_RATING}"
        elif not isinstance(value, str):
            yield f"{column} is {_shown(value)}, not text"
        elif not value or value.isspace():
            yield f"{column} is empty"
        elif not _is_text(value):
            undecodable = all("\udc80" <= letter <= "\udcff" for letter in value if "\ud800" <= letter <= "\udfff")
            yield f"{column} is not valid UTF-8" if undecodable else f"{column} holds half a surrogate pair"


def _shown(value: object) -> str:
    """A value in few printable characters."""
    try:
        text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _arrange(
    ids: pa.Table, validation_share: float, limits: dict[Split, int | None]
) -> tuple[pa.Table, dict[str, Any]]:
    """Give rows a split and decide which must not stay; returns `split` and `fate` of each, and what was counted."""
    fates = query(
        f"""
        WITH divided AS (
            SELECT position, prompt_id, coalesce(split, CASE
                WHEN {hash_share("validation", "prompt_id")} < $validation_share THEN 'validation' ELSE 'train'
            END) AS split
            FROM ids
        ), judged AS (
            SELECT *, split = 'validation' AND prompt_id IN (
                SELECT prompt_id FROM divided WHERE split = 'train'
            ) AS in_both
            FROM divided
        ), ranked AS (
            SELECT *, dense_rank() OVER (PARTITION BY split, in_both ORDER BY prompt_id) AS prompt_rank FROM judged
        )
        SELECT prompt_id, split, CASE
            WHEN in_both THEN 'in both'
            WHEN prompt_rank > CASE split WHEN 'train' THEN $train ELSE $validation END THEN 'left out'
            ELSE 'kept' END AS fate
        FROM ranked ORDER BY position
        """,
        {"validation_share": validation_share, **{split: limit or len(ids) for split, limit in limits.items()}},
        ids=ids.append_column("position", pa.array(np.arange(len(ids)))),
    )
    counts = {
        (row["split"], row["fate"]): {"rows": row["rows"], "prompts": row["prompts"]}
        for row in query(
            "SELECT split, fate, count(*) AS rows, count(DISTINCT prompt_id) AS prompts FROM rows GROUP BY split, fate",
            rows=fates,
        ).to_pylist()
    }
    none = {"rows": 0, "prompts": 0}
    return fates, {
        "removed_from_validation": counts.get(("validation", "in both"), none),
        "limits": {
            split: {"max_prompts": limit, **counts.get((split, "left out"), none)} for split, limit in limits.items()
        },
        "splits": {split: counts.get((split, "kept"), none) for split in _SPLITS},
    }


def _find_files(path: Path) -> list[tuple[Split | None, Path]]:
    """(split, file) in reading order; the split is None where a hash of the prompt decides."""
    try:
        return _found_files(path)
    except OSError as error:
        raise HelpsteerError(f"data.source: {error.filename} cannot be read: {error.strerror}") from error


def _found_files(path: Path) -> list[tuple[Split | None, Path]]:
    if path.is_file():
        if not path.name.removesuffix(".gz").endswith(_FORMATS) or path.name.endswith(".parquet.gz"):
            raise HelpsteerError(
                f"data.source: {path} is of no known format. Known are {', '.join(_FORMATS)} by the name's ending, all "
                "but .parquet also with .gz"
            )
        return [(None, path)]
    if not path.is_dir():
        what = "is neither a folder nor a regular file" if path.exists() else "does not exist"
        raise HelpsteerError(f"data.source: {path} {what}. Give the path of a folder or a file.")
    names = sorted(path.iterdir()) + (sorted((path / "data").iterdir()) if (path / "data").is_dir() else [])
    matches = [(match, file) for file in names if (match := _NAME.fullmatch(file.name))]
    if no_file := next((file for _, file in matches if not file.is_file()), None):
        raise HelpsteerError(
            f"data.source: {no_file} has the name of a file of ratings, and is no regular file (a folder, a pipe, or "
            "a link to nothing). Remove or rename it"
        )
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
                beginning = stream.peek(2)[:2]
                if beginning in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in beginning:
                    raise HelpsteerError(
                        f"{file} is UTF-16 text: convert it to UTF-8, such as by `iconv -f UTF-16 -t UTF-8`"
                    )
                yield from read(file, stream)
    except gzip.BadGzipFile as error:
        raise HelpsteerError(
            f"{file} is not gzip, though its name says so, or not to its end: rename it or get it again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise HelpsteerError(f"{file} is damaged gzip ({error}): get it again") from error
    except OSError as error:
        raise HelpsteerError(f"{file} cannot be read: {error.strerror or error}") from error


def _require_columns(file: Path | str, names: Iterable[str]) -> None:
    names = sorted(names)
    lacking = [column for column in COLUMNS if column not in names]
    if lacking:
        shown = [name if name in COLUMNS else _shown(name)[1:-1] for name in names[:_SHOWN]]
        shown += ["..."] if len(names) > _SHOWN else []
        raise HelpsteerError(
            f"{file} has no column {', '.join(lacking)}. It has: {', '.join(shown) or 'none'}. "
            f"Needed are {', '.join(COLUMNS)}"
        )
    for column in COLUMNS:
        if names.count(column) > 1:
            raise HelpsteerError(f"{file} has {names.count(column)} columns {column}: rename all but the one meant")


def _lines(file: Path, stream: IO[AnyStr]) -> Iterator[AnyStr]:
    number = 1
    while line := stream.readline(_LINE_LIMIT):
        if len(line) == _LINE_LIMIT:
            raise HelpsteerError(f"{file} is no file of ratings: line {number} is longer than {_LINE_LIMIT} characters")
        yield line
        number += 1


def _json_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    for number, line in enumerate(_lines(file, stream), 1):
        line = line.strip()
        if line:
            try:
                yield number, _json_object(_decoded_json(line))
            except ValueError as error:
                yield number, str(error)


def _json_records(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    """One array; or lines, which are often named so too."""
    start = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    while not start and (more := stream.read(4096)):
        start = more.lstrip()
    stream.seek(0)
    if not start.startswith(b"["):
        yield from _json_lines(file, stream)
        return
    content = stream.read(_ARRAY_LIMIT)
    if len(content) == _ARRAY_LIMIT:
        raise HelpsteerError(f"{file} is too large for a JSON array: write it as jsonl, one object a line")
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
        return _JSON.decode(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} at {line}character {error.colno}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, unless it is not clear what one of COLUMNS is in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        for column in COLUMNS:
            if keys.count(column) > 1:
                raise ValueError(f"an object with {keys.count(column)} keys {column}")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object_of_pairs)


def _csv_records(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    # What is not UTF-8 becomes lone surrogates, which the validator complains of in the row where they stand.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(_LINE_LIMIT)  # the default refuses responses of more than 128 KiB
    reader = csv.reader(_lines(file, text), strict=True)
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
        # Not prefetched, and read piece by piece: a row group may hold all rows of the file.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as reader:
            _require_columns(file, reader.schema_arrow.names)
            _require_types(file, reader.schema_arrow)
            number = 0
            for batch in reader.iter_batches(_PARQUET_ROWS, columns=list(COLUMNS)):
                for values in zip(*(_values(batch.column(column)) for column in COLUMNS), strict=True):
                    number += 1
                    yield number, dict(zip(COLUMNS, values, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise HelpsteerError(f"{file} is no readable parquet file ({error}): get it again") from error


def _require_types(file: Path, schema: pa.Schema) -> None:
    """A column of another type has not one good row, and some types have values that Python cannot hold."""
    number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    for column in COLUMNS:
        found = schema.field(column).type
        kind = found.value_type if pa.types.is_dictionary(found) else found
        wanted, fitting = ("numbers", number) if column in ATTRIBUTES else ("text", text)
        if not any(fits(kind) for fits in (*fitting, pa.types.is_null)):
            raise HelpsteerError(f"{file}: column {column} is of type {found}, not {wanted}: write the file anew")


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values; what is not UTF-8 becomes lone surrogates, as in CSV."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in binary]

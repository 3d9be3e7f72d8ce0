"""Rows from files: jsonl, json, csv and parquet."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES

COLUMNS = ("prompt", "response", *ATTRIBUTES)
"""The columns that a source must have; others are ignored."""


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


_PARQUET_ROWS = 1000


_LINE_LIMIT = 2**27
"""Bytes (CSV: characters) of a line; a gzipped file of kilobytes can hold one of gigabytes."""


_ARRAY_LIMIT = 2**30
"""Bytes of a JSON array, which takes several times as much memory."""


_NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)


_Record = dict[str, Any] | str
"""A row's columns, or the reason why it could not be decoded."""


def _shown(value: object) -> str:
    """A value in few printable characters."""
    try:
        text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


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
    by_split = {split: [(match, file) for match, file in matches if match["split"] == split] for split in _SPLITS}
    for split, candidates in by_split.items():
        _require_one_set(path, split, candidates)
    if not by_split["train"]:
        holds = ", ".join(file.relative_to(path).as_posix() for file in names[:_SHOWN]) or "nothing"
        raise HelpsteerError(
            f"data.source: {path} holds no train file. Looked there and in its subfolder data/ for train.jsonl, "
            f"train.json, train.csv (each also with .gz), train.parquet and shards such as "
            f"train-00000-of-00002.parquet; found {holds}. Rename the file, or give its own path"
        )
    split_by_hash = not by_split["validation"]
    return [(None if split_by_hash else split, file) for split in _SPLITS for _, file in by_split[split]]


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
        with file.open("rb") as plain:
            start = plain.read(len(_LFS_POINTER))
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
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
                stream: Any = opened
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
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        for column in COLUMNS:
            if keys.count(column) > 1:
                raise ValueError(f"an object with {keys.count(column)} keys {column}")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_object_of_pairs)


def _csv_records(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, _Record]]:
    # Bytes that are not UTF-8 become lone surrogates, and the validator names the row that holds them.
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
        given = schema.field(column).type
        kind = given.value_type if pa.types.is_dictionary(given) else given
        wanted, fitting = ("numbers", number) if column in ATTRIBUTES else ("text", text)
        if not any(fits(kind) for fits in (*fitting, pa.types.is_null)):
            raise HelpsteerError(f"{file}: column {column} is of type {given}, not {wanted}: write the file anew")


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values; what is not UTF-8 becomes lone surrogates, as in CSV."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in binary]

"""Ratings: rows of (prompt, response, five integers), read from files or memory, validated, identified and split.

Every row passes one validator, whatever it was read from. A file is read as a stream, so that a damaged row is known by
its number and costs nothing but itself, and good rows go to disk, so that memory holds some thousand of them at a time,
or some megabytes where texts are long. It holds the ids of all rows, from which splits and limits are then computed at
once, in SQL.

Splits and limits depend on hashes of the prompts alone: the same prompts fall to the same side whatever else the
source holds and in whatever order, and a larger limit keeps all that a smaller one kept.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.readers import (
    _SHOWN,
    _SPLITS,
    COLUMNS,
    Split,
    _find_files,
    _Record,
    _records,
    _shown,
)
from helpsteer_assets.modpo.data.tables import BATCH_ROWS, query, write_parquet

HIGHEST_RATING = 4

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

_BATCH_CHARACTERS = 2**26
"""A batch of rows ends here at the latest: ten thousand texts of a megabyte would fill the memory."""
_RATINGS = frozenset(range(HIGHEST_RATING + 1))


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
        path: folder or file; jsonl, json (an array, or lines), csv or parquet, all but the last gzipped or not. Only
            a json array has to fit in memory.
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
    files = _find_files(path)
    root = path if path.is_dir() else path.parent
    sources = [(split, source.relative_to(root).as_posix(), _records(source)) for split, source in files]
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
            files: list[dict[str, Any]] = [
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
        fates, arranged = _arrange(collected.ids(), validation_share, limits)
        if not arranged["splits"]["train"]["rows"]:
            raise HelpsteerError(
                f"{origin}: no train rows are left of {total}, {collected.bad_rows} of them bad:{listed}\n"
                "Give more rows, and check that `data.source` is meant."
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
                (judged,) = fates.slice(position, rows.num_rows).to_batches()
                columns = {name: batch[name] for batch in (rows, ids, judged) for name in batch.schema.names}
                yield pa.RecordBatch.from_pydict(columns).filter(pc.equal(judged["fate"], "kept"))
                position += rows.num_rows

    def add(self, split: Split | None, file: str, records: Iterable[tuple[int, _Record]]) -> int:
        """Validate a file's records; returns how many there were."""
        count = 0
        for batch in _batches(records):
            count += len(batch)
            judged = [(number, record, _reason(record)) for number, record in batch]
            self._keep(split, file, [(number, record) for number, record, reason in judged if reason is None])
            bad = [f"{file}, row {number}: {reason}" for number, _, reason in judged if reason is not None]
            self.bad_rows += len(bad)
            self.first_bad += bad[: _SHOWN - len(self.first_bad)]
        if not count:
            raise HelpsteerError(f"{file} is empty: it holds no rows. Remove it or give it rows.")
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


def _reason(record: _Record) -> str | None:
    """Why a record is bad; None where it is good."""
    if isinstance(record, str):
        return record
    if lacking := [column for column in COLUMNS if column not in record]:
        return f"column {', '.join(lacking)} is missing"
    return "; ".join(filter(None, (_complaint(column, record[column]) for column in COLUMNS))) or None


def _complaint(column: str, value: object) -> str | None:
    """Why the value of a column is bad: no integer 0 to 4 (3.0 is 3), or not text of more than white space."""
    if value is None:
        return f"{column} is null"
    if column in ATTRIBUTES:
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and value in _RATINGS:
            return None
        what = f"the text {_shown(value)}" if isinstance(value, str) else _shown(value)
        return f"{column} is {what}, not an integer 0 to {HIGHEST_RATING}"
    if not isinstance(value, str):
        return f"{column} is {_shown(value)}, not text"
    if not value or value.isspace():
        return f"{column} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{column} is not valid UTF-8"
    return None


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

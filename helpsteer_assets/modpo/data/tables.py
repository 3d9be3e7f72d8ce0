"""Tables that need not fit in memory: SQL over them and over Parquet files, and Parquet files written as a stream."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.errors import HelpsteerError

if TYPE_CHECKING:
    import duckdb

BATCH_ROWS = 10_000
ROW_GROUP_ROWS = 16_384
"""With two or three texts a row some 40 MB, before compression."""
ROW_GROUP_BYTES = 2**28
"""A row group ends here at the latest: with texts of megabytes its rows would not fit in memory."""

Source: TypeAlias = pa.Table | Path
"""A table in memory, or a Parquet file."""


def literal_path(path: Path) -> str:
    """The path as DuckDB's readers take it, which see a pattern in `*`, `?` and `[` and would read what fits it too.

    Raises HelpsteerError for a path with one of these and a backslash: no pattern of DuckDB's stands for that.
    """
    text = str(path.absolute())
    escaped = "".join(f"[{character}]" if character in "*?[" else character for character in text)
    if escaped != text and "\\" in text:
        raise HelpsteerError(
            f"{text} cannot be read: its path has a backslash beside `*`, `?` or `[`; rename the folder (or set "
            "HELPSTEER_HOME to another)"
        )
    return escaped


@contextmanager
def database(scratch: Path | None = None, **tables: Source) -> "Iterator[duckdb.DuckDBPyConnection]":
    """A database in memory that knows tables, each by its argument's name.

    It has two threads, since assets may run side by side, and 1 GB: what goes beyond lies in files in `scratch` (by
    default the system's folder for temporary files) until the database is closed. The order of rows is a query's
    ORDER BY and nothing else.
    """
    import duckdb

    with tempfile.TemporaryDirectory(prefix=".duckdb-", dir=scratch) as spilled:
        config: dict[str, str | bool | int | float | list[str]] = {}
        config |= {"threads": 2, "memory_limit": "1GB", "temp_directory": spilled, "preserve_insertion_order": False}
        with duckdb.connect(":memory:", config=config) as connection:
            # It is drawn where Python has no main file, as in a step that Dagster forked, or in a person's session.
            connection.execute("SET enable_progress_bar = false")
            for name, table in tables.items():
                if isinstance(table, Path):
                    connection.read_parquet(literal_path(table), hive_partitioning=False).create_view(name)
                else:
                    connection.register(name, table)
            yield connection


def stream(
    connection: "duckdb.DuckDBPyConnection", sql: str, parameters: dict[str, Any] | None = None
) -> pa.RecordBatchReader:
    """The result of a query in batches, made as they are read."""
    # Text columns of one batch must stay below Arrow's 2 GiB, hence batches of a bounded number of rows.
    return connection.sql(sql, params=parameters or {}).to_arrow_reader(BATCH_ROWS)


def query(sql: str, parameters: dict[str, Any] | None = None, **tables: Source) -> pa.Table:
    """The result of one query over a `database` of these tables."""
    with database(**tables) as connection:
        return stream(connection, sql, parameters).read_all()


def write_parquet(batches: Iterable[pa.RecordBatch], schema: pa.Schema, file: Path) -> None:
    """Write batches that hold the schema's columns, whatever their order and size, in row groups of one size."""
    waiting = schema.empty_table()
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            rows = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            waiting = pa.concat_tables([waiting, rows])
            while waiting.num_rows >= ROW_GROUP_ROWS or waiting.nbytes >= ROW_GROUP_BYTES:
                writer.write_table(waiting.slice(0, ROW_GROUP_ROWS).combine_chunks())
                waiting = waiting.slice(ROW_GROUP_ROWS)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks())

"""Tables that need not fit in memory: SQL over them and over Parquet files, and Parquet files written as a stream."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 10_000
ROW_GROUP_ROWS = 16_384
"""With two or three texts a row some 40 MB, before compression."""

Source = pa.Table | Path
"""A table in memory, or a Parquet file."""


@contextmanager
def database(scratch: Path | None = None, **tables: Source) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that knows tables, each by its argument's name.

    It has two threads, since assets may run side by side, and 1 GB: what goes beyond lies in files in `scratch` (by
    default the system's folder for temporary files) until the database is closed. The order of rows is a query's
    ORDER BY and nothing else.
    """
    with tempfile.TemporaryDirectory(prefix=".duckdb-", dir=scratch) as spilled:
        config = {"threads": 2, "memory_limit": "1GB", "temp_directory": spilled, "preserve_insertion_order": False}
        with duckdb.connect(":memory:", config=config) as connection:
            for name, table in tables.items():
                if isinstance(table, Path):
                    connection.read_parquet(str(table), hive_partitioning=False).create_view(name)
                else:
                    connection.register(name, table)
            yield connection


def stream(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None
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
            while waiting.num_rows >= ROW_GROUP_ROWS:
                writer.write_table(waiting.slice(0, ROW_GROUP_ROWS).combine_chunks())
                waiting = waiting.slice(ROW_GROUP_ROWS)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks())

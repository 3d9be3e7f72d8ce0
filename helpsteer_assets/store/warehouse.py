"""The published DuckDB warehouse.

    <home>/warehouse/registry/<experiment>/<asset>/<partition or "all">.json   the latest materialization of each
    <home>/warehouse/helpsteer.duckdb                                          published from all of them
    <home>/warehouse/published.json                                            digests of the registry and of that file

DuckDB lets one process write a file, and whoever has it open in a shell holds that lock. So nobody ever writes to the
published file: the truth is the registry and the Parquet files it names, and publishing builds a new database beside
the old one and renames it over it. A reader keeps the file it opened, sees whole partitions only, and blocks nobody.
The price is that each publication writes all tables anew. A publisher that had to wait for another, and whose record
that one has published, does nothing.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.digests import file_sha256
from helpsteer_assets.files.durable import checked_name, sync, write_atomically
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.locks import exclusive_lock
from helpsteer_assets.store.tables import (
    MATERIALIZATIONS,
    TABLES,
    Table,
    definition,
    identifier,
    literal,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


_ENTRY = {
    "experiment": "VARCHAR",
    "asset": "VARCHAR",
    "partition": "VARCHAR",
    "fingerprint": "VARCHAR",
    "path": "VARCHAR",
    "run_id": "VARCHAR",
    "materialized_at": "TIMESTAMP",
    "reused": "BOOLEAN",
}
"""Fields of the registry entry, for `Column.expression`."""
_SCHEMA_VERSION = 1
_STORAGE: dict[str, str | bool | int | float | list[str]] = {"storage_compatibility_version": "v1.4.0"}
"""DuckDB 1 cannot open the default format of DuckDB 2, and people's shells and tools are older than our pin. A format
before 1.4 does not tell which file a write-ahead log belongs to: one of another file would be applied unnoticed."""
_ENTRY_TYPES = {
    "fingerprint": str,
    "path": str,
    "run_id": str,
    "materialized_at": str,
    "reused": bool,
    "table": str | None,
    "parquet": str | None,
}
"""Fields of a registry entry; its version, experiment, asset and partition are checked separately."""
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that reading a damaged registry entry raises."""
_READER: dict[str, str | bool | int | float | list[str]] = {
    "python_enable_replacements": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
QUERY_MEMORY, QUERY_SPILL, QUERY_ROWS = "2GB", "16GB", 1_000_000
"""Limits of a query: DuckDB's memory, its temporary files beyond that, and rows of the result."""


class Warehouse:
    """The published tables of a home, shared by all its experiments."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home).absolute()
        self.folder = self.home / "warehouse"
        self.registry = self.folder / "registry"
        self.path = self.folder / "helpsteer.duckdb"

    def record(
        self,
        *,
        experiment: str,
        asset: str,
        partition: str | None,
        fingerprint: str,
        path: Path,
        run_id: str,
        reused: bool,
        table: str | None,
        parquet: Path | None,
        publish: bool = True,
    ) -> None:
        """Makes this the latest materialization of the asset's partition in the experiment, and publishes.

        `partition` is None (or `ALL`) for an unpartitioned asset, `path` the artifact's folder, `table` and `parquet`
        the published table and the file of its rows (None for an asset without a table).
        With `publish=False` the caller publishes later.
        """
        partition = None if partition == ALL else partition
        entry = {
            "schema_version": _SCHEMA_VERSION,
            "experiment": experiment,
            "asset": asset,
            "partition": partition,
            "fingerprint": fingerprint,
            "path": self._portable(path),
            "run_id": run_id,
            "materialized_at": datetime.now(UTC).replace(tzinfo=None).isoformat(),
            "reused": reused,
            "table": table,
            "parquet": None if parquet is None else self._portable(parquet),
        }
        file = self._entry_file(experiment, asset, ALL if partition is None else partition)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(entry, indent=2) + "\n")
        if publish:
            self.publish()

    def forget_others(self, experiment: str, known: set[tuple[str, str]]) -> None:
        """Leave out of the tables what the experiment no longer has, such as a weight that left its grid.

        Args:
            experiment: its name.
            known: the assets and partitions that it has. Artifacts of others stay in the store.
        """
        for file in (self.registry / checked_name("experiment", experiment)).glob("*/*.json"):
            if (file.parent.name, file.stem) not in known and not file.name.startswith("."):
                file.unlink(missing_ok=True)

    def latest(self, experiment: str, asset: str, partition: str) -> dict[str, Any] | None:
        """The latest materialization that was recorded: fingerprint, run_id, ...; None where there is none.

        A damaged record is none. Raises HelpsteerError for one of a newer version of this package.
        """
        file = self._entry_file(experiment, asset, partition)
        try:
            return _read_entry(file.read_bytes(), file)
        except (FileNotFoundError, *_DAMAGED):
            return None

    def publish(self) -> Path:
        """Publishes the registry as it stands, unless that has been done; returns the database's path.

        Waits for other publishers only, never for a reader. An entry that cannot be read, or whose Parquet file
        cannot, is left out with a warning.
        """
        with exclusive_lock(self.folder / "publish.lock"):
            entries, unreadable, state = self._read_registry()
            for problem in unreadable:
                logger.warning("%s", problem)
            marker = self.folder / "published.json"
            touched = any(self.folder.glob(f"{self.path.name}.wal*"))
            published = _read_json(marker)
            is_current = published.get("registry") == state and not touched and self.path.exists()
            # Its content is compared: a failing disk changes it and not the file's times.
            if is_current and published.get("database") == file_sha256(self.path):
                return self.path
            # Only a publisher that died leaves files of this name while we hold the lock.
            for leftover in self.folder.glob(".publish-*"):
                shutil.rmtree(leftover)
            building = Path(tempfile.mkdtemp(prefix=".publish-", dir=self.folder))
            new = building / self.path.name
            try:
                for problem in _build(new, entries):
                    logger.warning("%s", problem)
            except duckdb.Error as error:
                raise HelpsteerError(f"cannot publish {self.path}: {error}") from error
            sync(new)
            digests = {"registry": state, "database": file_sha256(new)}
            # A write-ahead log beside the published file is that of a person who opened it for writing. It does not
            # fit the new file, which could not be opened beside it.
            for log in self.folder.glob(f"{self.path.name}.wal*"):
                log.unlink(missing_ok=True)
            new.replace(self.path)
            sync(self.folder)
            write_atomically(marker, json.dumps(digests))
            shutil.rmtree(building)
        return self.path

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Runs SQL on the published tables; returns the column names and the rows of the last statement.

        Read-only, without access to files, network or extensions, within `QUERY_MEMORY`, `QUERY_SPILL` and
        `QUERY_ROWS`. Works while someone has the database open, for writing too, and in a home that cannot be written
        to. Raises HelpsteerError where nothing is published yet, where the database is damaged, and with DuckDB's
        message where the SQL is wrong.
        """
        try:
            sql.encode()
        except UnicodeEncodeError as error:
            raise HelpsteerError(f"the query is not valid Unicode: {error}") from error
        with self._reader() as connection:
            return _run(connection, sql, self.path)

    def read(self, table: str, experiment: str | None = None) -> "pa.Table":
        """A published table as Arrow, its rows in the order of their key; `experiment` None gives those of all.

        Needs no lock, and has no limit on rows. Raises HelpsteerError for a table that does not exist, where nothing
        is published yet, and where the database is damaged.
        """
        if table not in TABLES:
            raise HelpsteerError(f"there is no table {table!r}; there are {', '.join(TABLES)}")
        chosen, values = ("", []) if experiment is None else ("WHERE experiment = ?", [experiment])
        key = ", ".join(identifier(column) for column in TABLES[table].key)
        with self._reader() as connection:
            try:
                sql = f"SELECT * FROM {identifier(table)} {chosen} ORDER BY {key}"
                return connection.sql(sql, params=values).to_arrow_table()
            except duckdb.Error as error:
                raise HelpsteerError(_explained(error, self.path)) from error

    @contextmanager
    def _reader(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """The published database, ready for SQL from a person."""
        if not self.path.exists():
            raise HelpsteerError(f"{self.path} does not exist: nothing materialized yet; run `helpsteer run`")
        with _temporary_folder() as folder:
            try:
                connection = _open_reader(self.path, folder)
            except duckdb.Error:
                # Somebody has it open for writing, or left a write-ahead log that does not fit the file that was
                # published since. A copy of the file under another name opens all the same.
                copy = shutil.copyfile(self.path, folder / self.path.name)
                try:
                    connection = _open_reader(copy, folder)
                except duckdb.Error as error:
                    raise HelpsteerError(_cannot_be_read(self.path, error)) from error
            with closing(connection):
                yield connection

    def entries(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Every latest materialization that was recorded, with absolute paths; and why others cannot be read."""
        entries, unreadable, _ = self._read_registry()
        return entries, unreadable

    def disagreements(self) -> list[str]:
        """How the published tables differ from what the registry and its Parquet files say: one line each.

        Every row is compared, so that all of the database is read. Changes nothing, and works in a home that cannot
        be written to. The column `path` is not compared: a home can be moved after it was published.
        """
        with _temporary_folder() as folder:
            entries, _, state = self._read_registry()
            if not self.path.exists():
                return [f"{self.path} does not exist; the next `helpsteer run` publishes it"] if entries else []
            expected, published = folder / "expected.duckdb", folder / "published.duckdb"
            shutil.copyfile(self.path, published)
            differences = _build(expected, entries)
            try:
                differences += _compare(expected, published, folder)
            except duckdb.Error as error:
                return [*differences, _cannot_be_read(self.path, error)]
            marker = _read_json(self.folder / "published.json")
        if differences and marker.get("registry") != state:
            differences.append(f"{self.path} was published before the registry's last change, or the home was copied")
        return differences

    def _entry_file(self, experiment: str, asset: str, partition: str) -> Path:
        folder = self.registry / checked_name("experiment", experiment) / checked_name("asset", asset)
        return folder / f"{checked_name('partition', partition)}.json"

    def _portable(self, path: Path) -> str:
        """The path relative to the home if it lies there, so that a home can be moved; else absolute."""
        absolute = Path(path).absolute()
        return str(absolute.relative_to(self.home) if absolute.is_relative_to(self.home) else absolute)

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        parquet = entry["parquet"]
        return entry | {
            "path": str(self.home / entry["path"]),
            "parquet": None if parquet is None else str(self.home / parquet),
        }

    def _read_registry(self) -> tuple[list[dict[str, Any]], list[str], str]:
        """All readable entries, with absolute paths; why others cannot be read; a digest of all that tables need."""
        digest = hashlib.sha256(repr((_SCHEMA_VERSION, TABLES, duckdb.__version__, str(self.home))).encode())
        entries, unreadable = [], []
        for file in sorted(self.registry.glob("*/*/*.json")):
            if file.name.startswith("."):
                continue  # being written
            content = file.read_bytes()
            digest.update(repr((str(file), content)).encode())
            try:
                entry = self._resolved(_read_entry(content, file))
            except _DAMAGED as error:
                unreadable.append(
                    f"{file} is unreadable and left out of the warehouse ({type(error).__name__}: {error}): remove it "
                    "or materialize again"
                )
                continue
            if entry["parquet"] is not None:
                digest.update(repr(_identity(Path(entry["parquet"]))).encode())
            entries.append(entry)
        return entries, unreadable, digest.hexdigest()


def _read_entry(content: bytes, file: Path) -> dict[str, Any]:
    """The registry entry that a file holds. Raises one of `_DAMAGED` for content that is no entry.

    Raises HelpsteerError for an entry of a newer version: its rows must not go missing from the tables.
    """
    entry = json.loads(content)
    version = entry["schema_version"]
    if isinstance(version, int) and version > _SCHEMA_VERSION:
        raise HelpsteerError(
            f"{file} was written by a newer helpsteer_assets (schema_version {version}, this one reads "
            f"{_SCHEMA_VERSION}): upgrade helpsteer_assets, or set HELPSTEER_HOME to another folder"
        )
    if version != _SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r} instead of {_SCHEMA_VERSION}")
    stated = (entry["experiment"], entry["asset"], ALL if entry["partition"] is None else entry["partition"])
    if stated != (file.parent.parent.name, file.parent.name, file.stem):
        raise ValueError(f"it is that of {'/'.join(map(str, stated))}")
    for name, kind in _ENTRY_TYPES.items():
        if not isinstance(entry[name], kind):
            raise TypeError(f"{name} is {entry[name]!r}")
    datetime.fromisoformat(entry["materialized_at"])
    json.dumps(entry, ensure_ascii=False).encode()  # a lone surrogate is no text for DuckDB
    if entry["table"] is not None and (entry["table"] not in TABLES or entry["parquet"] is None):
        raise ValueError(f"table {entry['table']!r} of {entry['parquet']!r}")
    return entry


def _identity(path: Path) -> list[int] | None:
    """Inode, size and time: they differ if the content does, and survive a rename. None for a missing file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _build(path: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Writes a new database: all tables, their comments and the entries' rows. Returns why rows are left out."""
    left_out = []
    with duckdb.connect(path, config=_STORAGE) as connection:
        connection.execute("SET enable_progress_bar = false")  # see modpo/data/tables.py
        definitions = [statement for table in TABLES.values() for statement in definition(table)]
        connection.execute(";".join(["BEGIN", *definitions, "COMMIT"]))
        for entry in entries:
            connection.execute("BEGIN")
            try:
                _insert(connection, entry)
                connection.execute("COMMIT")
            except duckdb.Error as error:
                if not _is_about_data(error, entry):
                    raise
                connection.execute("ROLLBACK")
                table = entry["table"] or MATERIALIZATIONS.name
                reason = str(error).splitlines()[0]
                left_out.append(
                    f"{entry['parquet'] or entry['path']} is left out of table {table}: {reason}; "
                    f"materialize {entry['asset']} again"
                )
    return left_out


def _insert(connection: duckdb.DuckDBPyConnection, entry: dict[str, Any]) -> None:
    """Inserts the rows of an entry's Parquet file, and the row of `materializations`."""
    parameters = _parameters(entry)
    if entry["table"] is not None:
        table = TABLES[entry["table"]]
        connection.execute(f"INSERT INTO {identifier(table.name)} BY NAME {_select(table)}", parameters)
    del parameters["parquet"]
    columns = ", ".join(column.sql for column in MATERIALIZATIONS.columns)
    connection.execute(f"INSERT INTO {MATERIALIZATIONS.name} BY NAME SELECT {columns} FROM {_ENTRY_ROW}", parameters)


def _is_about_data(error: duckdb.Error, entry: dict[str, Any]) -> bool:
    """Whether the Parquet file caused the error, and not the place that the new database is written to."""
    about_place = isinstance(error, duckdb.OperationalError | duckdb.InternalError | duckdb.FatalException)
    return not about_place or (entry["parquet"] is not None and _parameters(entry)["parquet"] in str(error))


def _compare(expected: Path, published: Path, folder: Path) -> list[str]:
    """How the tables of two databases differ, and where the published ones have a row twice."""
    from helpsteer_assets.modpo.data.tables import database

    differences = []
    with database(folder) as connection:
        for name, path in (("expected", expected), ("published", published)):
            connection.execute(f"ATTACH {literal(str(path))} AS {name} (READ_ONLY)")
        columns = "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() WHERE database_name = ?"
        described = [set(connection.execute(columns, [name]).fetchall()) for name in ("expected", "published")]
        if described[0] != described[1]:
            return ["its tables are those of another version of helpsteer_assets"]
        for table in TABLES.values():
            name = identifier(table.name)
            compared = "* EXCLUDE (path)" if table == MATERIALIZATIONS else "*"
            here, there = (f"SELECT {compared} FROM {database}.{name}" for database in ("published", "expected"))
            alien, missing, doubled = (
                connection.sql(f"SELECT count(*) FROM ({sql})").fetchall()[0][0]
                for sql in (
                    f"{here} EXCEPT ALL {there}",
                    f"{there} EXCEPT ALL {here}",
                    f"SELECT 1 FROM published.{name} GROUP BY {', '.join(table.key)} HAVING count(*) > 1",
                )
            )
            if alien or missing:
                differences.append(
                    f"table {table.name}: {alien} rows are in no artifact, {missing} of artifacts are missing"
                )
            if doubled:
                differences.append(f"table {table.name}: {doubled} rows are there twice, by {', '.join(table.key)}")
    return differences


_ENTRY_ROW = f"(SELECT {', '.join(f'CAST(${name} AS {kind}) AS {name}' for name, kind in _ENTRY.items())}) AS entry"


def _select(table: Table) -> str:
    """A SELECT of the rows of the Parquet file `$parquet`, by name, with the columns that the entry adds."""
    columns = ", ".join(column.sql for column in table.columns)
    # Without hive_partitioning = false, a folder named `a=b` above the file would become a column.
    return f"SELECT {columns} FROM read_parquet($parquet, hive_partitioning = false) AS data CROSS JOIN {_ENTRY_ROW}"


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    """The values of `_ENTRY` and of `$parquet`."""
    from helpsteer_assets.modpo.data.tables import literal_path

    parquet = None if entry["parquet"] is None else literal_path(Path(entry["parquet"]))
    return {"parquet": parquet, **{name: entry[name] for name in _ENTRY}}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder outside the home, which may be read-only or short of space; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="helpsteer-query-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _open_reader(path: Path, folder: Path) -> duckdb.DuckDBPyConnection:
    """A database for SQL from a person: no files, no network, no extensions, no Python variables, bounded memory."""
    connection = duckdb.connect(path, read_only=True, config=_READER)
    try:
        # As options of the connection DuckDB would set them in an order of its own, and refuse some.
        connection.execute(
            f"SET memory_limit = '{QUERY_MEMORY}'; SET temp_directory = {literal(str(folder))}; "
            f"SET max_temp_directory_size = '{QUERY_SPILL}'; "
            "SET enable_progress_bar = false; SET enable_external_access = false; SET lock_configuration = true"
        )
    except BaseException:
        connection.close()
        raise
    return connection


def _run(connection: duckdb.DuckDBPyConnection, sql: str, path: Path) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Runs SQL in a thread of its own: in the main thread DuckDB does not always stop on Ctrl-C."""
    outcome: list[tuple[list[str], list[tuple[Any, ...]]] | Exception] = []

    def work() -> None:
        try:
            outcome.append(_fetch(connection, sql))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        connection.interrupt()
        raise
    (result,) = outcome
    if isinstance(result, duckdb.Error):
        raise HelpsteerError(_explained(result, path)) from result
    if isinstance(result, Exception):
        raise result
    return result


def _fetch(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    connection.execute(sql)
    if connection.description is None:
        raise HelpsteerError("the query is empty; try `SELECT * FROM materializations`")
    names = [column[0] for column in connection.description]
    rows = connection.fetchmany(QUERY_ROWS + 1)
    if len(rows) > QUERY_ROWS:
        raise HelpsteerError(f"the result has more than {QUERY_ROWS:,} rows; narrow it, by LIMIT for example")
    return names, rows


def _explained(error: duckdb.Error, path: Path) -> str:
    """DuckDB's message, and the reason in our words where its own mislead."""
    message = str(error)
    if "read-only mode" in message:
        return f"the warehouse is read-only: it is published from the artifacts and never written to ({message})"
    if "disabled by configuration" in message or "disabled through configuration" in message:
        return f"a query reads the warehouse's tables only, no files and no extensions ({message})"
    if isinstance(error, duckdb.OutOfMemoryException):
        return (
            f"the query needs more than the {QUERY_MEMORY} of memory and {QUERY_SPILL} of temporary files that it may "
            f"have: narrow it ({message.splitlines()[0]})"
        )
    if isinstance(error, duckdb.IOException) or "Corrupt database file" in message:
        return _cannot_be_read(path, error)
    return message


def _cannot_be_read(path: Path, error: duckdb.Error) -> str:
    return (
        f"{path} cannot be read ({str(error).splitlines()[0]}): the next `helpsteer run` publishes it anew, from the "
        "artifacts"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""The published DuckDB warehouse.

    <home>/warehouse/registry/<experiment>/<asset>/<partition or "all">.json   the latest materialization of each
    <home>/warehouse/helpsteer.duckdb                                          published from all of them
    <home>/warehouse/published.json                                            what the published file was made from

DuckDB lets one process write a file, and whoever has it open in a shell holds that lock. So nobody ever writes to the
published file: the truth is the registry and the Parquet files it names, and publishing builds a new database beside
the old one and renames it over it. A reader keeps the file it opened, sees whole partitions only, and blocks nobody.
The price is that each publication writes all tables anew; publishers that waited for one another's lock and find their
record already published do nothing.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.attributes import ATTRIBUTES, OVERALL
from helpsteer_assets.resources.artifacts import ALL
from helpsteer_assets.resources.files import checked_name, exclusive_lock, readable_os_errors, sync, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A column of a published table."""

    name: str
    type: str
    """DuckDB type."""
    comment: str
    """Meaning and unit; published as COMMENT ON COLUMN."""
    expression: str | None = None
    """SQL over `data` (a row of the Parquet file) and `entry` (the registry entry); by default `data`'s column of
    the same name."""

    @property
    def sql(self) -> str:
        """What a SELECT says to get this column, by name and type."""
        return f"CAST({self.expression or f'data.{_identifier(self.name)}'} AS {self.type}) AS {_identifier(self.name)}"


@dataclass(frozen=True)
class Table:
    """A published table."""

    name: str
    comment: str
    """What a row is; published as COMMENT ON TABLE."""
    assets: tuple[str, ...]
    """The assets whose Parquet files fill it."""
    columns: tuple[Column, ...]


EXPERIMENT = Column("experiment", "VARCHAR", "experiment that the row belongs to", "entry.experiment")
LINEAGE = (
    Column("fingerprint", "VARCHAR", "fingerprint of the artifact that holds the row", "entry.fingerprint"),
    Column("run_id", "VARCHAR", "Dagster run that last materialized the artifact", "entry.run_id"),
)
_W = "weight of the preference in the MODPO objective, in (0, 1]; null for the SFT policy"
_PAIR_ID = "first 16 hex digits of sha256(chosen_id + rejected_id)"
_PROMPT_ID = "first 16 hex digits of sha256(prompt)"
_RESPONSE_ID = "first 16 hex digits of sha256(prompt + NUL + response)"
_POLICY = "'sft' or 'modpo'"
_FINISH = "'eos' if the model ended the response, 'length' if the limit on new tokens did"
_TOKENS = "tokens of the response, its end-of-text token included"


def _pair_columns() -> tuple[Column, ...]:
    ratings = (
        Column(
            f"{side}_{attribute}",
            "TINYINT",
            f"{attribute} of the {side} response, "
            + ("0 to 20: the sum of the five" if attribute == OVERALL else "0 to 4"),
        )
        for attribute in (*ATTRIBUTES, OVERALL)
        for side in ("chosen", "rejected")
    )
    return (
        EXPERIMENT,
        Column("pair_id", "VARCHAR", _PAIR_ID),
        Column("prompt_id", "VARCHAR", _PROMPT_ID),
        Column("split", "VARCHAR", "'train', 'selection' (chooses checkpoints) or 'validation'"),
        Column("prompt", "VARCHAR", "prompt, uncut"),
        Column("chosen_id", "VARCHAR", f"response_id of the chosen response: {_RESPONSE_ID}"),
        Column("rejected_id", "VARCHAR", f"response_id of the rejected response: {_RESPONSE_ID}"),
        Column("chosen", "VARCHAR", "the response rated higher, uncut"),
        Column("rejected", "VARCHAR", "the response rated lower, uncut"),
        *ratings,
        *LINEAGE,
    )


_DECLARED = (
    Table(
        "preference_pairs",
        "One row per pair of responses to one prompt that differ in the preference attribute",
        ("preference_pairs",),
        _pair_columns(),
    ),
    Table(
        "margin_pairs",
        "One row per pair of responses to one prompt that differ in the margin attribute",
        ("margin_pairs",),
        _pair_columns(),
    ),
    Table(
        "reference_log_probs",
        "One row per unique prompt and response of the pairs: log-probability under the SFT model",
        ("reference_log_probs",),
        (
            EXPERIMENT,
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("response_id", "VARCHAR", _RESPONSE_ID),
            Column("log_prob", "DOUBLE", "log p_sft(response | prompt), summed over the response's tokens, in nats"),
            Column("response_tokens", "INTEGER", "tokens of the response that log_prob sums over"),
            Column("truncated", "BOOLEAN", "whether prompt or response was cut to the length limits"),
            *LINEAGE,
        ),
    ),
    Table(
        "margin_rewards",
        "One row per unique prompt and response of the preference pairs: the margin, unscaled",
        ("margin_rewards",),
        (
            EXPERIMENT,
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("response_id", "VARCHAR", _RESPONSE_ID),
            Column(
                "log_ratio",
                "DOUBLE",
                "log p_adapter - log p_sft of the response, in nats, unscaled; null under the length penalty",
            ),
            Column("response_tokens", "INTEGER", "tokens of the uncut response"),
            *LINEAGE,
        ),
    ),
    Table(
        "generations",
        "One row per policy and evaluation prompt: the response it generated",
        ("sft_generations", "generations"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY, "entry.policy"),
            Column("w", "DOUBLE", _W, "entry.w"),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("prompt", "VARCHAR", "prompt, uncut"),
            Column("response", "VARCHAR", "generated response"),
            Column("response_tokens", "INTEGER", _TOKENS),
            Column("finish_reason", "VARCHAR", _FINISH),
            Column("prompt_truncated", "BOOLEAN", "whether the prompt was cut to the length limit"),
            *LINEAGE,
        ),
    ),
    Table(
        "scores",
        "One row per policy and evaluation prompt: the scores of its response",
        ("sft_scores", "scores"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY),
            Column("w", "DOUBLE", _W),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column(
                "margin_reward",
                "DOUBLE",
                "r_m before the role's sign, higher is more of what the adapter prefers: "
                "margin_beta * margin_log_ratio in nats, or -penalty * response_tokens",
                "coalesce(entry.margin_beta * data.margin_log_ratio, -entry.penalty * data.response_tokens)",
            ),
            Column(
                "margin_log_ratio",
                "DOUBLE",
                "log p_adapter - log p_sft of the response, in nats, unscaled; null under the length penalty",
            ),
            Column("log_ratio_to_sft", "DOUBLE", "log p_policy - log p_sft of the response, in nats"),
            Column("response_tokens", "INTEGER", _TOKENS),
            Column("response_words", "INTEGER", "words of the response, separated by white space"),
            Column("finish_reason", "VARCHAR", _FINISH),
            *(
                Column(name, "DOUBLE", f"{name} by the configured rater, on its scale; null without a rater")
                for name in ATTRIBUTES
            ),
            *LINEAGE,
        ),
    ),
    Table(
        "score_summary",
        "One row per policy and measure: mean over the evaluation prompts, with 95% bootstrap intervals",
        ("score_summary",),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY),
            Column("w", "DOUBLE", _W),
            Column(
                "measure", "VARCHAR", "column of scores that is summarized, or the share of responses cut at the limit"
            ),
            Column("n", "INTEGER", "evaluation prompts"),
            Column("mean", "DOUBLE", "mean, in the measure's unit"),
            Column("sd", "DOUBLE", "standard deviation over prompts, in the measure's unit"),
            Column("ci_low", "DOUBLE", "lower end of the mean's 95% interval"),
            Column("ci_high", "DOUBLE", "upper end of the mean's 95% interval"),
            Column("delta", "DOUBLE", "mean difference to the SFT policy on the same prompts; null for the SFT policy"),
            Column("delta_low", "DOUBLE", "lower end of the difference's 95% interval"),
            Column("delta_high", "DOUBLE", "upper end of the difference's 95% interval"),
            *LINEAGE,
        ),
    ),
)
_MATERIALIZATIONS = Table(
    "materializations",
    "One row per experiment, asset and partition: its latest materialization",
    (),
    (
        EXPERIMENT,
        Column("asset", "VARCHAR", "asset", "entry.asset"),
        Column(
            "partition", "VARCHAR", "weight as the partition key; null for an unpartitioned asset", "entry.partition"
        ),
        Column("fingerprint", "VARCHAR", "hash of all that determines the artifact", "entry.fingerprint"),
        Column("path", "VARCHAR", "folder of the artifact, with its manifest.json", "entry.path"),
        Column("run_id", "VARCHAR", "Dagster run that materialized it", "entry.run_id"),
        Column("materialized_at", "TIMESTAMP", "when it was materialized, UTC", "entry.materialized_at"),
        Column("reused", "BOOLEAN", "whether the artifact was found finished instead of computed", "entry.reused"),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in (*_DECLARED, _MATERIALIZATIONS)}
"""Every published table; each exists, if only empty, in every published file."""

_ENTRY = {
    "experiment": "VARCHAR",
    "asset": "VARCHAR",
    "partition": "VARCHAR",
    "fingerprint": "VARCHAR",
    "path": "VARCHAR",
    "run_id": "VARCHAR",
    "materialized_at": "TIMESTAMP",
    "reused": "BOOLEAN",
    "policy": "VARCHAR",
    "w": "DOUBLE",
    "margin_beta": "DOUBLE",
    "penalty": "DOUBLE",
}
"""What `Column.expression` finds in `entry`: the registry entry's own fields, then the constants."""
_CONSTANTS = {"generations": ({"policy", "w"},), "scores": ({"margin_beta"}, {"penalty"})}
"""The constants that a table's entries carry; one of the alternatives."""
_SCHEMA_VERSION = 1
_STORAGE = {"storage_compatibility_version": "v1.4.0"}
"""DuckDB 2 writes by default what no DuckDB 1 opens, and people's shells and tools are older than our pin. Before 1.4
the format does not tell whose write-ahead log lies beside a file: another file's would be applied unnoticed."""
_READER = {"enable_external_access": False, "lock_configuration": True, "python_enable_replacements": False}
"""SQL from a person reads the warehouse: no files, no network, no Python variables."""


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
        constants: dict[str, Any],
        publish: bool = True,
    ) -> None:
        """Makes this the latest materialization of the asset's partition in the experiment, and publishes.

        `partition` is None (or `ALL`) for an unpartitioned asset, `path` the artifact's folder, `table` and `parquet`
        the published table and the file of its rows (None for an asset without a table). `constants` holds what the
        rows need and the file does not say: `policy` and `w` for `generations`; `margin_beta` or `penalty` for
        `scores`; nothing for the others. With `publish=False` the caller publishes later.

        Raises HelpsteerError for a table that does not exist, constants that do not fit it, and a Parquet file that is
        missing, unreadable or lacks a column.
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
            "constants": constants,
        }
        folder = self.registry / checked_name("experiment", experiment) / checked_name("asset", asset)
        file = folder / f"{checked_name('partition', ALL if partition is None else partition)}.json"
        self._check(entry)
        with readable_os_errors("write", file):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(entry, indent=2) + "\n")
            if table == "scores":
                self._rescale_reference(experiment, constants)
        if publish:
            self.publish()

    def _rescale_reference(self, experiment: str, constants: dict[str, Any]) -> None:
        """Give the SFT policy's scores the scale of the latest policies': they are compared with each other.

        Its artifact holds unscaled log-ratios, so that a changed margin_beta leaves it as it is.
        """
        entry = self.latest(experiment, "sft_scores", ALL)
        if entry is not None and entry["constants"] != constants and set(entry["constants"]) == set(constants):
            file = self.registry / experiment / "sft_scores" / f"{ALL}.json"
            write_atomically(file, json.dumps(entry | {"constants": constants}, indent=2) + "\n")

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
        """The latest materialization that was recorded: fingerprint, run_id, ...; None where there is none."""
        entry = _read_json(self.registry / experiment / asset / f"{partition}.json")
        return entry if isinstance(entry, dict) and "fingerprint" in entry else None

    def publish(self) -> Path:
        """Publishes the registry as it stands, unless that has been done; returns the database's path.

        Waits for other publishers only, never for a reader. An entry that cannot be read, or whose Parquet file
        cannot, is left out with a warning.
        """
        with exclusive_lock(self.folder / "publish.lock"), readable_os_errors("publish", self.path):
            entries, state = self._read_registry()
            marker = self.folder / "published.json"
            touched = any(self.folder.glob(f"{self.path.name}.wal*"))
            if not touched and _read_json(marker) == {"registry": state, "database": _identity(self.path)}:
                return self.path
            # Only a publisher that died leaves files of this name while we hold the lock.
            for leftover in self.folder.glob(".publish-*"):
                shutil.rmtree(leftover)
            building = Path(tempfile.mkdtemp(prefix=".publish-", dir=self.folder))
            new = building / self.path.name
            try:
                _build(new, entries)
            except duckdb.Error as error:
                raise HelpsteerError(f"cannot publish {self.path}: {error}") from error
            sync(new)
            published = {"registry": state, "database": _identity(new)}
            # A write-ahead log beside the published file is that of a person who opened it for writing. It does not
            # fit the new file, which could not be opened beside it.
            for log in self.folder.glob(f"{self.path.name}.wal*"):
                log.unlink(missing_ok=True)
            new.replace(self.path)
            sync(self.folder)
            write_atomically(marker, json.dumps(published))
            shutil.rmtree(building)
        return self.path

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Runs SQL on the published tables; returns the column names and the rows of the last statement.

        Read-only, without access to files or network. Works while someone has the database open, for writing too.
        Raises HelpsteerError where nothing is published yet, and with DuckDB's message where the SQL is wrong.
        """
        if not self.path.exists():
            raise HelpsteerError(f"{self.path} does not exist: nothing materialized yet; run `helpsteer run`")
        try:
            connection = duckdb.connect(self.path, read_only=True, config=_READER)
        except duckdb.Error:
            # Someone holds it open for writing, or wrote to it before the last publication and left a write-ahead log
            # that fits no more. Neither concerns a copy of the file under another name.
            with (
                tempfile.TemporaryDirectory(prefix="helpsteer-query-") as folder,
                readable_os_errors("copy", self.path),
            ):
                copy = shutil.copyfile(self.path, Path(folder) / self.path.name)
                try:
                    connection = duckdb.connect(copy, read_only=True, config=_READER)
                except duckdb.Error as error:
                    raise HelpsteerError(f"cannot open {self.path}: {error}") from error
                return _run(connection, sql)
        return _run(connection, sql)

    def _portable(self, path: Path) -> str:
        """The path relative to the home if it lies there, so that a home can be moved; else absolute."""
        absolute = Path(path).absolute()
        return str(absolute.relative_to(self.home) if absolute.is_relative_to(self.home) else absolute)

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        parquet = entry["parquet"]
        return {
            **entry,
            "path": str(self.home / entry["path"]),
            "parquet": None if parquet is None else str(self.home / parquet),
        }

    def _check(self, entry: dict[str, Any]) -> None:
        name, constants = entry["table"], set(entry["constants"])
        publishable = ", ".join(table.name for table in _DECLARED)
        if (name is None) != (entry["parquet"] is None):
            raise HelpsteerError(f"{entry['asset']}: a table needs a Parquet file, and a Parquet file a table")
        if name is None:
            return
        if name not in TABLES or name == _MATERIALIZATIONS.name:
            raise HelpsteerError(f"{entry['asset']}: there is no table {name!r}; there are {publishable}")
        expected = _CONSTANTS.get(name, (set(),))
        if constants not in expected:
            wanted = " or ".join(str(sorted(names)) for names in expected)
            raise HelpsteerError(
                f"{entry['asset']}: table {name} takes the constants {wanted}, got {sorted(constants)}"
            )
        resolved = self._resolved(entry)
        with duckdb.connect() as connection:
            try:
                connection.execute(f"{_select(TABLES[name])} LIMIT 0", _parameters(resolved))
            except duckdb.Error as error:
                raise HelpsteerError(
                    f"{resolved['parquet']} cannot become table {name}; materialize {entry['asset']} again: {error}"
                ) from error

    def _read_registry(self) -> tuple[list[dict[str, Any]], str]:
        """All readable entries, paths absolute, and a digest of all that the published tables are made from."""
        digest = hashlib.sha256(repr((_SCHEMA_VERSION, TABLES, duckdb.__version__, str(self.home))).encode())
        entries = []
        for file in sorted(self.registry.glob("*/*/*.json")):
            if file.name.startswith("."):
                continue  # being written
            text = file.read_bytes()
            digest.update(repr((str(file), text)).encode())
            try:
                entry = self._resolved(json.loads(text))
                if entry["schema_version"] != _SCHEMA_VERSION:
                    raise ValueError(f"schema_version {entry['schema_version']} instead of {_SCHEMA_VERSION}")
                _parameters(entry)
                _ = None if entry["table"] is None else TABLES[entry["table"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning(
                    "%s is unreadable and left out of the warehouse (%s: %s): remove it or materialize again",
                    file,
                    type(error).__name__,
                    error,
                )
                continue
            if entry["parquet"] is not None:
                digest.update(repr(_identity(Path(entry["parquet"]))).encode())
            entries.append(entry)
        return entries, digest.hexdigest()


def _identity(path: Path) -> list[int] | None:
    """Differs once a file's content does, and survives renaming; None for a missing file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _build(path: Path, entries: list[dict[str, Any]]) -> None:
    """Writes a new database with all tables, their comments and the entries' rows."""
    with duckdb.connect(path, config=_STORAGE) as connection:
        definitions = [statement for table in TABLES.values() for statement in _definition(table)]
        connection.execute(";".join(["BEGIN", *definitions, "COMMIT"]))
        published = []
        for entry in entries:
            parameters = _parameters(entry)
            if entry["table"] is not None:
                table = TABLES[entry["table"]]
                try:
                    connection.execute(f"INSERT INTO {_identifier(table.name)} BY NAME {_select(table)}", parameters)
                except duckdb.Error as error:
                    if not _is_about_data(error, entry["parquet"]):
                        raise
                    logger.warning(
                        "%s is left out of table %s: %s; materialize %s again",
                        entry["parquet"],
                        table.name,
                        str(error).splitlines()[0],
                        entry["asset"],
                    )
                    continue
            del parameters["parquet"]
            published.append(parameters)
        columns = ", ".join(column.sql for column in _MATERIALIZATIONS.columns)
        connection.execute("BEGIN")
        for parameters in published:
            connection.execute(
                f"INSERT INTO {_MATERIALIZATIONS.name} BY NAME SELECT {columns} FROM {_ENTRY_ROW}", parameters
            )
        connection.execute("COMMIT")


def _is_about_data(error: duckdb.Error, parquet: str) -> bool:
    """Whether a Parquet file is to blame for the error, and not the place the new database is written to."""
    return not isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException) or parquet in str(error)


def _definition(table: Table) -> Iterator[str]:
    name = _identifier(table.name)
    yield f"CREATE TABLE {name} ({', '.join(f'{_identifier(c.name)} {c.type}' for c in table.columns)})"
    yield f"COMMENT ON TABLE {name} IS {_literal(table.comment)}"
    for column in table.columns:
        yield f"COMMENT ON COLUMN {name}.{_identifier(column.name)} IS {_literal(column.comment)}"


_ENTRY_ROW = f"(SELECT {', '.join(f'CAST(${name} AS {kind}) AS {name}' for name, kind in _ENTRY.items())}) AS entry"


def _select(table: Table) -> str:
    """The rows of the Parquet file `$parquet`, by name, with what the entry adds."""
    columns = ", ".join(column.sql for column in table.columns)
    # Without hive_partitioning = false, a folder named `a=b` above the file would become a column.
    return f"SELECT {columns} FROM read_parquet($parquet, hive_partitioning = false) AS data CROSS JOIN {_ENTRY_ROW}"


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    """The values of `_ENTRY` and of `$parquet`."""
    constants = dict(entry["constants"])
    own = {name: entry[name] for name in _ENTRY if name in entry}
    return {"parquet": entry["parquet"], **{name: constants.get(name) for name in _ENTRY}, **own}


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    with connection:
        try:
            connection.execute(sql)
            if connection.description is None:
                raise HelpsteerError("the query is empty; try `SELECT * FROM materializations`")
            return [column[0] for column in connection.description], connection.fetchall()
        except duckdb.Error as error:
            message = str(error)
            if "read-only mode" in message:
                message = (
                    f"the warehouse is read-only: it is published from the artifacts and never written to ({message})"
                )
            elif "disabled by configuration" in message or "disabled through configuration" in message:
                message = f"a query reads the warehouse's tables only, no files and no extensions ({message})"
            raise HelpsteerError(message) from error


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

"""Where Dagster's records are kept, if not in the SQLite databases of its home: a database that dagster.yaml names."""

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import yaml
from dagster_shared.check import CheckError
from sqlalchemy.exc import DBAPIError

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.durable import write_atomically
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import exclusive_lock

_STORAGES = {"storage", "run_storage", "event_log_storage", "schedule_storage"}
"""Keys of a dagster.yaml that keep records elsewhere."""
_OWNER = "helpsteer/owner"
"""Key under which a database says whose records it holds."""


def names_storage(config: Path) -> bool:
    """Whether a dagster.yaml keeps the records elsewhere than in the databases beside it."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    return isinstance(settings, dict) and not _STORAGES.isdisjoint(settings)


def claim(instance: dg.DagsterInstance, folder: Path) -> None:
    """Make a database that of one DAGSTER_HOME; HelpsteerError where it holds the records of another.

    Two experiments in one would mix their materializations, and two homes would take each other's runs for dead: the
    locks that tell lie in the home.
    """
    mark = folder / "records_id"
    if not mark.exists():
        write_atomically(mark, uuid.uuid4().hex)
    own, storage = mark.read_text(encoding="utf-8"), instance.daemon_cursor_storage
    found = storage.get_cursor_values({_OWNER}).get(_OWNER)
    if found is None:
        storage.set_cursor_values({_OWNER: json.dumps({"id": own, "folder": str(folder)})})
    elif (owner := json.loads(found))["id"] != own:
        raise HelpsteerError(
            f"the database that {folder / 'dagster.yaml'} names holds the records of {owner['folder']}; each "
            "experiment of each home needs one of its own: create another, and name that one"
        )


@contextmanager
def readable_database_errors(config: Path) -> Iterator[None]:
    """Turns what a database says that a dagster.yaml names, or its silence, into a HelpsteerError.

    All else goes through; so does what SQLite says, which tells of the home's disk.
    """
    logging.getLogger().addFilter(_is_no_retry)
    try:
        yield
    except Exception as error:
        said = _said_by_server(error)
        if said is None:
            raise
        raise HelpsteerError(
            f"the database of Dagster's records does not serve: {said}\nSee that it runs, and that it is the one that "
            f"{config} names. Finished work is kept in the home; the same command goes on from there."
        ) from error
    finally:
        logging.getLogger().removeFilter(_is_no_retry)


@contextmanager
def readable_mistakes(config: Path) -> Iterator[None]:
    """Turns what Dagster raises for a dagster.yaml that cannot be used into a HelpsteerError."""
    try:
        yield
    except (dg.DagsterInvalidConfigError, CheckError, ImportError, yaml.YAMLError) as error:
        said = str(error)
        if isinstance(error, dg.DagsterInvalidConfigError):
            # Dagster writes a stack behind each.
            said = "; ".join(found.message.partition("\n\nStack Trace")[0] for found in error.errors)
        if "'psycopg'" in said:
            said += ": write `scheme: postgresql+psycopg2`, or a URL that begins so"
        elif "dagster_postgres" in said:
            said += ": install the extra `postgres` of helpsteer_assets"
        raise HelpsteerError(f"{config} cannot be used: {said}") from error


def _is_no_retry(record: logging.LogRecord) -> bool:
    """Dagster tries each connection six times in some ten seconds, and logs each failure in four lines."""
    return not str(record.msg).startswith("Retrying failed database connection")


def _said_by_server(error: BaseException | None) -> str | None:
    """The answer of a database other than SQLite, or its silence, if an error came from it."""
    while error is not None:
        if isinstance(error, DBAPIError):
            return None if isinstance(error.orig, sqlite3.Error) else " ".join(str(error.orig).split())
        error = error.__cause__ or error.__context__
    return None


DAGSTER_YAML = """\
# Written once by helpsteer_assets, and yours to change.
concurrency:
  pools:
    # How many assets of this experiment that load a model run at once (UI, backfill, command line).
    default_limit: {pool_limit}
    granularity: op
run_monitoring:
  # Finds runs whose process died, and frees what they held.
  enabled: true
  free_slots_after_run_end_seconds: 30
telemetry:
  enabled: false
nux:
  enabled: false
"""


def dagster_home(home: Home, experiment: str) -> Path:
    """DAGSTER_HOME of an experiment, made with its dagster.yaml where it is not there.

    One for each experiment, so that the materializations of two never mix.
    """
    folder = home / "dagster" / experiment
    config = folder / "dagster.yaml"
    if not config.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may make it at the same time, and none may read half of it.
        write_atomically(config, DAGSTER_YAML.format(pool_limit=pool_limit()))
    return folder


def pool_limit() -> int:
    """One model per core pair, for a training keeps more than one core busy; one where there is a GPU, the first of
    which all of them use."""
    has_gpu = any(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))
    return 1 if has_gpu else max(1, (os.cpu_count() or 1) // 2)


def make_dagster_home(home: Home, experiment: str) -> Path:
    """DAGSTER_HOME of an experiment, with Dagster's databases.

    Two processes that make them at once fail, and one that dies halfway leaves some that nobody can open: so they are
    made beside their place, by one process, and `history` is moved there last. Where dagster.yaml names a database
    elsewhere, its tables are made there, by one process too.

    Raises HelpsteerError for a dagster.yaml or a database that cannot be used, and for one that holds other records.
    """
    folder = dagster_home(home, experiment)
    config = folder / "dagster.yaml"
    with (
        exclusive_lock(home / "locks" / "dagster" / f"{experiment}.lock"),
        readable_mistakes(config),
        readable_database_errors(config),
    ):
        if names_storage(config):
            with dg.DagsterInstance.from_config(str(folder)) as instance:
                claim(instance, folder)
        elif not (folder / "history").exists():
            for leftover in folder.glob(".new-*"):
                shutil.rmtree(leftover)
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
            shutil.copy(config, new)
            with dg.DagsterInstance.from_config(str(new)):
                pass
            for name in ("schedules", "history"):
                shutil.rmtree(folder / name, ignore_errors=True)
                (new / name).rename(folder / name)
            shutil.rmtree(new)
    return folder

"""People who have the published database open, in every state, while it is published anew."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb

from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.faults.campaign import DEADLINE, Trial, fault
from helpsteer_assets_tests.faults.homes import finished_home, forget

Reader = Callable[[Path, Connection], None]
COUNT = "SELECT count(*) FROM scores"


def reads(path: Path, connection: Connection) -> None:
    """Has it open read-only, in the middle of a query."""
    with duckdb.connect(path, read_only=True) as database:
        begun = database.cursor().execute("SELECT * FROM preference_pairs, preference_pairs AS others")
        begun.fetchone()
        answer(database, COUNT, connection)


def writes(path: Path, connection: Connection) -> None:
    """Has it open for writing, with an open transaction that is committed after the publication."""
    with duckdb.connect(path) as database:
        database.execute("BEGIN; CREATE TABLE mine AS SELECT 1")
        answer(database, COUNT, connection)
        database.execute("COMMIT")


def wrote(path: Path, connection: Connection) -> None:
    """Has written to it, and has it open still: a write-ahead log lies beside it."""
    with duckdb.connect(path) as database:
        database.execute("CREATE TABLE mine AS SELECT 1")
        answer(database, COUNT, connection)


def died(path: Path, connection: Connection) -> None:
    """Wrote to it and was killed: a write-ahead log is left."""
    database = duckdb.connect(path)
    database.execute("CREATE TABLE mine AS SELECT 1")
    (before,) = database.execute(COUNT).fetchone() or (None,)
    connection.send(before)
    connection.send(before)
    os.kill(os.getpid(), signal.SIGKILL)


def attaches(path: Path, connection: Connection) -> None:
    """Has it attached to a database of his own."""
    with duckdb.connect() as database:
        database.execute(f"ATTACH '{path}' AS published (READ_ONLY)")
        answer(database, "SELECT count(*) FROM published.scores", connection)


def attaches_to_write(path: Path, connection: Connection) -> None:
    """The same, for writing."""
    with duckdb.connect() as database:
        database.execute(f"ATTACH '{path}' AS published")
        database.execute("CREATE TABLE published.mine AS SELECT 1")
        answer(database, "SELECT count(*) FROM published.scores", connection)


def answer(database: duckdb.DuckDBPyConnection, sql: str, connection: Connection) -> None:
    """Say what is seen at first, and when asked, again; leave when told."""
    connection.send(database.execute(sql).fetchall()[0][0])
    connection.recv()
    connection.send(database.execute(sql).fetchall()[0][0])
    connection.recv()


READERS: dict[str, Reader] = {
    "a reader in the middle of a query": reads,
    "a reader in an open transaction": writes,
    "a reader with a write-ahead log": wrote,
    "a killed writer's write-ahead log": died,
    "a reader who attached it": attaches,
    "a writer who attached it": attaches_to_write,
}


def publish_beside(reader: Reader, trial: Trial) -> None:
    """Tables are published anew while somebody has them open: he keeps what he has, and others see the new."""
    finished_home(trial)
    forget(trial, "scores", "score_summary", "tradeoff")
    warehouse = Warehouse(trial.home)
    for asset in ("scores", "score_summary"):
        for entry in (warehouse.registry / "faults" / asset).iterdir():
            entry.unlink()
    warehouse.publish()
    processes = multiprocessing.get_context("forkserver")
    # One can have it open for writing, or several for reading.
    several = 1 if reader not in (reads, attaches) else trial.random.choice((1, 2, 3))
    trial.note = f"{several} of them"
    opened = []
    for _ in range(several):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=reader, args=(warehouse.path, theirs))
        process.start()
        trial.cleanup.callback(process.kill)
        theirs.close()
        assert ours.poll(DEADLINE), "the reader says nothing"
        opened.append((process, ours, ours.recv()))
    if reader is died:
        process.join(DEADLINE)
    command = trial.run("run")
    assert command.wait() == 0, command.output
    new = f"SELECT count(*) FROM scores WHERE experiment = '{trial.undisturbed.experiment.name}'"
    for process, ours, before in opened:
        if reader is not died:
            ours.send("again")
        assert ours.poll(DEADLINE), "the reader says nothing any more"
        assert ours.recv() == before, "a reader saw another database than he had opened"
        query = trial.run("query", "--format", "csv", new)
        assert query.wait() == 0 and str(before) not in query.output.splitlines(), query.output
        if reader is not died:
            ours.send("leave")
            process.join(DEADLINE)
            assert process.exitcode == 0, "the reader was disturbed"
    query = trial.run("query", "--format", "csv", new)
    assert query.wait() == 0 and str(before) not in query.output.splitlines(), query.output


for _name, _reader in READERS.items():
    fault(_name)(partial(publish_beside, _reader))

"""The published warehouse: what it holds, who may read it, and that nobody blocks or loses anything."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.store.tables import TABLES
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished

SPAWN = multiprocessing.get_context("spawn")
ROWS = 2000


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "home")


def write_parquet(path: Path, sql: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as connection:
        connection.sql(sql).write_parquet(str(path))
    return path


def write_scores(path: Path, w: str | None, rows: int = 3) -> Path:
    """A scores file whose columns stand in another order than the table's."""
    ratings = ", ".join(f"{i}::DOUBLE AS {name}" for i, name in reversed(list(enumerate(ATTRIBUTES))))
    policy, weight = ("'sft'", "NULL") if w is None else ("'modpo'", f"'{w}'")
    return write_parquet(
        path,
        f"SELECT {ratings}, 'eos' AS finish_reason, 7 AS response_words, (range + 1)::INT AS response_tokens, "
        f"-1.5::DOUBLE AS log_ratio_to_sft, range::DOUBLE AS margin_log_ratio, range / 2 AS margin_reward, "
        f"'p' || range AS prompt_id, "
        f"{weight}::VARCHAR AS w, {policy} AS policy FROM range({rows})",
    )


def record_scores(warehouse: Warehouse, w: str | None, **changes: Any) -> None:
    folder = warehouse.home / "artifacts" / "scores" / (w or "all")
    if "parquet" not in changes:
        changes["parquet"] = write_scores(folder / "scores.parquet", w)
    arguments = {
        "experiment": "demo",
        "asset": "sft_scores" if w is None else "scores",
        "partition": w,
        "fingerprint": f"fingerprint-{w}",
        "path": folder,
        "run_id": "run-1",
        "reused": False,
        "table": "scores",
    }
    warehouse.record(**{**arguments, **changes})


def counts(warehouse: Warehouse) -> dict[str, int]:
    return {table: warehouse.query(f"SELECT count(*) FROM {table}")[1][0][0] for table in TABLES}


def test_after_a_run_every_table_has_rows_that_agree_with_the_artifacts(finished_home: Finished) -> None:
    warehouse = Warehouse(finished_home.home)
    assert min(counts(warehouse).values()) > 0
    assert warehouse.disagreements() == []
    policies = warehouse.query("SELECT DISTINCT policy, w FROM generations ORDER BY w")[1]
    assert policies == [("modpo", 0.1), ("modpo", 0.9), ("sft", None)]


def test_columns_are_matched_by_name_and_rows_lead_back_to_their_run(warehouse: Warehouse) -> None:
    record_scores(warehouse, "0.1")

    names, rows = warehouse.query("SELECT * FROM scores WHERE prompt_id = 'p2'")

    assert names == [column.name for column in TABLES["scores"].columns]
    measured = [1.0, 2.0, -1.5, 3, 7, "eos", 0.0, 1.0, 2.0, 3.0, 4.0]
    assert rows == [("demo", "modpo", 0.1, "p2", *measured, "fingerprint-0.1", "run-1")]


def test_materializations_tell_the_latest_of_each_experiment_asset_and_partition(warehouse: Warehouse) -> None:
    before = datetime.now(UTC).replace(tzinfo=None)
    model: dict[str, Any] = {"asset": "sft_model", "fingerprint": "f", "table": None, "parquet": None}
    record_scores(warehouse, None, **model)
    record_scores(warehouse, None, **model | {"fingerprint": "g", "run_id": "run-2", "reused": True})
    record_scores(warehouse, "all", **model, experiment="other")
    record_scores(warehouse, "0.5", **model | {"asset": "modpo_models"})

    _, rows = warehouse.query(
        "SELECT experiment, asset, partition, fingerprint, run_id, reused FROM materializations ORDER BY ALL"
    )
    assert rows == [
        ("demo", "modpo_models", "0.5", "f", "run-1", False),
        ("demo", "sft_model", None, "g", "run-2", True),
        ("other", "sft_model", None, "f", "run-1", False),
    ]
    times = warehouse.query("SELECT materialized_at FROM materializations")[1]
    assert all(before <= moment <= before + timedelta(seconds=60) for (moment,) in times)
    latest = warehouse.latest("demo", "sft_model", "all")
    assert latest is not None and latest["fingerprint"] == "g"
    assert warehouse.latest("demo", "sft_model", "0.1") is None


def test_rows_are_those_of_the_latest_materialization_of_each_weight_in_the_grid(
    warehouse: Warehouse,
) -> None:
    for w in (None, "0.1", "0.5"):
        record_scores(warehouse, w)
    record_scores(warehouse, "0.1", experiment="other")
    two = write_scores(warehouse.home / "two.parquet", "0.1", rows=2)

    record_scores(warehouse, "0.1", parquet=two, fingerprint="new", run_id="run-2")

    _, rows = warehouse.query(
        "SELECT experiment, w, fingerprint, run_id, count(*) FROM scores GROUP BY ALL ORDER BY ALL"
    )
    assert rows == [
        ("demo", 0.1, "new", "run-2", 2),
        ("demo", 0.5, "fingerprint-0.5", "run-1", 3),
        ("demo", None, "fingerprint-None", "run-1", 3),
        ("other", 0.1, "fingerprint-0.1", "run-1", 3),
    ]
    warehouse.forget_others("demo", {("sft_scores", "all"), ("scores", "0.5")})
    warehouse.publish()
    _, rows = warehouse.query("SELECT DISTINCT experiment, w FROM scores ORDER BY ALL")
    assert rows == [("demo", 0.5), ("demo", None), ("other", 0.1)]


def test_only_a_database_that_is_lost_old_or_was_written_to_is_published_again(warehouse: Warehouse) -> None:
    record_scores(warehouse, "0.1")
    published = warehouse.path.stat().st_ino
    warehouse.publish()
    assert warehouse.path.stat().st_ino == published
    record_scores(warehouse, "0.1")
    assert warehouse.path.stat().st_ino != published
    warehouse.path.unlink()
    warehouse.publish()
    assert counts(warehouse)["scores"] == 3

    with duckdb.connect(warehouse.path) as connection:
        connection.execute("DELETE FROM scores")
    assert counts(warehouse)["scores"] == 0
    warehouse.publish()
    assert counts(warehouse)["scores"] == 3


# With other processes.


def hold(home: Path, read_only: bool, statement: str, ready: Any) -> None:
    """Opens the published database, runs a statement and keeps the database open until killed."""
    connection = duckdb.connect(Warehouse(home).path, read_only=read_only)
    connection.execute(statement)
    ready.set()
    while True:
        time.sleep(0.05)
        connection.execute("SELECT count(*) FROM scores").fetchall()


@pytest.fixture
def holding(warehouse: Warehouse) -> Iterator[Any]:
    """Starts a process that holds the database open; all are killed in the end."""
    processes = []

    def start(read_only: bool, statement: str = "SELECT 1") -> int:
        ready = SPAWN.Event()
        process = SPAWN.Process(target=hold, args=(warehouse.home, read_only, statement, ready))
        process.start()
        processes.append(process)
        assert ready.wait(60)
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.join(60)


def publish_scores(home: Path, w: str, start: Any) -> None:
    warehouse = Warehouse(home)
    start.wait(60)
    for attempt in ("first", "second"):
        parquet = write_scores(home / f"{w}-{attempt}.parquet", w, rows=ROWS)
        record_scores(warehouse, w, parquet=parquet, fingerprint=attempt)


def read_until(home: Path, started: Any, stop: Any, results: Any) -> None:
    """Queries all the time; counts the reads, and keeps every partition that was not whole."""
    warehouse = Warehouse(home)
    reads, torn = 0, []
    while not stop.is_set() or reads == 0:
        _, rows = warehouse.query("SELECT w, count(DISTINCT fingerprint), count(*) FROM scores GROUP BY w")
        torn += [row for row in rows if row[1:] != (1, ROWS)]
        reads += 1
        started.set()
    results.put((reads, torn))


def test_four_processes_publish_while_others_hold_the_database_open(warehouse: Warehouse, holding: Any) -> None:
    """One holds it read-only, one has it open for writing and leaves a write-ahead log, one reads all the time."""
    weights = [f"0.{i}" for i in range(1, 5)]
    warehouse.publish()
    holding(False, "INSERT INTO scores BY NAME SELECT 'mine' AS experiment")
    assert warehouse.path.with_name("helpsteer.duckdb.wal").exists()
    start, started, stop, results = SPAWN.Barrier(5), SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    reader = SPAWN.Process(target=read_until, args=(warehouse.home, started, stop, results))
    reader.start()
    assert started.wait(60)
    publishers = [SPAWN.Process(target=publish_scores, args=(warehouse.home, w, start)) for w in weights]
    for publisher in publishers:
        publisher.start()
    warehouse.publish()  # The one open for writing is no longer the published one, so this one can be opened.
    holding(True)

    start.wait(60)
    for publisher in publishers:
        publisher.join(60)

    assert [publisher.exitcode for publisher in publishers] == [0] * 4
    stop.set()
    reads, torn = results.get(timeout=60)
    reader.join(60)
    assert (reads > 3, torn) == (True, [])
    _, rows = warehouse.query("SELECT w, fingerprint, count(*) FROM scores GROUP BY ALL ORDER BY w")
    assert rows == [(float(w), "second", ROWS) for w in weights]
    assert len(warehouse.query("FROM materializations")[1]) == 4
    assert not list(warehouse.folder.glob(".publish-*"))


def write_late(home: Path, opened: Any, published: Any) -> None:
    connection = duckdb.connect(Warehouse(home).path)
    opened.set()
    published.wait(60)
    connection.execute("DELETE FROM scores")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_log_left_by_someone_who_wrote_to_an_earlier_file_harms_no_query(warehouse: Warehouse) -> None:
    record_scores(warehouse, "0.1")
    opened, published = SPAWN.Event(), SPAWN.Event()
    writer = SPAWN.Process(target=write_late, args=(warehouse.home, opened, published))
    writer.start()
    assert opened.wait(60)
    record_scores(warehouse, "0.2")
    published.set()
    writer.join(60)
    with pytest.raises(duckdb.IOException, match="WAL does not match"):
        duckdb.connect(warehouse.path, read_only=True)

    assert counts(warehouse)["scores"] == 6
    warehouse.publish()
    with duckdb.connect(warehouse.path, read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchall() == [(6,)]


def die_while_publishing(home: Path) -> None:
    """Is killed after the new database is built and before it is renamed."""
    warehouse = Warehouse(home)
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
    (warehouse.folder / "published.json").unlink()
    warehouse.publish()


def test_a_publisher_that_was_killed_leaves_the_old_file_and_no_lock(warehouse: Warehouse) -> None:
    record_scores(warehouse, "0.1")
    process = SPAWN.Process(target=die_while_publishing, args=(warehouse.home,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(warehouse.folder.glob(".publish-*"))) == 1
    assert counts(warehouse)["scores"] == 3

    record_scores(warehouse, "0.2")

    assert counts(warehouse)["scores"] == 6
    assert not list(warehouse.folder.glob(".publish-*"))


# Damage, other versions, odd places.


def entry_file(warehouse: Warehouse, w: str) -> Path:
    return warehouse.registry / "demo" / "scores" / f"{w}.json"


def test_an_entry_of_a_newer_version_is_refused_since_its_rows_would_go_missing(warehouse: Warehouse) -> None:
    record_scores(warehouse, "0.1")
    damage_entry(entry_file(warehouse, "0.1"), schema_version=2)
    for use in (warehouse.publish, warehouse.entries, lambda: warehouse.latest("demo", "scores", "0.1")):
        with pytest.raises(HelpsteerError, match=r"0\.1\.json was written by a newer helpsteer_assets .*: upgrade"):
            use()
    assert counts(warehouse)["scores"] == 3, "what is published stays"


def damage_entry(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, other: damage_entry(file, partition="0.5"),
        lambda file, other: damage_entry(file, table=["scores"]),
        lambda file, other: damage_entry(file, run_id="\ud800"),
        lambda file, other: damage_entry(file, materialized_at="yesterday"),
        lambda file, other: file.write_bytes(b"[" * 100_000),
        lambda file, other: file.write_bytes(other.read_bytes()),
    ],
)
def test_a_garbled_entry_is_left_out_with_a_warning_and_the_others_are_published(
    warehouse: Warehouse, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, Path], None]
) -> None:
    for w in ("0.1", "0.2"):
        record_scores(warehouse, w)
    damage(entry_file(warehouse, "0.1"), entry_file(warehouse, "0.2"))
    warehouse.publish()
    assert warehouse.query("SELECT w, count(*) FROM scores GROUP BY w")[1] == [(0.2, 3)]
    assert warehouse.query("SELECT partition FROM materializations")[1] == [("0.2",)]
    assert warehouse.latest("demo", "scores", "0.1") is None
    assert str(entry_file(warehouse, "0.1")) in caplog.text and "materialize" in caplog.text


def test_rows_whose_file_is_gone_or_damaged_are_left_out_until_it_is_back(
    warehouse: Warehouse, caplog: pytest.LogCaptureFixture
) -> None:
    files = {w: write_scores(warehouse.home / f"{w}.parquet", w) for w in ("0.1", "0.2", "0.3")}
    for w, file in files.items():
        record_scores(warehouse, w, parquet=file)
    content = files["0.1"].read_bytes()
    files["0.1"].unlink()
    os.truncate(files["0.2"], 100)

    warehouse.publish()

    assert warehouse.query("SELECT DISTINCT w FROM scores")[1] == [(0.3,)]
    assert str(files["0.1"]) in caplog.text and str(files["0.2"]) in caplog.text
    files["0.1"].write_bytes(content)
    warehouse.publish()
    assert warehouse.query("SELECT DISTINCT w FROM scores ORDER BY w")[1] == [(0.1,), (0.3,)]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change a bit in place, as a failing disk does: size and times stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    for start in range(0, len(content), 4096):
        content[start + 100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_text("not a database")])
def test_a_damaged_database_is_an_error_in_words_until_it_is_published_anew(warehouse: Warehouse, damage: Any) -> None:
    record_scores(warehouse, "0.1")
    damage(warehouse.path)
    with pytest.raises(HelpsteerError, match=r"helpsteer\.duckdb cannot be read \(.*`helpsteer run` publishes it anew"):
        warehouse.query("SELECT sum(length(CAST(scores AS VARCHAR))) FROM scores")
    assert any("cannot be read" in line for line in warehouse.disagreements())
    warehouse.publish()
    assert counts(warehouse)["scores"] == 3
    assert warehouse.disagreements() == []


def test_the_tables_agree_with_the_files_they_were_made_from(warehouse: Warehouse) -> None:
    assert warehouse.disagreements() == []
    record_scores(warehouse, None)
    record_scores(warehouse, "0.5")
    assert warehouse.disagreements() == []
    write_scores(warehouse.home / "artifacts" / "scores" / "0.5" / "scores.parquet", "0.5", rows=4)
    first, second = warehouse.disagreements()
    assert first == "table scores: 0 rows are in no artifact, 1 of artifacts are missing"
    assert "was published before the registry's last change, or the home was copied" in second
    warehouse.path.unlink()
    assert "does not exist; the next `helpsteer run` publishes it" in warehouse.disagreements()[0]

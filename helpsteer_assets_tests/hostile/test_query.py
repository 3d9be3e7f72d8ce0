"""Whatever SQL `helpsteer query` is given, it reads the warehouse's tables: no file is read, made or changed by it."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpsteer_assets.cli import main
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.warehouse import QUERY_ROWS, Warehouse

SECRET = "canary-7f3a"
ENDLESS = "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range = 7"


class Watched:
    """A folder with a published home, a folder to work in, a user's home and one for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = [folder / name for name in ("work", "user", "tmp")]
        for place in self.places:
            place.mkdir()
        self.files = [folder / "work" / f"secret.{kind}" for kind in ("csv", "json", "parquet", "duckdb", "sql", "txt")]
        for file in self.files:
            file.write_text(f'{{"{SECRET}": "{SECRET}"}}\n')
        with duckdb.connect() as connection:
            connection.execute(f"COPY (SELECT '{SECRET}' AS a) TO '{folder}/work/secret.parquet'")
        self.warehouse = Warehouse(folder / "home")
        self.warehouse.publish()

    def content(self) -> dict[str, str]:
        """All that is there."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in self.folder.rglob("*")
        }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


@pytest.fixture(autouse=True)
def within(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    work, user, temporary = watched.places
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))


def ask(watched: Watched, sql: str) -> str:
    """Rows or a stated error, as text; anything else is raised."""
    try:
        return repr(watched.warehouse.query(sql))
    except HelpsteerError as error:
        return f"error: {error}"


REFUSED = [
    "COPY scores TO '{}'",
    "COPY scores FROM '{}'",
    "COPY (SELECT 1) TO '{}' (FORMAT parquet)",
    "COPY (SELECT 1 AS a) TO '{}' (PARTITION_BY a)",
    "COPY (SELECT 1) TO '/dev/stderr'",
    "COPY FROM DATABASE helpsteer TO other",
    "EXPORT DATABASE '{}'",
    "IMPORT DATABASE '{}'",
    "ATTACH '{}' AS other",
    "ATTACH '{}' AS other (READ_ONLY)",
    "ATTACH ':memory:' AS other",
    "ATTACH '' AS other",
    "DETACH helpsteer",
    "USE other",
    "FROM read_csv('{}')",
    "FROM read_json('{}')",
    "FROM read_text('{}')",
    "FROM read_blob('{}')",
    "FROM read_parquet('{}')",
    "FROM parquet_metadata('{}')",
    "FROM sniff_csv('{}')",
    "FROM glob('*')",
    "FROM '{}'",
    "FROM 's3://bucket/file.parquet'",
    "FROM read_text('http://127.0.0.1:9/')",
    "FROM query('FROM read_text(''{}'')')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{}'')'))",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{}'",
    "FORCE INSTALL spatial FROM community",
    "UPDATE EXTENSIONS",
    "SELECT st_point(1, 2)",
    "FROM sqlite_scan('{}', 'a')",
    "FROM duckdb_extensions()",
    "FROM duckdb_secrets()",
    "CREATE SECRET s (TYPE http)",
    "CREATE PERSISTENT SECRET s (TYPE http)",
    "SET enable_external_access = true",
    "SET temp_directory = '{}'",
    "SET memory_limit = '1TB'",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '{}'",
    "SET log_query_path = '{}'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{}'}})",
    "CALL enable_profiling(save_location = '{}')",
    "CREATE TABLE mine AS SELECT 1",
    "CREATE SCHEMA mine",
    "CREATE MACRO mine(x) AS x",
    "CREATE VIEW mine AS SELECT 1",
    "CREATE TYPE mine AS ENUM ('a')",
    "ALTER TABLE scores ADD COLUMN x INT",
    "COMMENT ON TABLE scores IS 'mine'",
    "INSERT INTO scores BY NAME SELECT 'x' AS experiment",
    "UPDATE scores SET w = 1",
    "DELETE FROM scores",
    "TRUNCATE scores",
    "DROP TABLE scores",
    "WITH gone AS (DELETE FROM scores RETURNING *) FROM gone",
    "SELECT 1; DROP TABLE scores",
    "SELECT 1\0; DROP TABLE scores",
    "EXPLAIN ANALYZE DELETE FROM scores",
    "EXPLAIN ANALYZE COPY scores TO '{}'",
    "PREPARE p AS COPY scores TO '{}'; EXECUTE p",
    "SELECT getenv('HOME')",
    "FROM watched",
    "FROM pandas_scan(1)",
    "FROM arrow_scan(1, 2, 3)",
    "SELECT '\ud800'",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT " + "1 + " * 100_000 + "1",
    f"FROM range({QUERY_ROWS + 1})",
    "SELECT ?",
    ";",
    "\0",
    "",
]


@pytest.mark.parametrize("sql", REFUSED, ids=lambda sql: ascii(sql[:60]))
def test_what_is_not_reading_the_tables_is_a_stated_error_and_changes_nothing(watched: Watched, sql: str) -> None:
    before = watched.content()
    for target in (watched.folder / "work" / "new", *watched.files[:4]):
        answer = ask(watched, sql.replace("{{", "{").replace("}}", "}").replace("{}", str(target)))
        assert answer.startswith("error: "), answer[:200]
        assert SECRET not in answer
        if "{}" not in sql:
            break
    assert watched.content() == before


STARTS = [sql for sql in REFUSED if "range(" not in sql and len(sql) < 200]
WORDS = (
    "SELECT FROM WHERE WITH UNION COPY TO ATTACH SET TEMP CREATE TABLE VIEW PRAGMA CALL EXPORT DATABASE LATERAL PIVOT "
    "ON USING VALUES NULL scores materializations read_text read_csv glob secret.csv 'secret.json' 'secret.parquet' "
    "'*' '../home/warehouse/helpsteer.duckdb' 'new.csv' 1 'x' -- /* */ $$"
)
FRAGMENTS = st.sampled_from([*WORDS.split(), *" '\"();,.*$\0\x1b\n"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
STATEMENTS = st.one_of(
    st.lists(FRAGMENTS | TEXT, max_size=14).map(" ".join),
    st.lists(FRAGMENTS | TEXT, max_size=14).map("".join),
    st.tuples(st.sampled_from(STARTS), FRAGMENTS, st.sampled_from(STARTS)).map("".join),
    st.tuples(st.sampled_from(STARTS), st.integers(0, 60), FRAGMENTS).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sql=STATEMENTS, target=st.sampled_from(["new.csv", "secret.csv", "secret.parquet", "../tmp/x", "../user/.duckdb"])
)
def test_no_statement_reads_or_changes_a_file(watched: Watched, sql: str, target: str) -> None:
    before = watched.content()
    assert SECRET not in ask(watched, sql.replace("{{", "{").replace("}}", "}").replace("{}", target))
    assert watched.content() == before


def test_what_a_query_may_use_is_bounded_and_lies_outside_the_home(watched: Watched) -> None:
    asked = ", ".join(
        f"current_setting('{name}')" for name in ("temp_directory", "memory_limit", "max_temp_directory_size")
    )
    _, [(folder, memory, spilled)] = watched.warehouse.query(f"SELECT {asked}")
    assert Path(folder).parent == watched.places[2] and not Path(folder).exists()
    assert (memory, spilled) == ("1.8 GiB", "14.9 GiB")


def test_a_query_that_needs_more_is_told_what_it_may_have(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpsteer_assets.store.warehouse.QUERY_MEMORY", "64MB")
    monkeypatch.setattr("helpsteer_assets.store.warehouse.QUERY_SPILL", "1MB")
    numbered = "SELECT row_number() OVER (ORDER BY hash(i)) AS n FROM range(9000000) AS r(i)"
    for sql in ("SELECT list(i) FROM range(100000000) AS r(i)", f"SELECT max(n) FROM ({numbered})"):
        assert "needs more than the 64MB of memory and 1MB of temporary files that it may have" in ask(watched, sql)
    assert list(watched.places[2].iterdir()) == []


def test_a_query_that_would_never_end_ends_by_ctrl_c(watched: Watched) -> None:
    """DuckDB itself, in the main thread, would not hear of it before the first row."""
    program = (
        "import signal, sys; from pathlib import Path; from helpsteer_assets.store.warehouse import Warehouse\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "print('begins', flush=True); Warehouse(Path(sys.argv[1])).query(sys.argv[2])"
    )
    environment = os.environ | {"TMPDIR": str(watched.places[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(watched.folder / "home"), ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    folder = watched.places[2]
    while not list(folder.glob("helpsteer-query-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not list(folder.iterdir())


@pytest.mark.parametrize("sign", ["\x1b[31m", "\x9b2J", "\x07", "\r", "\x7f", "\u202e", "\u2066", "\b\b"])
def test_no_text_of_a_model_commands_the_terminal(watched: Watched, monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    for variable in ("HELPSTEER_EXPERIMENT", "HELPSTEER_HOME"):
        monkeypatch.setenv(variable, "")  # the command sets both; pytest puts them back

    def query(sql: str) -> str:
        result = CliRunner().invoke(main, ["--home", str(watched.folder / "home"), "query", sql])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result.output

    for sql in (f"SELECT 'a{sign}b' AS text", f'SELECT 1 AS "a{sign}b"', f"SELECT 'a{sign}b'::INT"):
        shown = query(sql)
        assert sign not in shown and f"a{ascii(sign)[1:-1]}b" in shown
    both = query("SELECT 'naïve e\u0301 日本 שלום\nnext' AS text")
    assert "naïve e\u0301 日本 שלום" in both and "next" in both.splitlines()[-2], "what is only text stays"

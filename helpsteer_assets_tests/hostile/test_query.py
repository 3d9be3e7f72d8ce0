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
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.cli import main
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.warehouse import QUERY_ROWS, Warehouse
from helpsteer_assets_tests.hostile.inputs import any_text, examples

SECRET = "canary-7f3a"
ENDLESS = "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range = 7"


class Watched:
    """A folder with a published home, a folder to work in with secrets, a user's home and one for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work, self.user, self.temporary = (folder / name for name in ("work", "user", "tmp"))
        for place in (self.work, self.user, self.temporary):
            place.mkdir()
        self.files = [self.work / f"secret.{kind}" for kind in ("json", "duckdb", "parquet")]
        for file in self.files:
            file.write_text(f'{{"{SECRET}": "{SECRET}"}}\n')
        duckdb.sql(f"COPY (SELECT '{SECRET}' AS a) TO '{self.files[-1]}'")
        self.warehouse = Warehouse(folder / "home")
        self.warehouse.publish()

    def ask(self, sql: str) -> str:
        """Rows or a stated error, as text; anything else is raised. That nothing was read or changed is asserted."""
        before = self.content()
        try:
            answer = repr(self.warehouse.query(sql))
        except HelpsteerError as error:
            answer = f"error: {error}"
        assert SECRET not in answer and self.content() == before, sql[:200]
        return answer

    def content(self) -> dict[Path, str]:
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in self.folder.rglob("*")
        }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


@pytest.fixture(autouse=True)
def within(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(watched.work)
    monkeypatch.setenv("HOME", str(watched.user))
    monkeypatch.setattr("tempfile.tempdir", str(watched.temporary))


FILES = """
COPY scores TO 'FILE'
EXPORT DATABASE 'FILE'
ATTACH 'FILE' AS other (READ_ONLY)
FROM read_text('FILE')
FROM 'FILE'
FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''FILE'')'))
FROM sqlite_scan('FILE', 'a')
LOAD 'FILE'
SET temp_directory = 'FILE'
CALL enable_logging(storage = 'file', storage_config = {'path': 'FILE'})
EXPLAIN ANALYZE COPY scores TO 'FILE'
PREPARE p AS COPY scores TO 'FILE'; EXECUTE p
""".strip().splitlines()
OTHERS = """
FROM glob('*')
INSTALL httpfs
CREATE PERSISTENT SECRET s (TYPE http)
RESET lock_configuration
WITH gone AS (DELETE FROM scores RETURNING *) FROM gone
SELECT 1; DROP TABLE scores
FROM watched
;
""".strip().splitlines()
LONG = ["SELECT " + "(" * 5000 + "1" + ")" * 5000, "SELECT " + "1 + " * 100_000 + "1", f"FROM range({QUERY_ROWS + 1})"]


def test_what_is_not_reading_the_tables_is_a_stated_error(watched: Watched) -> None:
    statements = [sql.replace("FILE", str(file)) for sql in FILES for file in (watched.work / "new", *watched.files)]
    for sql in [*statements, *OTHERS, *LONG, "SELECT 1\0; DROP TABLE scores", "\0", "SELECT '\ud800'"]:
        assert watched.ask(sql).startswith("error: "), sql[:200]


WORDS = (
    "SELECT FROM WHERE WITH UNION COPY TO ATTACH SET TEMP CREATE TABLE VIEW PRAGMA CALL EXPORT DATABASE LATERAL PIVOT "
    "ON USING VALUES NULL scores materializations read_text read_csv glob secret.json 'secret.json' 'secret.parquet' "
    "'*' '../home/warehouse/helpsteer.duckdb' 'new.csv' 1 'x' -- /* */ $$"
)
fragments = st.sampled_from([*WORDS.split(), *" '\"();,.*$\0\x1b\n"])
starts = st.sampled_from([*FILES, *OTHERS])
statements = st.lists(fragments | any_text, max_size=14).map(" ".join) | st.tuples(
    starts, st.integers(0, 60), fragments
).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])


@examples(120)
@given(sql=statements, file=st.sampled_from(["new", "secret.json", "secret.parquet", "../tmp/x", "../user/.duckdb"]))
def test_any_sql_gives_rows_or_a_stated_error(watched: Watched, sql: str, file: str) -> None:
    watched.ask(sql.replace("FILE", file))


def test_a_query_that_needs_more_is_told_what_it_may_have(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpsteer_assets.store.warehouse.QUERY_MEMORY", "64MB")
    monkeypatch.setattr("helpsteer_assets.store.warehouse.QUERY_SPILL", "1MB")
    numbered = "SELECT row_number() OVER (ORDER BY hash(i)) AS n FROM range(9000000) AS r(i)"
    for sql in ("SELECT list(i) FROM range(100000000) AS r(i)", f"SELECT max(n) FROM ({numbered})"):
        assert "needs more than the 64MB of memory and 1MB of temporary files" in watched.ask(sql)


def test_a_query_that_would_never_end_ends_by_ctrl_c(watched: Watched) -> None:
    """DuckDB itself, in the main thread, would not hear of it before the first row."""
    program = (
        "import signal, sys; from pathlib import Path; from helpsteer_assets.store.warehouse import Warehouse\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "Warehouse(Path(sys.argv[1])).query(sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(watched.folder / "home"), ENDLESS],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(watched.temporary)},
        cwd=Path(__file__).parents[2],
    )
    while not list(watched.temporary.glob("helpsteer-query-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not list(watched.temporary.iterdir())


@pytest.mark.parametrize("sign", ["\x1b[31m", "\x9b2J", "\r", "\x7f", "\u202e"])
def test_no_text_of_a_model_commands_the_terminal(watched: Watched, monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    for variable in ("HELPSTEER_EXPERIMENT", "HELPSTEER_HOME"):
        monkeypatch.setenv(variable, "")  # the command sets both; pytest puts them back
    for sql in (f"SELECT 'a{sign}b' AS text", f'SELECT 1 AS "a{sign}b"', f"SELECT 'a{sign}b'::INT"):
        shown = CliRunner().invoke(main, ["--home", str(watched.folder / "home"), "query", sql]).output
        assert sign not in shown and f"a{ascii(sign)[1:-1]}b" in shown

"""The command line: what it prints, how it fails, and what it does not import."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner, Result

from helpsteer_assets.cli import main
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.warehouse import Warehouse

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in an empty folder, without the variables of whoever runs the tests."""
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "")  # the commands set both; pytest puts them back
    monkeypatch.setenv("HELPSTEER_HOME", "")
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        result = CliRunner().invoke(main, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return invoke


def failed(result: Result) -> str:
    """The message of a mistake that the user can mend."""
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


# Experiment and home


def test_a_mistake_is_one_message_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    assert "experiment" in failed(run("-e", "helpster", "status"))
    assert "did you mean `helpsteer`?" in failed(run("-e", "helpster", "check"))
    (tmp_path / "mine.yaml").write_text("extends: demo\nname: mine\nmodpo: {stepss: 3}\n")
    for command in ("status", "check", "run", "ui"):
        assert "modpo.stepss: unknown key; did you mean `steps`?" in failed(run("-e", "mine.yaml", command))


def test_the_process_prints_no_traceback_either() -> None:
    command = [sys.executable, "-c", "from helpsteer_assets.cli import main; main()", "-e", "nope", "status"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: experiment ") and done.stderr.count("\n") == 1


def test_experiment_and_home_come_from_options_then_variables_then_defaults(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_line(*arguments: str) -> str:
        result = run(*arguments, "status")
        assert result.exit_code == 0, result.output
        return result.output.splitlines()[0]

    assert first_line() == f"experiment demo, home {tmp_path / '.helpsteer'}"
    (tmp_path / "mine.yaml").write_text("extends: demo\nname: mine\n")
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "mine.yaml")
    monkeypatch.setenv("HELPSTEER_HOME", "by-variable")
    assert first_line() == f"experiment mine, home {tmp_path / 'by-variable'}"
    given = first_line("--experiment", "demo", "--home", "given")
    assert given == f"experiment demo, home {tmp_path / 'given'}"


def test_a_home_that_cannot_be_read_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "a file stands where a folder must be" in failed(run("--home", "file", "status"))


def test_help_names_every_command(run: Run) -> None:
    text = run("--help").output
    commands = ("check", "run", "status", "query", "report", "export", "verify", "gc", "ui")
    assert all(f"\n  {command} " in text for command in commands)


# query


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose warehouse holds two rows, one with a null."""
    folder = tmp_path_factory.mktemp("published")
    home, parquet = folder / "home", folder / "log_probs.parquet"
    with duckdb.connect() as connection:
        connection.sql(
            "SELECT 'p' || range AS prompt_id, 'r' || range AS response_id, -1.23456789::DOUBLE AS log_prob, "
            "range::INT AS response_tokens, CASE WHEN range = 0 THEN true END AS truncated FROM range(2)"
        ).write_parquet(str(parquet))
    Warehouse(home).record(
        experiment="demo",
        asset="reference_log_probs",
        partition=None,
        fingerprint="f",
        path=folder,
        run_id="run-1",
        reused=False,
        table="reference_log_probs",
        parquet=parquet,
        constants={},
    )
    return home


AWKWARD = (
    """SELECT 'a "quoted", one' AS text, NULL AS nothing, 'Zoë 日本 [bold] :smile:' AS more, 0.123456789 AS number"""
)


def test_query_prints_a_table(run: Run, published: Path) -> None:
    result = run("--home", str(published), "query", "SELECT * FROM reference_log_probs ORDER BY prompt_id")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if line.strip()]
    assert lines[0][:5] == ["experiment", "prompt_id", "response_id", "log_prob", "response_tokens"]
    assert lines[2] == ["demo", "p0", "r0", "-1.235", "0", "True", "f", "run-1"]
    assert lines[3] == ["demo", "p1", "r1", "-1.235", "1", "f", "run-1"], "null is nothing"


def test_query_prints_text_as_it_is(run: Run, published: Path) -> None:
    output = run("--home", str(published), "query", AWKWARD).output
    assert 'a "quoted", one' in output
    assert "Zoë 日本 [bold] :smile:" in output, "neither markup nor emoji codes are read in data"


def test_query_writes_csv_that_can_be_read_back(run: Run, published: Path) -> None:
    output = run("--home", str(published), "query", AWKWARD, "--format", "csv").output
    assert output.splitlines()[0] == "text,nothing,more,number"
    assert '"a ""quoted"", one",,' in output
    (row,) = csv.DictReader(io.StringIO(output))
    assert row == {
        "text": 'a "quoted", one',
        "nothing": "",
        "more": "Zoë 日本 [bold] :smile:",
        "number": "0.123456789",
    }


def test_query_writes_json_with_nulls_and_dates(run: Run, published: Path) -> None:
    output = run("--home", str(published), "query", AWKWARD, "--format", "json").output
    (row,) = json.loads(output)
    assert row["nothing"] is None and row["text"] == 'a "quoted", one'
    assert "Zoë 日本" in output, "not escaped"
    sql = "SELECT materialized_at, reused, 'nan'::DOUBLE AS undefined FROM materializations"
    (row,) = json.loads(
        run("--home", str(published), "query", sql, "--format", "json").output, parse_constant=pytest.fail
    )
    assert row["reused"] is False and row["materialized_at"].startswith("20") and row["undefined"] is None


def test_query_loses_no_column_of_a_join_in_json(run: Run, published: Path) -> None:
    sql = "SELECT a.prompt_id, b.prompt_id, 1 AS x FROM reference_log_probs a JOIN reference_log_probs b "
    sql += "ON a.prompt_id < b.prompt_id"
    (row,) = json.loads(run("--home", str(published), "query", sql, "--format", "json").output)
    assert row == {"prompt_id": "p0", "prompt_id_1": "p1", "x": 1}


def test_query_without_rows_keeps_the_columns(run: Run, published: Path) -> None:
    sql = "SELECT w, measure FROM score_summary"
    assert run("--home", str(published), "query", sql, "--format", "csv").output == "w,measure\n"
    assert json.loads(run("--home", str(published), "query", sql, "--format", "json").output) == []
    assert "measure" in run("--home", str(published), "query", sql).output


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DELETE FROM reference_log_probs", "the warehouse is read-only"),
        ("CREATE TABLE mine AS SELECT 1", "the warehouse is read-only"),
        ("SELECT * FROM read_csv('/etc/passwd')", "a query reads the warehouse's tables only"),
        ("SELECT nope FROM scores", "nope"),
        ("SELEC 1", "Parser Error"),
        ("", "the query is empty"),
    ],
)
def test_a_query_that_is_refused_says_why(run: Run, published: Path, sql: str, message: str) -> None:
    assert message in failed(run("--home", str(published), "query", sql))
    still = run("--home", str(published), "query", "SELECT count(*) AS n FROM reference_log_probs", "--format", "csv")
    assert still.output == "n\n2\n"


def test_a_query_before_anything_was_materialized_says_what_to_do(run: Run) -> None:
    assert "nothing materialized yet; run `helpsteer run`" in failed(run("query", "SELECT 1"))


def test_a_format_that_is_none_is_refused(run: Run) -> None:
    result = run("query", "SELECT 1", "--format", "xml")
    assert result.exit_code == 2 and "'table', 'csv', 'json'" in result.stderr


# run, check, ui


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.2", "0.2 is not in the grid of experiment demo (0.1, 0.3, 0.5, 0.7, 0.9); add it to objective.weights"),
        ("0.1,half", "--weights: a weight is a number in (0, 1], got 'half'"),
        ("0", "0 is excluded"),
        ("", "a weight is a number in (0, 1]"),
    ],
)
def test_weights_that_are_not_in_the_grid_are_refused(run: Run, weights: str, message: str) -> None:
    assert message in failed(run("run", "--weights", weights))


@pytest.mark.parametrize(
    ("selection", "what"),
    [
        ("nonsense", "cannot be read"),
        ("key:", "cannot be read"),
        ("scores or +", "cannot be read"),
        ("group:nope", "selects no asset"),
    ],
)
def test_a_selection_that_selects_nothing_lists_the_assets(run: Run, selection: str, what: str) -> None:
    message = failed(run("run", "--select", selection))
    assert f"--select {selection!r} {what}" in message
    assert "Assets: evaluation_prompts, generations, helpsteer_ratings" in message


@pytest.mark.parametrize(("succeeds", "code"), [(True, 0), (False, 1)])
def test_run_passes_on_what_is_asked_and_exits_by_what_came_of_it(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    succeeds: bool,
    code: int,
) -> None:
    import helpsteer_assets.commands.run

    asked: list[Any] = []

    def run_experiment(experiment: Any, home: Path, **options: Any) -> bool:
        asked.extend([experiment.name, home, options["select"], options["weights"]])
        options["announce"]("working")
        return succeeds

    monkeypatch.setattr(helpsteer_assets.commands.run, "run_experiment", run_experiment)
    result = run("--home", "h", "run", "--select", "scores", "--weights", "0.90, .1,0.9")
    assert (result.exit_code, capfd.readouterr().out) == (code, "working\n")
    assert asked == ["demo", tmp_path / "h", "scores", ["0.9", "0.1"]]


@pytest.mark.parametrize(("problem", "code"), [(False, 0), (True, 2)])
def test_check_exits_by_whether_there_are_problems(
    run: Run, monkeypatch: pytest.MonkeyPatch, problem: bool, code: int
) -> None:
    import helpsteer_assets.commands.check

    def report(experiment: Any, home: Path) -> Any:
        yield f"{experiment.name} in {home.name}"
        if problem:
            raise HelpsteerError("1 problem")

    monkeypatch.setattr(helpsteer_assets.commands.check, "report", report)
    result = run("--home", "h", "check")
    assert (result.exit_code, result.stdout) == (code, "demo in h\n")
    assert result.stderr == ("error: 1 problem\n" if problem else "")


def test_ui_starts_dagster_on_the_experiments_own_state(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda file, arguments: started.extend([file, arguments]))
    result = run("--home", "h", "ui", "--port", "4000")
    assert result.output.startswith(f"experiment demo, home {tmp_path / 'h'}\nthe graph: http://127.0.0.1:4000/")
    assert started[0] == sys.executable
    assert started[1][1:] == [
        "-m",
        "dagster",
        "dev",
        "-m",
        "helpsteer_assets.definitions",
        "-h",
        "127.0.0.1",
        "-p",
        "4000",
    ]
    home = tmp_path / "h" / "dagster" / "demo"
    assert (home / "dagster.yaml").is_file()
    assert os.environ["DAGSTER_HOME"] == str(home) and os.environ["HELPSTEER_HOME"] == str(tmp_path / "h")


def test_ui_refuses_a_port_that_is_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.execv", lambda file, arguments: pytest.fail("started all the same"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = failed(run("--home", "h", "ui", "--port", port))
    assert f"cannot listen on 127.0.0.1:{port}" in message and "--port" in message


# Imports


HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "dagster", "sqlalchemy", "pandas", "numpy", "pyarrow"}
HEAVY |= {"matplotlib", "PIL", "huggingface_hub"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [(["--help"], HEAVY | {"duckdb", "rich"}), (["status"], HEAVY), (["query", "SELECT 1 AS one"], HEAVY)],
)
def test_commands_that_only_read_import_nothing_that_takes_long(
    published: Path, command: list[str], unneeded: set[str]
) -> None:
    code = (
        "import sys; from helpsteer_assets.cli import main\n"
        f"try: main({['--home', str(published), *command]!r}, standalone_mode=False)\n"
        f"finally: print({unneeded!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"

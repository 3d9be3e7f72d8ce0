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

import pytest
from click.testing import CliRunner, Result

from helpsteer_assets.cli import main
from helpsteer_assets_tests.finished import Finished

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


# query


def query(run: Run, finished: Finished, sql: str, kind: str) -> str:
    result = run("--home", str(finished.home), "query", sql, "--format", kind)
    assert result.exit_code == 0, result.output
    return result.output


AWKWARD = (
    """SELECT 'a "quoted", one' AS text, NULL AS nothing, 'Zoë 日本 [bold] :smile:' AS more, 0.123456789 AS number"""
)


def test_query_gives_awkward_values_as_they_are_in_every_format(run: Run, finished_home: Finished) -> None:
    more = "Zoë 日本 [bold] :smile:"  # neither markup nor emoji codes
    shown = query(run, finished_home, AWKWARD, "table")
    assert shown.split()[:4] == ["text", "nothing", "more", "number"]
    assert more in shown and "None" not in shown, "null is nothing"
    assert "measure" in query(run, finished_home, "SELECT measure FROM score_summary WHERE false", "table")
    (row,) = csv.DictReader(io.StringIO(query(run, finished_home, AWKWARD, "csv")))
    assert row == {"text": 'a "quoted", one', "nothing": "", "more": more, "number": "0.123456789"}
    shown = query(run, finished_home, AWKWARD, "json")
    assert more in shown, "not escaped"
    (row,) = json.loads(shown)
    assert row["nothing"] is None and row["text"] == 'a "quoted", one'


def test_query_gives_json_that_every_reader_takes(run: Run, finished_home: Finished) -> None:
    """Dates are text, what is not a number is null, and columns of one name are told apart."""
    sql = "SELECT a.materialized_at, 'nan'::DOUBLE AS undefined, a.asset, b.asset FROM materializations a "
    sql += "JOIN materializations b ON a.asset = 'sft_model' AND b.asset = 'margin_pairs'"
    (row,) = json.loads(query(run, finished_home, sql, "json"), parse_constant=pytest.fail)
    assert row["materialized_at"].startswith("20") and row["undefined"] is None
    assert (row["asset"], row["asset_1"]) == ("sft_model", "margin_pairs")
    nothing = "SELECT w, measure FROM score_summary WHERE false"
    assert json.loads(query(run, finished_home, nothing, "json")) == []
    assert query(run, finished_home, nothing, "csv") == "w,measure\n"


def test_a_query_that_is_refused_says_why(run: Run, finished_home: Finished) -> None:
    refused = run("--home", str(finished_home.home), "query", "DELETE FROM scores")
    assert "the warehouse is read-only" in failed(refused)


# run, check, ui


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "0.2"], "0.2 is not in the grid of experiment demo (0.1, 0.3, 0.5, 0.7, 0.9); add it to objec"),
        (["--weights", "0.1,half"], "a weight is a number in (0, 1] of at most ten decimals, got 'half'"),
        (["--select", "group:nope"], "--select 'group:nope' selects no asset. Assets: evaluation_prompts, generations"),
    ],
)
def test_a_run_of_what_is_not_there_is_refused(run: Run, arguments: list[str], message: str) -> None:
    assert message in failed(run("run", *arguments))


def test_run_exits_by_what_came_of_it(
    run: Run, copied: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for changes, code in (({}, 0), ({"sft": {"learning_rate": 1e30}}, 1)):
        changed = copied(**changes)
        options = ["-e", str(changed.file), "--home", str(changed.home)]
        result = run(*options, "run", "--select", 'key:"sft_model" or key:"scores"', "--weights", "0.90, .9")
        said = capfd.readouterr().out
        assert result.exit_code == code, said
        assert "scores w=0.9" in said and "w=0.1" not in said


def test_ui_starts_dagster_on_the_experiments_own_state(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda file, arguments: started.extend([file, arguments]))
    result = run("--home", "h", "ui", "--port", "4000")
    assert result.output.startswith(f"experiment demo, home {tmp_path / 'h'}\nthe graph: http://127.0.0.1:4000/")
    assert started[0] == sys.executable
    assert " ".join(started[1][1:]) == "-m dagster dev -m helpsteer_assets.definitions -h 127.0.0.1 -p 4000"
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


HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "dagster", "sqlalchemy", "pandas", "matplotlib", "PIL"}
HEAVY |= {"huggingface_hub"}
ARRAYS = {"numpy", "pyarrow"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (["--help"], HEAVY | ARRAYS | {"duckdb", "rich"}),
        (["status"], HEAVY),
        (["query", "SELECT 1 AS one"], HEAVY | ARRAYS),
    ],
)
def test_commands_that_only_read_import_nothing_that_takes_long(
    finished_home: Finished, command: list[str], unneeded: set[str]
) -> None:
    code = (
        "import sys; from helpsteer_assets.cli import main\n"
        f"try: main({['--home', str(finished_home.home), *command]!r}, standalone_mode=False)\n"
        f"finally: print({unneeded!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"

"""The command line: helpsteer check | run | status | query | report | export | verify | gc | ui.

Modules that take seconds to import (dagster, torch) are imported by the commands that need them.
"""

import csv
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import click

from helpsteer_assets.commands.console import (
    cell,
    command_name,
    garbage_rows,
    json_value,
    printable,
    table_lines,
    unique,
)
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.files.os_errors import readable_errors
from helpsteer_assets.store.home import Home


def _readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what the user can mend without a traceback, and exit with 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with readable_errors(Home.from_environment().path):
                command(*args, **kwargs)
        except HelpsteerError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-e", "--experiment", metavar="NAME|PATH", help="Experiment; default HELPSTEER_EXPERIMENT, else demo.")
@click.option(
    "--home", type=click.Path(path_type=Path), help="Where results are kept; default HELPSTEER_HOME, else ./.helpsteer."
)
@click.version_option(package_name="helpsteer_assets")
def main(experiment: str | None, home: Path | None) -> None:
    """MODPO on HelpSteer: one policy per weight, and the trade-off between them."""
    # The code location, and every process that a command starts, reads the same two variables.
    if experiment is not None:
        os.environ["HELPSTEER_EXPERIMENT"] = experiment
    if home is not None:
        os.environ["HELPSTEER_HOME"] = str(home)


@main.command()
@_readable_errors
def check() -> None:
    """Validate the experiment, its source, its model and this machine without computing. Exits with 2 on problems."""
    from helpsteer_assets.commands.check import report

    for line in report(load_experiment(), Home.from_environment()):
        click.echo(line)


@main.command()
@click.option(
    "--select", metavar="SELECTION", help="Assets, in Dagster's selection syntax: 'scores', 'key:\"modpo_models\"+'."
)
@click.option("--weights", metavar="W[,W]", help="Only these weights of the experiment's grid.")
@_readable_errors
def run(select: str | None, weights: str | None) -> None:
    """Materialize what is missing, and show the trade-off. Finished assets are reused, killed ones go on."""
    from helpsteer_assets.commands.console import Console
    from helpsteer_assets.commands.export import grid_weight
    from helpsteer_assets.commands.run import run_experiment

    experiment = load_experiment()
    chosen = None if weights is None else [grid_weight(item, experiment) for item in weights.split(",")]
    console = Console()
    complete = run_experiment(
        experiment,
        Home.from_environment(),
        select=select,
        weights=chosen and list(dict.fromkeys(chosen)),
        announce=console.say,
        terminal=console.terminal,
    )
    if not complete:
        sys.exit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_readable_errors
def status(as_json: bool) -> None:
    """Print the state of every asset and weight, and why what is out of date is."""
    from helpsteer_assets.assets.status import label
    from helpsteer_assets.assets.status import status as find_status

    experiment = load_experiment()
    states = find_status(experiment, Home.from_environment())
    if as_json:
        click.echo(json.dumps([vars(item) for item in states], indent=2))
        return
    click.echo(f"experiment {experiment.name}, home {Home.from_environment()}")
    rows = [(label(s.asset, s.partition), s.state, s.detail, s.fingerprint[:8]) for s in states]
    _print_table(["asset", "state", "detail", "fingerprint"], rows)


@main.command()
@click.argument("sql")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table", help="Default: table.")
@_readable_errors
def query(sql: str, form: str) -> None:
    """Read the warehouse by SQL, read-only. Tables: `helpsteer query "show tables"`."""

    names, rows = Home.from_environment().warehouse.query(sql)
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    elif form == "json":
        keys = unique(names)
        objects = [{key: json_value(value) for key, value in zip(keys, row, strict=True)} for row in rows]
        click.echo(json.dumps(objects, default=str, ensure_ascii=False))
    else:
        _print_table([printable(name) for name in names], [[cell(value) for value in row] for row in rows])


@main.command()
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="FILE", help="Copy it to this file, replaced if it is there."
)
@click.option("--open", "open_it", is_flag=True, help="Open it in the web browser.")
@_readable_errors
def report(to: Path | None, open_it: bool) -> None:
    """Print where the report of the trade-off is: one HTML file, which needs no network."""
    from helpsteer_assets.commands.export import take_report

    path = take_report(load_experiment(), Home.from_environment(), to)
    click.echo(path)
    click.echo(path.as_uri())
    if open_it:
        import webbrowser

        if not webbrowser.open(path.as_uri()):
            raise HelpsteerError(f"no web browser can be started here; open {path.as_uri()} in one yourself")


@main.command()
@click.argument("policy")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="An empty or a new folder.")
@click.option(
    "--merged/--adapter",
    default=True,
    help="One whole model (default), or the adapter with the SFT model beside it in base_model/.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export that lies in DIR.")
@click.option("--push", "repo", metavar="REPO", help="Show what would be sent to this repository of the hub.")
@click.option("--public", is_flag=True, help="With --push: a repository that everybody can read; default: private.")
@click.option("--yes", is_flag=True, help="With --push: send it.")
@_readable_errors
def export(policy: str, to: Path, merged: bool, force: bool, repo: str | None, public: bool, yes: bool) -> None:
    """Write a policy (w=0.4, or sft) to a folder that transformers, PEFT, vLLM and the hub read.

    With it go the tokenizer, the generation settings, a model card with its scores and licences, and its provenance.
    """
    from helpsteer_assets.commands.export import export_policy
    from helpsteer_assets.commands.push import check_repository, push, repository
    from helpsteer_assets.files.durable import size_in_words

    if repo is None and (public or yes):
        raise HelpsteerError(f"{'--public' if public else '--yes'} goes with --push REPO")
    url = None if repo is None else repository(repo)
    if repo is not None and yes:
        check_repository(repo, public=public)
    made = export_policy(
        load_experiment(),
        Home.from_environment(),
        policy,
        to,
        merged=merged,
        force=force,
        announce=lambda message: click.echo(message, err=True),
    )
    click.echo(f"{'there already' if made.reused else 'exported'}: {made.title}, in {made.folder}")
    if repo is None:
        return
    click.echo(f"{'sending' if yes else 'would send'} to {url}, {'public' if public else 'private'}:")
    rows = [(name, size_in_words(size)) for name, size in made.files.items()]
    _print_table(["file", "size"], [*rows, ("in all", size_in_words(sum(made.files.values())))])
    if yes:
        click.echo(f"sent: {push(made, repo, public=public)}")
    else:
        click.echo("nothing was sent; the same command with --yes sends it")


@main.command()
@click.option("--deep", is_flag=True, help="Also recompute a random sample of the results, and compare.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=8, show_default=True, help="Rows per artifact for --deep."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses those rows.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_readable_errors
def verify(deep: bool, samples: int, seed: int, as_json: bool) -> None:
    """Read all artifacts and tables, and report what is not as it was computed. Changes nothing; exits with 1 on it.

    With --deep, a sample of log-probabilities, scores, ratings, responses and means is recomputed from the stored
    models by plain transformers and peft, one response at a time. The stored ones may differ by rounding only.
    """
    from helpsteer_assets.commands.console import Console
    from helpsteer_assets.commands.verify import lines
    from helpsteer_assets.commands.verify import verify as find_problems

    experiment, console = load_experiment(), Console()
    report = find_problems(
        experiment,
        Home.from_environment(),
        samples=samples if deep else 0,
        seed=seed,
        log=lambda message: click.echo(message, err=True),
        terminal=console.terminal,
    )
    if as_json:
        click.echo(json.dumps({"whole": not report.problems} | asdict(report), indent=2))
    else:
        click.echo(f"experiment {experiment.name}, home {Home.from_environment()}")
        for line in lines(report):
            click.echo(printable(line))
    if report.problems:
        sys.exit(1)


@main.command()
@click.option("--delete", is_flag=True, help="Remove what is listed.")
@click.option(
    "--keep", metavar="NAME|PATH", multiple=True, help="A further experiment whose artifacts are kept; may be repeated."
)
@click.option(
    "--older-than",
    type=click.IntRange(min=0),
    metavar="DAYS",
    help="Only what nobody wrote to for so many days; default 0, and 7 for unfinished work.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_readable_errors
def gc(delete: bool, keep: tuple[str, ...], older_than: int | None, as_json: bool) -> None:
    """List what nothing refers to, with its size and the reason; --delete removes it.

    Kept are the artifacts of the shipped experiments, of the one that -e or HELPSTEER_EXPERIMENT names and of those of
    --keep; every experiment's latest materializations; and all that these were made from. Dagster's own state is left
    alone. While something runs, --delete removes nothing and says what runs.
    """
    from helpsteer_assets.commands.gc import delete_garbage, find_garbage
    from helpsteer_assets.files.durable import size_in_words

    experiments = [load_experiment(), *map(load_experiment, (*SHIPPED, *keep))]
    home = Home.from_environment()
    survey = (delete_garbage if delete else find_garbage)(home, experiments, older_than)
    total = sum(item.bytes for item in survey.garbage)
    if as_json:
        told = asdict(survey)
        told = {"home": home, "deleted": delete, "bytes": total, "items": told.pop("garbage")} | told
        click.echo(json.dumps(told, indent=2, default=str))
        return
    click.echo(f"home {home}")
    if survey.garbage:
        _print_table(["size", "what", "reason"], garbage_rows(survey.garbage, home))
    for note in survey.notes:
        click.echo(f"note: {note}")
    if survey.kept:
        click.echo(f"kept: {survey.kept} finished artifacts, {size_in_words(survey.kept_bytes)}")
    if not survey.garbage:
        click.echo("nothing to remove")
    elif delete:
        click.echo(f"removed: {size_in_words(total)}")
    else:
        click.echo(f"can go: {size_in_words(total)}; `{command_name()} gc --delete`, with the same options, removes it")


@main.command()
@click.option("--port", default=3000, show_default=True, help="Port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@_readable_errors
def ui(port: int, host: str) -> None:
    """Open the Dagster UI on the same home as `helpsteer run`: each shows the other's work."""
    from helpsteer_assets.execution.dagster_home import make_dagster_home

    experiment = load_experiment()
    home = Home.from_environment()
    _require_free_port(host, port)
    os.environ["HELPSTEER_HOME"] = str(home)
    os.environ["DAGSTER_HOME"] = str(make_dagster_home(home, experiment.name))
    groups = "%2C".join(f"global%40global%3A{group}" for group in ("data", "training", "evaluation"))
    click.echo(f"experiment {experiment.name}, home {home}")
    click.echo(f"the graph: http://{host}:{port}/asset-groups?expanded={groups}")
    module = "helpsteer_assets.definitions"
    os.execv(sys.executable, [sys.executable, "-m", "dagster", "dev", "-m", module, "-h", host, "-p", str(port)])


def _print_table(names: list[str], rows: Iterable[Sequence[str]]) -> None:
    for line in table_lines(names, rows):
        click.echo(line)


def _require_free_port(host: str, port: int) -> None:
    """Dagster starts its daemon all the same where the port is taken: two daemons on one home."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise HelpsteerError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another by --port"
            ) from None


def entry() -> None:
    """The console script `helpsteer`."""
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        # End at once: DuckDB 2's bindings print pages about harmless leaks while an interpreter is torn down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

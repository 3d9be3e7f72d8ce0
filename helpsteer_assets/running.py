"""Materializing an experiment from the command line: on its Dagster instance, in this process, without a daemon."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import dagster as dg
import pyarrow.parquet as pq

from helpsteer_assets.assets import build_assets
from helpsteer_assets.assets.checks import build_checks
from helpsteer_assets.assets.evaluation import wide_summary
from helpsteer_assets.assets.materialization import Lab
from helpsteer_assets.cli import command_name
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment import Experiment
from helpsteer_assets.home import dagster_home
from helpsteer_assets.jobs import build_jobs, phases
from helpsteer_assets.recovery import alive, recover_dead_runs
from helpsteer_assets.resources.artifacts import ALL, Artifact
from helpsteer_assets.status import status


def run_experiment(
    experiment: Experiment,
    home: Path,
    *,
    select: str | None = None,
    weights: list[str] | None = None,
    announce: Callable[[str], None] = print,
    terminal: TextIO | None = None,
) -> bool:
    """Materialize assets phase by phase: before the weights, each weight, after the weights. True if all went well.

    Args:
        experiment: what to run.
        home: where results are kept.
        select: assets in Dagster's selection syntax; None: all.
        weights: weights to run; None: the whole grid. The summary needs the whole grid, so it follows only when all
            weights are there.
        announce: gets what a person at a terminal wants to read.
        terminal: where progress bars are drawn; None: nowhere.
    """
    lab = Lab(experiment, home, announce, terminal, publish_reused=False)
    defs = dg.Definitions(
        assets=build_assets(experiment),
        asset_checks=build_checks(experiment),
        jobs=build_jobs(experiment),
        resources={"lab": lab},
    )
    job = defs.resolve_implicit_global_asset_job_def()
    selected = _selected(defs, select)
    announce(f"experiment {experiment.name}, home {home}")
    _announce_plan(experiment, home, selected, weights, announce)
    try:
        with dg.DagsterInstance.from_config(str(dagster_home(home, experiment.name))) as instance, alive(home) as tags:
            recover_dead_runs(instance, home, announce)
            complete = _materialize_phases(experiment, home, job, instance, tags, selected, weights, announce)
    finally:
        lab.models.release()
        lab.warehouse.publish()
    if complete and selected >= {"score_summary", "tradeoff"}:
        _announce_results(lab, announce)
    return complete is not None


def _materialize_phases(
    experiment: Experiment,
    home: Path,
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    tags: dict[str, str],
    selected: set[str],
    weights: list[str] | None,
    announce: Callable[[str], None],
) -> bool | None:
    """True if the whole graph was materialized, False if weights are missing for the summary, None after a failure."""

    def materialize(phase: str, weight: str | None = None) -> bool:
        wanted = [dg.AssetKey(name) for name in phases(experiment)[phase] if name in selected]
        if not wanted:
            return True
        result = job.execute_in_process(
            instance=instance,
            asset_selection=wanted,
            partition_key=weight,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            tags=tags,
        )
        for event in result.all_events:
            _announce_event(event, announce)
        return result.success

    if not materialize("prepare"):
        return None
    # Every weight gets its chance: one that fails says nothing about the next.
    if not all([materialize("tradeoff_grid", weight) for weight in weights or experiment.objective.weights]):
        return None
    missing = [
        s.partition for s in status(experiment, home) if s.asset == "scores" and s.state not in ("complete", "reusable")
    ]
    if missing and "score_summary" in selected:
        announce(f"the summary follows when all weights are there; missing: {', '.join(missing)}")
        return False
    return True if materialize("evaluate") else None


def _selected(defs: dg.Definitions, select: str | None) -> set[str]:
    graph = defs.resolve_asset_graph()
    if select is None:
        return {key.to_user_string() for key in graph.get_all_asset_keys()}
    try:
        keys = dg.AssetSelection.from_string(select).resolve(graph)
    except Exception as error:
        raise HelpsteerError(f"--select {select!r} cannot be read: {error}\nAssets: {_known(graph)}") from error
    if not keys:
        raise HelpsteerError(f"--select {select!r} selects no asset. Assets: {_known(graph)}")
    return {key.to_user_string() for key in keys}


def _known(graph: Any) -> str:
    return ", ".join(sorted(key.to_user_string() for key in graph.get_all_asset_keys()))


def _announce_plan(
    experiment: Experiment, home: Path, selected: set[str], weights: list[str] | None, announce: Callable[[str], None]
) -> None:
    states = [
        s.state
        for s in status(experiment, home)
        if s.asset in selected and (weights is None or s.partition == ALL or s.partition in weights)
    ]
    reused = sum(state in ("complete", "reusable") for state in states)
    resumed = states.count("partial")
    announce(
        f"{len(states)} assets and weights: {reused} to reuse, {resumed} to resume, "
        f"{len(states) - reused - resumed} to compute"
    )


def _announce_event(event: dg.DagsterEvent, announce: Callable[[str], None]) -> None:
    if event.is_step_failure:
        data = event.step_failure_data
        # A user's mistake has its own words; anything else is a defect, and its traceback is what helps.
        described = None if data.user_failure_data is None else data.user_failure_data.description
        announce(f"{event.step_key} failed: {described or data.error_display_string}")
    elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        evaluation = event.asset_check_evaluation_data
        warns = evaluation.severity == dg.AssetCheckSeverity.WARN
        verdict = "passed" if evaluation.passed else "warns" if warns else "FAILED"
        announce(f"check {evaluation.check_name} {verdict}: {evaluation.description}")


def _announce_results(lab: Lab, announce: Callable[[str], None]) -> None:
    present = lab.fingerprints()

    def finished(asset: str) -> Artifact:
        artifact = lab.store.find(asset, ALL, present[asset, ALL].value)
        assert artifact is not None  # materialized a moment ago
        return artifact

    from rich import box
    from rich.console import Console
    from rich.table import Table

    experiment = lab.experiment
    rows = wide_summary(pq.read_table(finished("score_summary").file("score_summary.parquet")).to_pylist())
    traded = [experiment.data.preference_attribute, experiment.data.margin_attribute]
    wanted = ["policy", *traded, "margin_reward", "log_ratio_to_sft", "response_words", "capped"]
    shown = [name for name in wanted if name in rows[0]]
    table = Table(*shown, box=box.SIMPLE_HEAD, title="Mean [95% interval] per policy")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    announce(capture.get())
    tradeoff = json.loads(finished("tradeoff").file("tradeoff.json").read_text(encoding="utf-8"))
    if tradeoff["note"]:
        announce(tradeoff["note"])
    announce(f"Pareto front: {', '.join(point['label'] for point in tradeoff['points'] if point['on_front'])}")
    named = os.environ.get("HELPSTEER_EXPERIMENT", "demo")
    command = command_name() if named == "demo" else f"{command_name()} -e {named}"
    query = f"SELECT w, measure, mean, ci_low, ci_high FROM score_summary WHERE experiment = '{experiment.name}'"
    announce(f"plot:    {finished('tradeoff').file('tradeoff.png')}")
    announce(f'scores:  {command_name()} query "{query}"')
    announce(f"         or, in DuckDB's own shell: duckdb -readonly {lab.warehouse.path}")
    announce(f"UI:      {command} ui")

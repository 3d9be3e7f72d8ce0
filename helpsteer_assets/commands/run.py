"""Materializing an experiment from the command line: on its Dagster instance, in this process, without a daemon."""

import json
import os
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

import dagster as dg
import pyarrow.parquet as pq

from helpsteer_assets.assets.sources import described_model
from helpsteer_assets.assets.status import Status, finished_folders, label, labels, status, unfinished
from helpsteer_assets.assets.tradeoff import wide_summary
from helpsteer_assets.commands.console import command_name, table_lines
from helpsteer_assets.commands.disk import disk_need, in_words, needs_model, shortage
from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.defs.jobs import build_jobs, phases
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.defs.up_to_date import UP_TO_DATE
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.dagster_home import dagster_home, make_dagster_home, readable_database_errors
from helpsteer_assets.execution.interrupts import ends_on_signal
from helpsteer_assets.execution.ray_cluster import on_ray
from helpsteer_assets.execution.recovery import alive, cancel_runs, recovering
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.settings import Lora
from helpsteer_assets.store.artifacts import ALL, Artifact
from helpsteer_assets.store.home import Home

_WIDTH = 110
_NAMED = 3
"""Assets to reuse that are named; the others are only counted."""


def run_experiment(
    experiment: Experiment,
    home: Home,
    *,
    select: str | None = None,
    weights: list[str] | None = None,
    announce: Callable[[str], None] = print,
    terminal: TextIO | None = None,
) -> bool:
    """Materialize assets phase by phase: before the weights, each weight, after the weights. True if all went well.

    `select` names assets in Dagster's selection syntax. `weights` restricts the grid; the summary needs all of it, so
    it follows only when all weights are there. `announce` gets what a person at a terminal wants to read; bars are
    drawn on `terminal`.

    Raises HelpsteerError, before anything is computed, for a mistake in the arguments, a source or model that is not
    there or cannot be used, and a disk that has no room.
    """
    if on_ray():
        raise HelpsteerError(
            "HELPSTEER_EXECUTOR is ray, and `helpsteer run` computes in this process: launch the jobs `prepare`, "
            "`tradeoff_grid` and `evaluate` in the UI or by `dagster job backfill` and `dagster job launch` "
            "(deploy/ray/README.md), or unset HELPSTEER_EXECUTOR to compute here"
        )
    interrupted = threading.Event()

    def say(message: str) -> None:
        if not interrupted.is_set():  # Dagster's own words on a signal help nobody.
            announce(message)

    def leave(what: str) -> None:
        """Say where an interrupted run stands, and leave records and tables as they are after any other run."""
        interrupted.set()
        announce(f"{what}; what is finished is kept, and the same command goes on from here:")
        for item in status(experiment, home):
            if item.state == "partial":
                announce(f"to resume:  {label(item.asset, item.partition)} ({item.detail})")
        home.warehouse.publish()
        cancel_runs(instance, tags)

    lab = Lab(experiment, home, say, terminal, publish_reused=False)
    defs = dg.Definitions(
        assets=build_assets(experiment),
        asset_checks=build_checks(experiment),
        jobs=build_jobs(experiment),
        resources={"lab": lab},
    )
    selected = _selected(defs, select)
    announce(f"experiment {experiment.name}, home {home}")
    home.path.mkdir(parents=True, exist_ok=True)  # Digests of sources are remembered in it.
    _announce_plan(experiment, home, selected, weights, announce)
    failed: list[str] = []

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
            _announce_event(event, say)
            if event.is_step_failure:
                failed.append(label(str(event.step_key), weight or ALL))
        return result.success

    job = defs.resolve_implicit_global_asset_job_def()
    missing: list[str] = []
    try:
        with (
            _kept_streams(),
            readable_database_errors(dagster_home(home, experiment.name) / "dagster.yaml"),
            dg.DagsterInstance.from_config(str(make_dagster_home(home, experiment.name))) as instance,
            alive(home) as tags,
            ends_on_signal(leave),
            recovering(instance, home, tags, say),
        ):
            well = materialize("prepare")
            # Every weight gets its chance: one that fails says nothing about the next.
            well = well and all([materialize("tradeoff_grid", w) for w in weights or experiment.objective.weights])
            if well:
                missing = [w for asset, w in unfinished(status(experiment, home)) if asset == "scores"]
            if missing and "score_summary" in selected:
                say(f"the summary follows when all weights are there; missing: {', '.join(missing)}")
            elif well:
                well = materialize("evaluate")
    finally:
        lab.models.release()
        home.warehouse.publish()
    if not well:
        chosen = _chosen(experiment, status(experiment, home), selected, weights)
        announce(
            _folded(
                f"failed: {', '.join(failed)}. {len(chosen) - len(unfinished(chosen))} of {len(chosen)} assets and "
                "weights are finished and kept. When the cause is mended, run the same command again: it reuses them, "
                "and a training goes on from its last checkpoint."
            )
        )
    elif not missing and selected >= {"score_summary", "tradeoff", "tradeoff_report"}:
        _announce_results(lab, announce)
    return well


@contextmanager
def _kept_streams() -> Iterator[None]:
    """Dagster sends both streams of a step into files of the home, and leaves them there where the disk is full."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _selected(defs: dg.Definitions, select: str | None) -> set[str]:
    graph = defs.resolve_asset_graph()
    everything = {key.to_user_string() for key in graph.get_all_asset_keys()}
    if select is None:
        return everything
    known = ", ".join(sorted(everything))
    try:
        chosen = {key.to_user_string() for key in dg.AssetSelection.from_string(select).resolve(graph)}
    except Exception as error:
        raise HelpsteerError(f"--select {select!r} cannot be read: {error}\nAssets: {known}") from error
    if not chosen:
        raise HelpsteerError(f"--select {select!r} selects no asset. Assets: {known}")
    return chosen


def _chosen(experiment: Experiment, found: list[Status], selected: set[str], weights: list[str] | None) -> list[Status]:
    """The assets and weights that a run materializes."""
    grid = weights or experiment.objective.weights
    chosen = [s for s in found if s.asset in selected and s.partition in (ALL, *grid)]
    waited_for = {("scores", w) for w in experiment.objective.weights} & {*unfinished(found)} - {*unfinished(chosen)}
    # The summary waits for the scores of all weights.
    return [s for s in chosen if not waited_for or s.asset not in phases(experiment)["evaluate"]]


def _announce_plan(
    experiment: Experiment, home: Home, selected: set[str], weights: list[str] | None, announce: Callable[[str], None]
) -> None:
    """Say what will be done and what it needs; raise HelpsteerError where that cannot end well."""
    found = status(experiment, home)
    chosen = _chosen(experiment, found, selected, weights)
    for line in plan_lines(chosen):
        announce(line)
    to_make = unfinished(chosen)
    if not to_make:
        return
    made = finished_folders(found)
    size = None
    if needs_model(to_make):
        from helpsteer_assets.commands.check import needed_lengths
        from helpsteer_assets.modpo.models.loading import check_lengths, model_size

        folder = made["sft_model"] / "model" if "sft_model" in made else described_model(experiment, "model")
        settings, trust = experiment.model, experiment.model.trust_remote_code
        size = model_size(folder, experiment.lora.plain(Lora), trust_remote_code=trust)
        for key, needed in needed_lengths(experiment).items():
            check_lengths(folder, needed, key, base=settings.base, trust_remote_code=trust)
    need = disk_need(experiment, to_make, made, home, size)
    announce(_folded(in_words(need, home)))
    if problem := shortage(need, home):
        raise HelpsteerError(problem)


def plan_lines(chosen: Iterable[Status]) -> Iterator[str]:
    """Lines on what is reused, resumed and computed, and on the settings that made artifacts out of date."""
    by_state: dict[str, list[Status]] = {}
    for item in chosen:
        by_state.setdefault(item.state, []).append(item)
    reused = [*by_state.get("complete", []), *by_state.get("reusable", [])]
    if reused:
        names = list(dict.fromkeys(item.asset for item in reused))
        others = ", ..." if len(names) > _NAMED else ""
        yield f"to reuse:   {len(reused)} ({', '.join(names[:_NAMED])}{others})"
    for item in by_state.get("partial", []):
        yield f"to resume:  {label(item.asset, item.partition)} ({item.detail})"
    if to_compute := [item for item in chosen if item.state in ("missing", "out of date")]:
        yield _folded(f"to compute: {'; '.join(labels(to_compute))}")
    yield from (_folded(f"changed:    {reason}") for reason in _reasons(by_state.get("out of date", [])))


def _reasons(outdated: Iterable[Status]) -> Iterator[str]:
    """Why they are out of date, once each, at the asset where it began: those below it give the same reason."""
    told: list[str] = []
    for item in outdated:
        for part in item.detail.split("; "):
            origin, _, reason = part.partition(": ")
            if not origin.isidentifier():  # a reason of its own
                origin, reason = item.asset, part
            line = f"{origin}: {reason}"
            # A changed setting that several assets depend on is told once; that an artifact is gone, of each.
            if not any((reason if " -> " in reason else line) in earlier for earlier in told):
                told.append(line)
                yield line


def _folded(line: str) -> str:
    """A line that is too long for a terminal, on several."""
    return "\n".join(
        textwrap.wrap(line, _WIDTH, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False)
    )


def _announce_event(event: dg.DagsterEvent, announce: Callable[[str], None]) -> None:
    if event.is_step_failure:
        data = event.step_failure_data
        # A user's mistake has its own words; anything else is a defect, and its traceback is what helps.
        described = None if data.user_failure_data is None else data.user_failure_data.description
        announce(f"{event.step_key} failed: {described or data.error_display_string}")
    elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        evaluation = event.asset_check_evaluation_data
        if evaluation.check_name == UP_TO_DATE:
            return  # the plan has said it
        warns = evaluation.severity == dg.AssetCheckSeverity.WARN
        verdict = "passed" if evaluation.passed else "warns" if warns else "FAILED"
        announce(f"check {evaluation.check_name} {verdict}: {evaluation.description}")


def _announce_results(lab: Lab, announce: Callable[[str], None]) -> None:
    present = lab.fingerprints()

    def finished(asset: str) -> Artifact:
        artifact = lab.home.store.find(asset, ALL, present[asset, ALL].value)
        assert artifact is not None  # materialized a moment ago
        return artifact

    experiment = lab.experiment
    rows = wide_summary(pq.read_table(finished("score_summary").file("score_summary.parquet")).to_pylist())
    traded = [experiment.data.preference_attribute, experiment.data.margin_attribute]
    wanted = ["policy", *traded, "margin_reward", "kl_to_sft", "response_words", "capped"]
    shown = [name for name in wanted if name in rows[0]]
    announce("\nMean [95% interval] per policy")
    for line in table_lines(shown, [[row[name] for name in shown] for row in rows]):
        announce(line)
    announce("")
    tradeoff = json.loads(finished("tradeoff").file("tradeoff.json").read_text(encoding="utf-8"))
    if tradeoff["note"]:
        announce(tradeoff["note"])
    for sentence in tradeoff["caveats"]:
        announce(f"note: {sentence}")
    for sentence in tradeoff["headlines"]:
        announce(f"- {sentence}")
    named = os.environ.get("HELPSTEER_EXPERIMENT", "demo")
    command = command_name() if named == "demo" else f"{command_name()} -e {named}"
    query = f"SELECT w, measure, mean, ci_low, ci_high FROM score_summary WHERE experiment = '{experiment.name}'"
    announce(f"report:  {finished('tradeoff_report').file('report.html')}")
    announce(f'scores:  {command_name()} query "{query}"')
    announce(f"         or, in DuckDB's own shell: duckdb -readonly {lab.home.warehouse.path}")
    announce(f"UI:      {command} ui")

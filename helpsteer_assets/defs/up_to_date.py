"""The check `up_to_date` of every asset: which weights were made with the present settings, and what changed since.

Dagster's own marks miss most of it (assets/status.py). A step reports the check for the asset that it has made. A
sensor reads the experiment's file and the home every few seconds, and reports what has changed since.
"""

from collections.abc import Iterable

import dagster as dg

from helpsteer_assets.assets.graph import stages
from helpsteer_assets.assets.status import Status, status
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.home import Home

UP_TO_DATE = "up_to_date"
_SECONDS = 15

_UNMADE = {"missing": "not made yet", "partial": "begun", "reusable": "in the store, not materialized yet"}
"""Never materialized, which is no fault."""
_OUTDATED = {
    "partial": "made with other settings, begun anew with the present ones",
    "reusable": "made with other settings; with the present ones it is in the store: materialize it to take it up",
}


def up_to_date_spec(asset: str) -> dg.AssetCheckSpec:
    """The check as an asset declares it."""
    description = "Made with the settings that the experiment's file has now; looked at again every few seconds."
    return dg.AssetCheckSpec(UP_TO_DATE, asset=asset, description=description)


def up_to_date_result(experiment: Experiment, home: Home, asset: str) -> dg.AssetCheckResult:
    """The check's result for an asset, or one of its weights, that was just made."""
    passed, description = _verdict(status(experiment, home, {asset}), experiment, home)
    return dg.AssetCheckResult(
        check_name=UP_TO_DATE, passed=passed, description=description, severity=dg.AssetCheckSeverity.WARN
    )


def build_up_to_date(loaded: Experiment) -> dg.SensorDefinition:
    """The sensor that reports the checks whose result has changed.

    Args:
        loaded: the experiment as the code location has it, until that is loaded again.
    """

    @dg.sensor(
        name=UP_TO_DATE,
        description="Compares what was made with the experiment's file as it is now; the checks show what changed.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=_SECONDS,
    )
    def up_to_date(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            present = _verdicts(loaded, load_experiment(), Home.from_environment())
        except HelpsteerError as error:  # someone is writing the file, say
            return dg.SkipReason(str(error))
        changed = [
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey(asset),
                check_name=UP_TO_DATE,
                passed=passed,
                description=description,
                severity=dg.AssetCheckSeverity.WARN,
            )
            for asset, (passed, description) in present.items()
            if _is_news(context.instance, asset, passed, description)
        ]
        return dg.SensorResult(asset_events=changed, skip_reason=f"changed checks: {len(changed)}")

    return up_to_date


def _verdicts(loaded: Experiment, present: Experiment, home: Home) -> dict[str, tuple[bool, str]]:
    """By asset of the code location: whether it is up to date, and a sentence about it."""
    if present.name != loaded.name:
        another = f"name {loaded.name} -> {present.name}: another experiment; start the UI anew"
        return dict.fromkeys(stages(loaded), (False, another))
    reload = "reload the definitions (the button is in Catalog and in Lineage)"
    before, now = loaded.objective.weights, present.objective.weights
    items = status(present, home)
    verdicts = {}
    for name, stage in stages(loaded).items():
        of_asset = [item for item in items if item.asset == name]
        passed, description = _verdict(of_asset, present, home)
        if not of_asset:
            passed, description = False, f"the experiment no longer has this asset: {reload}"
        elif stage.partitioned and before != now:
            grids = f"{', '.join(before)} -> {', '.join(now)}"
            passed, description = False, f"objective.weights {grids}: {reload}. {description}"
        verdicts[name] = passed, description
    return verdicts


def _verdict(items: Iterable[Status], experiment: Experiment, home: Home) -> tuple[bool, str]:
    """Whether none of an asset's weights is out of date, and a sentence with the weights by reason."""
    passed = True
    weights: dict[str, list[str]] = {}
    for item in items:
        reason = "up to date"
        if item.state == "out of date":
            reason, passed = item.detail, False
        elif item.state != "complete":
            made = home.warehouse.latest(experiment.name, item.asset, item.partition) is not None
            reason, passed = (_OUTDATED if made else _UNMADE)[item.state], passed and not made
        weights.setdefault(reason, []).append(item.partition)
    return passed, "; ".join(
        reason if partitions == [ALL] else f"w={', '.join(partitions)}: {reason}"
        for reason, partitions in weights.items()
    )


def _is_news(instance: dg.DagsterInstance, asset: str, passed: bool, description: str) -> bool:
    """Whether the UI shows something else. Steps report this check too, so a cursor could not tell."""
    key = dg.AssetKey(asset)
    record = instance.get_latest_asset_check_evaluation_record(dg.AssetCheckKey(key, UP_TO_DATE))
    if record is not None and isinstance(record.evaluation, dg.AssetCheckEvaluation):
        return (record.evaluation.passed, record.evaluation.description) != (passed, description)
    run = None if record is None else instance.get_run_by_id(record.run_id)
    if run is not None and not run.is_finished:
        return False  # its step will report
    return not passed or instance.get_latest_materialization_event(key) is not None

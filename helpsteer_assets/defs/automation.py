"""Automation, where an experiment says `run.automation: true`: what a training made is evaluated without a click.

Every asset of the group `evaluation` then follows its inputs: answers, KL and scores of a weight once it is trained,
the summary, the trade-off and the report once all weights are scored. Data and models are made by people only.

Dagster's own `eager` condition asks whether inputs were ever materialized. Here they have to be finished with the
present settings: after a changed setting the weights that are not trained again yet would fail what reads them all.
"""

import warnings

import dagster as dg

from helpsteer_assets.assets.graph import fingerprints, stages
from helpsteer_assets.assets.stage import Stage
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.home import Home

GROUP = "evaluation"
"""The group whose assets follow."""


class Finished(dg.AutomationCondition[dg.AssetKey]):
    """True of an asset, or of those of its weights, whose artifact is there with the present settings."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment

    @property
    def name(self) -> str:
        """The description in the UI."""
        return "finished with the present settings"

    def evaluate(self, context: dg.AutomationContext[dg.AssetKey]) -> dg.AutomationResult[dg.AssetKey]:
        """Look into the store."""
        home, asset = Home.from_environment(), context.key.to_user_string()
        store = home.store
        wanted = fingerprints(self._experiment, home.digest_cache)
        finished = {
            item
            for item in context.candidate_subset.expensively_compute_asset_partitions()
            if store.find(asset, item.partition_key or ALL, wanted[asset, item.partition_key or ALL].value)
        }
        view = context.asset_graph_view
        return dg.AutomationResult(context, view.get_asset_subset_from_asset_partitions(context.key, finished))


def follows_inputs(experiment: Experiment, stage: Stage) -> dg.AutomationCondition:
    """Once for each change of an input's data version, as soon as all inputs are finished and nobody works on them.

    A reused input keeps its data version and starts nothing. Neither does a run that makes the asset itself as well.
    Assets that follow each other for the same weight, or after all weights, come in one run.
    """
    condition, graph = dg.AutomationCondition, stages(experiment)
    changed = condition.data_version_changed() & ~condition.executed_with_root_target()
    coming, unfinished = condition.will_be_requested(), ~Finished(experiment)
    one_run = dg.AssetSelection.assets(*(i for i in stage.inputs if graph[i].partitioned == stage.partitioned))
    return (
        (condition.any_deps_match(changed) | condition.any_deps_match(coming).allow(one_run)).since_last_handled()
        & ~condition.any_deps_match(unfinished).ignore(one_run)
        & ~condition.any_deps_match(unfinished & ~coming).allow(one_run)
        & ~condition.any_deps_in_progress()
        & ~condition.in_progress()
    ).with_label("follows its inputs")


def build_automation(experiment: Experiment) -> list[dg.AutomationConditionSensorDefinition]:
    """The sensor that looks at the conditions; none where the automation is off."""
    if not experiment.run.automation:
        return []
    with warnings.catch_warnings():
        # Else every process that loads the definitions says so. Versions of Dagster are pinned.
        warnings.simplefilter("ignore", dg.BetaWarning)
        sensor = dg.AutomationConditionSensorDefinition(
            "automation",
            target=dg.AssetSelection.groups(GROUP),
            description="Evaluates by itself what a training made (`run.automation` in the experiment).",
            default_status=dg.DefaultSensorStatus.RUNNING,
            minimum_interval_seconds=10,
            emit_backfills=False,
            use_user_code_server=True,  # beta; only the code server knows the experiment and the store
        )
    return [sensor]

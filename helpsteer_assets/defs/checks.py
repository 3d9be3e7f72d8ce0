"""Checks: what must hold before policies are trained, what to know of it, and whether the trade-off moves as asked."""

from typing import Any

import dagster as dg

from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.defs.metadata import rounded, table_metadata
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.ray_cluster import CPU_STEP
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.comparison.margin_adapter import judge_margin_adapter
from helpsteer_assets.store.artifacts import ALL, Artifact


@dg.asset_check(asset="margin_adapter", blocking=True, op_tags=CPU_STEP)
def margin_adapter_prefers_chosen(lab: dg.ResourceParam[Lab]) -> dg.AssetCheckResult:
    """On validation pairs of the margin attribute the adapter rewards chosen more than rejected."""
    metrics = _finished(lab, "margin_adapter").manifest["metrics"]
    sanity: dict[str, Any] = metrics["sanity"]
    threshold = lab.experiment.checks.margin_adapter_min_accuracy
    reasons = judge_margin_adapter(sanity, threshold)
    return dg.AssetCheckResult(
        passed=not reasons,
        severity=dg.AssetCheckSeverity.ERROR,
        description="; ".join(reasons)
        or f"chosen beats rejected in {sanity['accuracy']:.1%} of {sanity['n']} validation pairs",
        metadata=rounded({key: value for key, value in sanity.items() if value is not None})
        | {"threshold": threshold, "worst_failures": table_metadata(metrics["worst_failures"])},
    )


@dg.asset_check(asset="margin_adapter_quality", op_tags=CPU_STEP)
def margin_adapter_measures_more_than_length(lab: dg.ResourceParam[Lab]) -> dg.AssetCheckResult:
    """The margin adapter's reward is more than a measure of length. A warning: policies can be trained on either."""
    quality = _finished(lab, "margin_adapter_quality").manifest["metrics"]
    return dg.AssetCheckResult(
        passed=quality["only_length"] is not True,
        severity=dg.AssetCheckSeverity.WARN,
        description=quality["sentence"],
        metadata={"pairs": quality["n"], "prompts": quality["prompts"]},
    )


@dg.asset_check(asset="tradeoff", op_tags=CPU_STEP)
def margin_follows_weight(lab: dg.ResourceParam[Lab]) -> dg.AssetCheckResult:
    """The margin reward moves with w in the direction that the role asks for. A warning: nothing guarantees it."""
    direction = _finished(lab, "tradeoff").manifest["metrics"]["direction"]
    return dg.AssetCheckResult(
        passed=direction["verdict"] is not False,
        severity=dg.AssetCheckSeverity.WARN,
        description=direction["sentence"],
        metadata=rounded(
            {key: value for key, value in direction.items() if isinstance(value, int | float) and key != "verdict"}
        ),
    )


def build_checks(experiment: Experiment) -> list[dg.AssetChecksDefinition]:
    """The checks of an experiment's graph."""
    of_adapter = [margin_adapter_prefers_chosen, margin_adapter_measures_more_than_length]
    return [*(of_adapter if experiment.has_margin_adapter else []), margin_follows_weight]


def _finished(lab: Lab, asset: str) -> Artifact:
    fingerprint = lab.fingerprints()[asset, ALL]
    artifact = lab.home.store.find(asset, ALL, fingerprint.value)
    if artifact is None:
        raise HelpsteerError(f"{asset} has not been materialized with the present settings; materialize it first")
    return artifact

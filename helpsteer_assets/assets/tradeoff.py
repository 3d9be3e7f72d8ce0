"""Group `evaluation`, after all weights: what is gained and lost as w moves.

score_summary.parquet, one row per policy and measure; tradeoff.json, tradeoff.png and tradeoff.svg.
"""

import json
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.display import table_metadata
from helpsteer_assets.assets.evaluation import policy_scores
from helpsteer_assets.assets.materialization import AssetDeclaration, Inputs, Metrics, StageRun
from helpsteer_assets.experiment import Experiment
from helpsteer_assets.modpo.plots import markdown_image, png_bytes, svg_bytes, tradeoff_plot
from helpsteer_assets.modpo.statistics import (
    Interval,
    hypervolume,
    margin_follows_weight,
    paired_difference,
    pareto_front,
    summarize,
)
from helpsteer_assets.resources.artifacts import Artifact


def score_summary(run: StageRun) -> Metrics:
    """Per policy and measure: mean, spread, 95% interval over prompts, and the paired difference to SFT."""
    experiment = run.experiment
    samples, seed = experiment.evaluation.bootstrap_samples, experiment.seed
    policies = [policy_scores(artifact, experiment) for artifact in run.inputs["sft_scores"].values()]
    policies += [policy_scores(artifact, experiment) for artifact in run.inputs["scores"].values()]
    run.write(pa.Table.from_pylist(summarize(policies, samples, seed), schema=SUMMARY_SCHEMA), "score_summary.parquet")
    by_weight = sorted((p for p in policies if p.w is not None), key=lambda p: float(p.w or 0))
    ends = paired_difference(by_weight[-1], by_weight[0], "margin_reward", samples, seed)
    return {"policies": len(policies), "margin_reward_ends": vars(ends)}


SUMMARY_SCHEMA = pa.schema(
    [("policy", pa.string()), ("w", pa.string()), ("measure", pa.string()), ("n", pa.int64())]
    + [(name, pa.float64()) for name in ("mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high")]
)


def tradeoff(run: StageRun) -> Metrics:
    """What is gained and lost as w moves: the Pareto front of rated preference against the margin, and its plot."""
    experiment, objective = run.experiment, run.experiment.objective
    rows = run.table("score_summary", "score_summary.parquet").to_pylist()
    ends = Interval(**run.input("score_summary").manifest["metrics"]["margin_reward_ends"])
    attribute = experiment.data.preference_attribute
    measured = any(row["measure"] == attribute for row in rows)
    x_measure = attribute if measured else "log_ratio_to_sft"
    points = _points(rows, x_measure)
    coordinates = np.array([[point["x"], point["y"]] for point in points])
    for point, on_front in zip(points, pareto_front(coordinates, (measured, True)), strict=True):
        point["on_front"] = bool(on_front)
    # Both axes as "more is better", from where SFT stands.
    upward = coordinates * np.array([1.0 if measured else -1.0, 1.0])
    sft = upward[next(i for i, point in enumerate(points) if point["is_sft"])]
    x_label = f"rated {attribute} (more is better)" if measured else "log-ratio to SFT, nats (less is better)"
    note = "" if measured else f"No rater rates {attribute}: preference quality is unmeasured."
    result = {
        "axes": {"x": x_measure, "y": "margin", "x_larger_is_better": measured},
        "preference_measured": measured,
        "note": note,
        "points": points,
        "hypervolume_above_sft": hypervolume(upward, sft),
        "direction": _finite(margin_follows_weight(rows, ends, objective.margin_sign)),
    }
    figure = tradeoff_plot(points, x_label, _margin_label(experiment), f"Trade-off: {experiment.name}", note)
    (run.folder / "tradeoff.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (run.folder / "tradeoff.png").write_bytes(png_bytes(figure))
    (run.folder / "tradeoff.svg").write_bytes(svg_bytes(figure))
    return result


def _points(rows: list[dict[str, Any]], x_measure: str) -> list[dict[str, Any]]:
    by_policy: dict[tuple[str, str | None], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault((row["policy"], row["w"]), {})[row["measure"]] = row
    return [
        {"label": "SFT" if w is None else f"w={w}", "w": w, "is_sft": w is None}
        | {
            f"{axis}{suffix}": measures[measure][name]
            for axis, measure in (("x", x_measure), ("y", "margin"))
            for suffix, name in (("", "mean"), ("_low", "ci_low"), ("_high", "ci_high"))
        }
        for (_, w), measures in by_policy.items()
    ]


def _margin_label(experiment: Experiment) -> str:
    if not experiment.has_margin_adapter:
        return "margin m = -penalty * tokens (more is better)"
    sign = "-" if experiment.objective.margin_sign < 0 else "+"
    return f"margin m = {sign} {experiment.data.margin_attribute} reward (more is better)"


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an undefined number becomes null."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in result.items()}


def _describe_summary(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    policies = wide_summary(pq.read_table(artifact.file("score_summary.parquet")).to_pylist())
    measures = [measure for measure in policies[0] if measure != "policy"]
    rows = [{"measure": m} | {policy["policy"]: policy[m] for policy in policies} for m in measures]
    return {"summary": table_metadata(rows)}


def wide_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy with `mean [low, high]` of each measure, for people to read."""
    wide: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        policy = wide.setdefault((row["policy"], row["w"]), {"policy": "SFT" if row["w"] is None else f"w={row['w']}"})
        policy[row["measure"]] = f"{row['mean']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return list(wide.values())


def _describe_tradeoff(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    result = json.loads(artifact.file("tradeoff.json").read_text(encoding="utf-8"))
    front = [point["label"] for point in result["points"] if point["on_front"]]
    return {
        "plot": dg.MetadataValue.md(markdown_image(artifact.file("tradeoff.png").read_bytes(), "trade-off")),
        "front": ", ".join(front),
        "hypervolume_above_sft": result["hypervolume_above_sft"],
        "direction": result["direction"]["sentence"],
        "preference_measured": result["preference_measured"],
        **({"note": result["note"]} if result["note"] else {}),
        "plot_file": dg.MetadataValue.path(str(artifact.file("tradeoff.png"))),
    }


TRADEOFF_ASSETS = (
    AssetDeclaration(
        score_summary,
        "evaluation",
        {"duckdb", "parquet"},
        describe=_describe_summary,
        table="score_summary",
        file="score_summary.parquet",
    ),
    AssetDeclaration(tradeoff, "evaluation", {"python"}, describe=_describe_tradeoff),
)

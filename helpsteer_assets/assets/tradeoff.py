"""Group `evaluation`, after all weights: what is gained and lost as w moves.

score_summary: measures.parquet, one row per policy and prompt; score_summary.parquet, one row per policy and measure.
tradeoff: tradeoff.json, and each plot as PNG and SVG (front, kl, lengths). tradeoff_report: report.html.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from helpsteer_assets.assets.evaluation import policy_scores
from helpsteer_assets.assets.run import StageRun
from helpsteer_assets.assets.stage import Metrics, stage
from helpsteer_assets.assets.training import MARGIN
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.comparison.scores import PolicyScores, policy_label, summarize
from helpsteer_assets.modpo.comparison.text import is_empty, repetition
from helpsteer_assets.modpo.comparison.tradeoff import (
    TradeoffSettings,
    analyse,
    axis_label,
    length_points,
    measures_of,
    points_on,
)
from helpsteer_assets.modpo.generation.kl import kl_by_prompt
from helpsteer_assets.store.artifacts import Artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = "measures.parquet"
PLOTS = {
    "front": "What a policy gains on one axis and loses on the other",
    "kl": "What a policy gains for how far it has moved from the SFT model",
    "lengths": "How long the responses are",
}


SUMMARY_SCHEMA = pa.schema(
    [("policy", pa.string()), ("w", pa.string()), ("measure", pa.string()), ("n", pa.int64())]
    + [(name, pa.float64()) for name in ("mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high")]
)


@stage(
    group="evaluation",
    kinds={"duckdb", "parquet"},
    settings=("evaluation.bootstrap_samples", "seed", "objective.weights", *MARGIN),
    table="score_summary",
    file="score_summary.parquet",
)
def score_summary(
    run: StageRun,
    sft_generations: Artifact,
    generations: dict[str, Artifact],
    sft_scores: Artifact,
    scores: dict[str, Artifact],
    kl_to_sft: dict[str, Artifact] | None = None,
) -> Metrics:
    """Per policy and measure: mean, spread, 95% interval over prompts, and the paired difference to SFT."""
    experiment = run.experiment
    kl = {w: policy_kl(artifact) for w, artifact in (kl_to_sft or {}).items()}
    zero = dict.fromkeys(next(iter(kl.values())), 0.0) if kl else None
    policies = [_measured(experiment, sft_scores, sft_generations, zero)]
    policies += [_measured(experiment, scores[w], generations[w], kl.get(w)) for w in sorted(scores, key=float)]
    columns = list(policies[0].measures)
    rows = [
        {"policy": p.policy, "w": p.w, "prompt_id": prompt_id} | {name: float(p.measures[name][i]) for name in columns}
        for p in policies
        for i, prompt_id in enumerate(p.prompt_ids)
    ]
    run.write(pa.Table.from_pylist(rows), MEASURES)
    summary = summarize(policies, experiment.evaluation.bootstrap_samples, experiment.seed)
    run.write(pa.Table.from_pylist(summary, schema=SUMMARY_SCHEMA), "score_summary.parquet")
    return {"policies": len(policies), "prompts": len(policies[0].prompt_ids), "measures": columns}


def _measured(
    experiment: Experiment, scores: Artifact, generations: Artifact, kl_to_sft: dict[str, float] | None
) -> PolicyScores:
    """All measures of one policy: its scores, what its text looks like, and its divergence from SFT by prompt."""
    measured = policy_scores(scores, experiment)
    rows = {row["prompt_id"]: row for row in generations.table("generations.parquet").to_pylist()}
    answers = [rows[prompt_id] for prompt_id in measured.prompt_ids]
    measures = dict(measured.measures)
    if kl_to_sft is not None:
        measures["kl_to_sft"] = np.array([kl_to_sft[prompt_id] for prompt_id in measured.prompt_ids])
    measures |= {
        "repetition": np.array([repetition(row["response"]) for row in answers]),
        "empty": np.array([float(is_empty(row["response"])) for row in answers]),
        "prompt_truncated": np.array([float(row["prompt_truncated"]) for row in answers]),
    }
    return PolicyScores(measured.policy, measured.w, measured.prompt_ids, measures)


def policy_kl(kl_to_sft: Artifact) -> dict[str, float]:
    """KL divergence to SFT by prompt, nats."""
    table = kl_to_sft.table("kl.parquet", columns=["prompt_id", "log_ratio"])
    return kl_by_prompt(table["prompt_id"].to_pylist(), table["log_ratio"].to_numpy())


def read_measures(summary: Artifact) -> list[PolicyScores]:
    """The measures of `score_summary`: the SFT model first, then the weights, ascending."""
    table = summary.table(MEASURES)
    names = [name for name in table.column_names if name not in ("policy", "w", "prompt_id")]
    policies: dict[tuple[str, str | None], list[int]] = {}
    for i, key in enumerate(zip(table["policy"].to_pylist(), table["w"].to_pylist(), strict=True)):
        policies.setdefault(key, []).append(i)
    prompt_ids = table["prompt_id"].to_pylist()
    columns = {name: table[name].to_numpy() for name in names}
    return [
        PolicyScores(policy, w, [prompt_ids[i] for i in rows], {name: columns[name][rows] for name in names})
        for (policy, w), rows in policies.items()
    ]


def _compared(experiment: Experiment) -> tuple[str, ...]:
    attributes = ("data.preference_attribute", *(("data.margin_attribute",) if experiment.has_margin_adapter else ()))
    statistics = ("evaluation.bootstrap_samples", "evaluation.rater", "generation.do_sample", "seed")
    return ("name", *attributes, *statistics, *MARGIN)


def _reported(experiment: Experiment) -> tuple[str, ...]:
    facts = ("description", "data.source", "model.base", "objective.beta", "objective.weights")
    return (*facts, "generation.max_new_tokens", "generation.temperature", *_compared(experiment))


@stage(group="evaluation", kinds={"python"}, settings=_compared)
def tradeoff(run: StageRun, score_summary: Artifact) -> Metrics:
    """Gains and losses as w moves: the Pareto front and how sure it is, differences to SFT, and the plots."""
    from helpsteer_assets.modpo.comparison.plots import png_bytes, svg_bytes

    policies = read_measures(score_summary)
    result = analyse(tradeoff_settings(run.experiment), policies)
    for name, figure in _figures(run.experiment, policies, result).items():
        (run.folder / f"{name}.png").write_bytes(png_bytes(figure))
        (run.folder / f"{name}.svg").write_bytes(svg_bytes(figure))
    (run.folder / "tradeoff.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def tradeoff_settings(experiment: Experiment) -> TradeoffSettings:
    """The settings that a comparison of the experiment's policies depends on."""
    generation = experiment.generation
    return TradeoffSettings(
        preference=experiment.data.preference_attribute,
        margin=experiment.margin,
        rating_unit="0 to 4" if experiment.evaluation.rater == "embedded" else "",
        sampled=generation.do_sample,
        max_prompt_length=generation.max_prompt_length,
        max_new_tokens=generation.max_new_tokens,
        samples=experiment.evaluation.bootstrap_samples,
        seed=experiment.seed,
    )


def _figures(experiment: Experiment, policies: list[PolicyScores], result: dict[str, Any]) -> dict[str, "Figure"]:
    from helpsteer_assets.modpo.comparison.plots import lengths_plot, reward_against_kl_plot, tradeoff_plot

    settings = tradeoff_settings(experiment)
    samples, seed = settings.samples, settings.seed
    measures = measures_of(settings, list(policies[0].measures))
    x, note = result["axes"]["x"], result["note"]
    figures = {
        "front": tradeoff_plot(
            result["points"],
            axis_label(measures[x]),
            axis_label(measures["margin"]),
            f"Trade-off: {experiment.name}",
            note,
        ),
        "lengths": lengths_plot(length_points(policies, samples, seed), f"Response length: {experiment.name}"),
    }
    if "kl_to_sft" in measures:
        reward = measures[x if result["preference_measured"] else "margin"]
        figures["kl"] = reward_against_kl_plot(
            points_on(policies, "kl_to_sft", reward.name, samples, seed),
            axis_label(reward),
            f"Reward against KL: {experiment.name}",
            note,
        )
    return figures


@stage(group="evaluation", kinds={"html"}, settings=_reported)
def tradeoff_report(
    run: StageRun,
    tradeoff: Artifact,
    score_summary: Artifact,
    sft_generations: Artifact,
    generations: dict[str, Artifact],
    margin_adapter_quality: Artifact | None = None,
    kl_to_sft: dict[str, Artifact] | None = None,
) -> Metrics:
    """The trade-off as one HTML file to look at: the front, the scores, and every response beside its rivals."""
    from helpsteer_assets.report import render
    from helpsteer_assets.report.content import report_content

    policies = read_measures(score_summary)
    responses: dict[str | None, pa.Table] = {None: sft_generations.table("generations.parquet")}
    responses.update((w, artifact.table("generations.parquet")) for w, artifact in generations.items())
    svgs = {
        name: tradeoff.file(f"{name}.svg").read_text(encoding="utf-8")
        for name in PLOTS
        if f"{name}.svg" in tradeoff.manifest["files"]
    }
    page = render(
        report_content(
            run.experiment,
            measures_of(tradeoff_settings(run.experiment), list(policies[0].measures)),
            policies,
            score_summary.table("score_summary.parquet").to_pylist(),
            json.loads(tradeoff.file("tradeoff.json").read_text(encoding="utf-8")),
            responses,
            {name: (PLOTS[name], svg) for name, svg in svgs.items()},
            quality=None if margin_adapter_quality is None else margin_adapter_quality.manifest["metrics"],
            kl={w: artifact.manifest["metrics"] for w, artifact in (kl_to_sft or {}).items()},
        )
    )
    (run.folder / REPORT).write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode("utf-8")), "prompts": responses[None].num_rows, "policies": len(responses)}


REPORT = "report.html"


def wide_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy with `mean [low, high]` of each measure, for people to read."""
    wide: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        policy = wide.setdefault((row["policy"], row["w"]), {"policy": policy_label(row["w"])})
        policy[row["measure"]] = f"{row['mean']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return list(wide.values())

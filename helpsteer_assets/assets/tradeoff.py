"""Group `evaluation`, after all weights: what is gained and lost as w moves.

score_summary: measures.parquet, one row per policy and prompt; score_summary.parquet, one row per policy and measure.
tradeoff: tradeoff.json, and each plot as PNG and SVG (front, kl, lengths). tradeoff_report: report.html.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.evaluation import policy_scores
from helpsteer_assets.assets.run import Metrics, StageRun
from helpsteer_assets.defs.lab import AssetDeclaration
from helpsteer_assets.defs.metadata import _describe_report, _describe_summary, _describe_tradeoff
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.comparison.scores import PolicyScores, summarize
from helpsteer_assets.modpo.comparison.text import is_empty, repetition
from helpsteer_assets.modpo.generation.kl import kl_by_prompt
from helpsteer_assets.store.artifacts import ALL, Artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = "measures.parquet"
PLOTS = {
    "front": "What a policy gains on one axis and loses on the other",
    "kl": "What a policy gains for how far it has moved from the SFT model",
    "lengths": "How long the responses are",
}


def score_summary(run: StageRun) -> Metrics:
    """Per policy and measure: mean, spread, 95% interval over prompts, and the paired difference to SFT."""
    experiment = run.experiment
    weights = sorted(run.inputs["scores"], key=float)
    policies = [_measured(run, ALL), *(_measured(run, weight) for weight in weights)]
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


SUMMARY_SCHEMA = pa.schema(
    [("policy", pa.string()), ("w", pa.string()), ("measure", pa.string()), ("n", pa.int64())]
    + [(name, pa.float64()) for name in ("mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high")]
)


def _measured(run: StageRun, partition: str) -> PolicyScores:
    """All measures of one policy: its scores, what its text looks like, and its divergence from SFT."""
    is_sft = partition == ALL
    scores = policy_scores(run.inputs["sft_scores" if is_sft else "scores"][partition], run.experiment)
    made = run.inputs["sft_generations" if is_sft else "generations"][partition]
    rows = {row["prompt_id"]: row for row in pq.read_table(made.file("generations.parquet")).to_pylist()}
    texts = [rows[prompt_id]["response"] for prompt_id in scores.prompt_ids]
    measures = dict(scores.measures)
    if "kl_to_sft" in run.inputs:
        measures["kl_to_sft"] = (
            np.zeros(len(texts)) if is_sft else _kl(run.inputs["kl_to_sft"][partition], scores.prompt_ids)
        )
    measures |= {
        "repetition": np.array([repetition(text) for text in texts]),
        "empty": np.array([float(is_empty(text)) for text in texts]),
        "prompt_truncated": np.array([float(rows[prompt_id]["prompt_truncated"]) for prompt_id in scores.prompt_ids]),
    }
    return PolicyScores(scores.policy, scores.w, scores.prompt_ids, measures)


def _kl(artifact: Artifact, prompt_ids: list[str]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    table = pq.read_table(artifact.file("kl.parquet"), columns=["prompt_id", "log_ratio", "finish_reason"])
    capped = [reason == "length" for reason in table["finish_reason"].to_pylist()]
    found = kl_by_prompt(table["prompt_id"].to_pylist(), table["log_ratio"].to_numpy(), capped)
    by_prompt = dict(zip(found.prompt_ids, found.kl, strict=True))
    return np.array([by_prompt[prompt_id] for prompt_id in prompt_ids])


def read_measures(summary: Artifact) -> list[PolicyScores]:
    """What `score_summary` measured: the SFT model first, then the weights, ascending."""
    table = pq.read_table(summary.file(MEASURES))
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


def tradeoff(run: StageRun) -> Metrics:
    """What is gained and lost as w moves: the Pareto front, how sure it is, what differs from SFT, and the plots."""
    from helpsteer_assets.modpo.comparison.plots import png_bytes, svg_bytes
    from helpsteer_assets.modpo.comparison.tradeoff import analyse

    policies = read_measures(run.input("score_summary"))
    result = analyse(run.experiment, policies)
    for name, figure in _figures(run.experiment, policies, result).items():
        (run.folder / f"{name}.png").write_bytes(png_bytes(figure))
        (run.folder / f"{name}.svg").write_bytes(svg_bytes(figure))
    (run.folder / "tradeoff.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _figures(experiment: Experiment, policies: list[PolicyScores], result: dict[str, Any]) -> dict[str, "Figure"]:
    from helpsteer_assets.modpo.comparison.plots import lengths_plot, reward_against_kl_plot, tradeoff_plot
    from helpsteer_assets.modpo.comparison.tradeoff import axis_label, length_points, measures_of, points_on

    samples, seed = experiment.evaluation.bootstrap_samples, experiment.seed
    measures = measures_of(experiment, list(policies[0].measures))
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


def tradeoff_report(run: StageRun) -> Metrics:
    """The trade-off as one HTML file to look at: the front, the scores, and every response beside its rivals."""
    from helpsteer_assets.report import render
    from helpsteer_assets.report.content import report_content

    tradeoff, summary = run.input("tradeoff"), run.input("score_summary")
    made = [run.inputs["sft_generations"][ALL], *run.inputs["generations"].values()]
    responses = {
        artifact.partition if artifact.partition != ALL else None: pq.read_table(artifact.file("generations.parquet"))
        for artifact in made
    }
    svgs = {
        name: tradeoff.file(f"{name}.svg").read_text(encoding="utf-8")
        for name in PLOTS
        if f"{name}.svg" in tradeoff.manifest["files"]
    }
    page = render(
        report_content(
            run.experiment,
            read_measures(summary),
            pq.read_table(summary.file("score_summary.parquet")).to_pylist(),
            json.loads(tradeoff.file("tradeoff.json").read_text(encoding="utf-8")),
            responses,
            {name: (PLOTS[name], svg) for name, svg in svgs.items()},
            quality=run.input("margin_adapter_quality").manifest["metrics"]
            if "margin_adapter_quality" in run.inputs
            else None,
            kl={w: artifact.manifest["metrics"] for w, artifact in run.inputs.get("kl_to_sft", {}).items()},
        )
    )
    (run.folder / REPORT).write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode("utf-8")), "prompts": responses[None].num_rows, "policies": len(responses)}


REPORT = "report.html"


def wide_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy with `mean [low, high]` of each measure, for people to read."""
    wide: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        policy = wide.setdefault((row["policy"], row["w"]), {"policy": "SFT" if row["w"] is None else f"w={row['w']}"})
        policy[row["measure"]] = f"{row['mean']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return list(wide.values())


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
    AssetDeclaration(tradeoff_report, "evaluation", {"html"}, describe=_describe_report),
)

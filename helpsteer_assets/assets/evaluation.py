"""Group `evaluation`: what every policy answers, how it scores, and the trade-off.

generations.parquet and scores.parquet per policy, one row per prompt; score_summary.parquet, one row per policy and
measure; tradeoff.json, tradeoff.png and tradeoff.svg.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.display import table_metadata
from helpsteer_assets.assets.loading import load_sft_tokenizer, sft_model_on_loan
from helpsteer_assets.assets.materialization import AssetDeclaration, Inputs, Metrics, StageRun
from helpsteer_assets.experiment import Experiment, RewardModelSettings
from helpsteer_assets.modpo.attributes import ATTRIBUTES
from helpsteer_assets.modpo.margins import margin, margin_reward
from helpsteer_assets.modpo.plots import markdown_image, png_bytes, svg_bytes, tradeoff_plot
from helpsteer_assets.modpo.statistics import (
    Interval,
    PolicyScores,
    hypervolume,
    margin_follows_weight,
    paired_difference,
    pareto_front,
    summarize,
)
from helpsteer_assets.resources.artifacts import Artifact
from helpsteer_assets.stages import fetch

if TYPE_CHECKING:
    from helpsteer_assets.modpo.generation import Generation
    from helpsteer_assets.modpo.raters import Rater

SCORES_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("w", pa.string()),
        ("prompt_id", pa.string()),
        ("margin_log_ratio", pa.float64()),
        ("log_ratio_to_sft", pa.float64()),
        ("response_tokens", pa.int32()),
        ("response_words", pa.int32()),
        ("finish_reason", pa.string()),
        *((attribute, pa.float64()) for attribute in ATTRIBUTES),
    ]
)
"""Of scores.parquet. The margin log-ratio is unscaled: the warehouse adds margin_reward."""


def sft_generations(run: StageRun) -> Metrics:
    """The reference policy's responses to the evaluation prompts."""
    return _generate(run, None)


def generations(run: StageRun) -> Metrics:
    """One policy's responses to the evaluation prompts."""
    return _generate(run, run.input("modpo_models"))


def _generate(run: StageRun, policy: Artifact | None) -> Metrics:
    from helpsteer_assets.modpo.models import check_lengths

    experiment, settings = run.experiment, run.experiment.generation
    base = run.input("sft_model").path / "model"
    needed = settings.max_prompt_length + settings.max_new_tokens
    check_lengths(experiment.model, base, needed, "generation.max_prompt_length + max_new_tokens")
    prompts = run.table("evaluation_prompts", "prompts.parquet")
    made = _responses(run, prompts["prompt"].to_pylist(), None if policy is None else policy.path / "adapter")
    columns = {
        "prompt_id": prompts["prompt_id"],
        "prompt": prompts["prompt"],
        "response": pa.array([g.response for g in made], pa.string()),
        "response_tokens": pa.array([len(g.token_ids) for g in made], pa.int32()),
        "finish_reason": pa.array([g.finish_reason for g in made], pa.string()),
        "prompt_truncated": pa.array([g.prompt_truncated for g in made], pa.bool_()),
        "token_ids": pa.array([g.token_ids for g in made], pa.list_(pa.int32())),
    }
    run.write(pa.table(columns), "generations.parquet")
    return {
        "responses": len(made),
        "mean_tokens": float(np.mean([len(g.token_ids) for g in made])),
        "capped": sum(g.finish_reason == "length" for g in made),
        "prompts_truncated": sum(g.prompt_truncated for g in made),
    }


def _responses(run: StageRun, prompts: list[str], adapter: Path | None) -> "list[Generation]":
    from helpsteer_assets.modpo.generation import generate, generate_by
    from helpsteer_assets.modpo.lending import merged

    experiment, settings = run.experiment, run.experiment.generation
    tokenizer, checkpoint = load_sft_tokenizer(run), run.checkpoints / "generations.jsonl"
    how: dict[str, Any] = {"seed": experiment.seed, "progress": run.progress, "checkpoint": checkpoint}
    if settings.engine == "vllm":
        with run.models.vllm_engine(
            run.input("sft_model").path / "model",
            precision=experiment.model.precision,
            max_length=settings.max_prompt_length + settings.max_new_tokens,
            lora_rank=experiment.lora.r,
            trust_remote_code=experiment.model.trust_remote_code,
        ) as engine:
            return generate_by(engine.policy(adapter), tokenizer, prompts, settings, exact=False, **how)
    with sft_model_on_loan(run) as model:
        with nullcontext(model) if adapter is None else merged(model, adapter) as policy:
            return generate(policy, tokenizer, prompts, settings, **how)


def sft_scores(run: StageRun) -> Metrics:
    """How the reference policy's responses score: margin reward, length, ratings."""
    return _score(run, "sft_generations", None)


def scores(run: StageRun) -> Metrics:
    """How one policy's responses score: margin reward, log-ratio to SFT, length, ratings."""
    return _score(run, "generations", run.input("modpo_models"))


def _score(run: StageRun, source: str, policy: Artifact | None) -> Metrics:
    rows = run.table(source, "generations.parquet").to_pylist()
    log_ratios = _log_ratios(run, rows, policy)
    rater = _rater(run)
    rated: dict[str, list[float | None]] = {}
    if rater is not None:
        rated = rater([row["prompt"] for row in rows], [row["response"] for row in rows], run.progress)
    blank: list[float | None] = [None] * len(rows)
    columns = {
        "policy": ["sft" if policy is None else "modpo"] * len(rows),
        "w": [None if policy is None else run.partition] * len(rows),
        "prompt_id": [row["prompt_id"] for row in rows],
        "margin_log_ratio": log_ratios.get("margin", blank),
        "log_ratio_to_sft": log_ratios.get("policy", [0.0] * len(rows)),
        "response_tokens": [row["response_tokens"] for row in rows],
        "response_words": [len(row["response"].split()) for row in rows],
        "finish_reason": [row["finish_reason"] for row in rows],
        **{attribute: rated.get(attribute, blank) for attribute in ATTRIBUTES},
    }
    run.write(pa.table(columns, schema=SCORES_SCHEMA), "scores.parquet")
    return {"responses": len(rows), "rated": sorted(rated)}


def _log_ratios(run: StageRun, rows: list[dict[str, Any]], policy: Artifact | None) -> dict[str, list[float]]:
    """log p_adapter - log p_sft of generated responses, by adapter: `margin`, `policy`, as far as there are such."""
    from helpsteer_assets.modpo.log_probs import BASE, score_sequences
    from helpsteer_assets.modpo.models import load_adapters, scoring_batch_tokens
    from helpsteer_assets.modpo.tokenization import Sequence, encode_prompts

    experiment = run.experiment
    adapters = {} if policy is None else {"policy": policy.path / "adapter"}
    if "margin_adapter" in run.inputs:
        adapters["margin"] = run.input("margin_adapter").path / "adapter"
    if not adapters:
        return {}
    tokenizer = load_sft_tokenizer(run)
    # The tokens that were generated, not their text tokenized again: that can differ.
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], experiment.generation.max_prompt_length)
    sequences = [
        Sequence(prompt_ids, np.array(row["token_ids"], np.int32))
        for (prompt_ids, _), row in zip(prompts, rows, strict=True)
    ]
    with sft_model_on_loan(run) as base:
        model = load_adapters(base, adapters)
        scored = score_sequences(
            model,
            sequences,
            adapters=(BASE, *adapters),
            batch_tokens=scoring_batch_tokens(experiment.run, model.device),
            progress=run.progress,
            checkpoint=run.checkpoints / "log_probs.jsonl",
        )
    return {name: [a - b for a, b in zip(scored[name], scored[BASE], strict=True)] for name in adapters}


def _rater(run: StageRun) -> "Rater | None":
    settings = run.experiment.evaluation.rater
    if settings == "none":
        return None
    from helpsteer_assets.modpo.raters import RewardModelRater, embedded_rater

    if not isinstance(settings, RewardModelSettings):
        return embedded_rater()
    from helpsteer_assets.modpo.models import choose_device

    device = choose_device(run.experiment.run, run.experiment.model.precision)
    run.models.release_model()
    return RewardModelRater(fetch(run.experiment, "rater"), settings, str(device))


def score_summary(run: StageRun) -> Metrics:
    """Per policy and measure: mean, spread, 95% interval over prompts, and the paired difference to SFT."""
    experiment = run.experiment
    samples, seed = experiment.evaluation.bootstrap_samples, experiment.seed
    policies = [_policy_scores(artifact, experiment) for artifact in run.inputs["sft_scores"].values()]
    policies += [_policy_scores(artifact, experiment) for artifact in run.inputs["scores"].values()]
    run.write(pa.Table.from_pylist(summarize(policies, samples, seed), schema=SUMMARY_SCHEMA), "score_summary.parquet")
    by_weight = sorted((p for p in policies if p.w is not None), key=lambda p: float(p.w or 0))
    ends = paired_difference(by_weight[-1], by_weight[0], "margin_reward", samples, seed)
    return {"policies": len(policies), "margin_reward_ends": vars(ends)}


SUMMARY_SCHEMA = pa.schema(
    [("policy", pa.string()), ("w", pa.string()), ("measure", pa.string()), ("n", pa.int64())]
    + [(name, pa.float64()) for name in ("mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high")]
)


def _policy_scores(artifact: Artifact, experiment: Experiment) -> PolicyScores:
    table = pq.read_table(artifact.file("scores.parquet"))

    def column(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return table[name].to_numpy(zero_copy_only=False).astype(np.float64)

    rated = {name: column(name) for name in ATTRIBUTES if table[name].null_count < table.num_rows}
    if len(rated) == len(ATTRIBUTES):
        rated["overall"] = np.sum(list(rated.values()), axis=0)
    log_ratios, tokens = column("margin_log_ratio"), column("response_tokens")
    return PolicyScores(
        policy=table["policy"][0].as_py(),
        w=table["w"][0].as_py(),
        prompt_ids=table["prompt_id"].to_pylist(),
        measures={
            **rated,
            "margin_reward": margin_reward(experiment.objective, log_ratios, tokens),
            "margin": margin(experiment.objective, log_ratios, tokens),
            "log_ratio_to_sft": column("log_ratio_to_sft"),
            "response_tokens": tokens,
            "response_words": column("response_words"),
            "capped": np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], dtype=np.float64),
        },
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


def _describe_generations(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    preview = pq.read_table(artifact.file("generations.parquet")).slice(0, 5).to_pylist()
    shown = [{"prompt": r["prompt"], "response": r["response"], "tokens": r["response_tokens"]} for r in preview]
    return {**artifact.manifest["metrics"], "preview": table_metadata(shown)}


def _describe_scores(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    scores = _policy_scores(artifact, experiment)
    return {"responses": len(scores.prompt_ids)} | {f"mean_{k}": float(np.mean(v)) for k, v in scores.measures.items()}


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


def _generations_asset(compute: Any) -> AssetDeclaration:
    return AssetDeclaration(
        compute,
        "evaluation",
        {"pytorch", "parquet"},
        describe=_describe_generations,
        table="generations",
        file="generations.parquet",
        loads_model=True,
    )


def _scores_asset(compute: Any) -> AssetDeclaration:
    return AssetDeclaration(
        compute,
        "evaluation",
        {"pytorch", "duckdb"},
        describe=_describe_scores,
        table="scores",
        file="scores.parquet",
        loads_model=True,
    )


EVALUATION_ASSETS = (
    _generations_asset(sft_generations),
    _generations_asset(generations),
    _scores_asset(sft_scores),
    _scores_asset(scores),
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

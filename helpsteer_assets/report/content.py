"""The content of the report: analysis, scores and responses of an experiment, in the form that `render` takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from helpsteer_assets.experiment.settings import is_hub_id
from helpsteer_assets.modpo.comparison.bootstrap import Floats
from helpsteer_assets.modpo.comparison.differences import Measure, number
from helpsteer_assets.modpo.comparison.scores import PolicyScores, policy_label
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL

if TYPE_CHECKING:
    from helpsteer_assets.experiment.settings import Experiment

Rows = Sequence[Mapping[str, Any]]
CAPTIONS = {
    "front": "Each policy's mean with its 95% interval. A policy below and to the {worse} of another is worse on both "
    "axes. Filled points are on the Pareto front of the means.",
    "kl": "How far a policy has moved from the SFT model, estimated from its own samples at temperature 1, and what it "
    "gained by it. Of two policies at one height, the one further left paid less.",
    "lengths": "Mean with its 95% interval over prompts; the bar holds the middle half of the responses, its line is "
    "the median.",
}


def report_content(
    experiment: "Experiment",
    measures: Mapping[str, Measure],
    policies: Sequence[PolicyScores],
    summary: Rows,
    result: Mapping[str, Any],
    responses: Mapping[str | None, pa.Table],
    plots: Mapping[str, tuple[str, str]],
    *,
    quality: Mapping[str, Any] | None,
    kl: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The report's data.

    Args:
        experiment: the experiment.
        measures: of `measures_of`, in the order in which they are shown.
        policies: scores of the SFT model, then of the weights, ascending.
        summary: rows of score_summary.
        result: of `analyse`.
        responses: generations by weight, None for the SFT model.
        plots: title and SVG by name.
        quality: of `margin_adapter_quality`; None without a margin adapter.
        kl: metrics of `kl_to_sft` by weight.
    """
    worse = "left" if result["axes"]["x_larger_is_better"] else "right"
    return {
        "title": f"Trade-off: {experiment.name}",
        "experiment": experiment.name,
        "description": experiment.description,
        "facts": _facts(experiment, len(policies[0].prompt_ids)),
        "headlines": result["headlines"],
        "notes": _notes(result, quality, kl),
        "policies": [
            {
                "label": point["label"],
                "w": point["w"],
                "on_front": point["on_front"],
                "front_probability": point["front_probability"],
                "statements": result["statements"].get(point["w"], []),
            }
            for point in result["points"]
        ],
        "measures": [
            {"name": m.name, "title": m.title, "unit": m.unit, "better": m.better, "role": _role(experiment, m.name)}
            for m in measures.values()
        ],
        "summary": _summary(summary, result["differences"]),
        "plots": [
            {"id": name, "title": title, "caption": CAPTIONS[name].format(worse=worse), "svg": svg}
            for name, (title, svg) in plots.items()
        ],
        "tables": [
            *_equal_length(result["equal_length"], measures),
            *_movement(result["movement"], measures),
            *_kl(kl),
            *_quality(quality, experiment.data.margin_attribute),
        ],
        "prompts": _prompts(experiment, policies, responses),
    }


def _facts(experiment: "Experiment", prompts: int) -> list[list[str]]:
    objective, data, generation = experiment.objective, experiment.data, experiment.generation
    how = f"temperature {generation.temperature:g}" if generation.do_sample else "greedy"
    rater = experiment.evaluation.rater
    return [
        ["ratings", _named(data.source)],
        ["base model", _named(experiment.model.base)],
        ["preference", data.preference_attribute],
        ["margin", experiment.margin.facts],
        ["beta", f"{objective.beta:g}"],
        ["weights", ", ".join(objective.weights)],
        ["evaluation", f"{prompts} held-out prompts, {how}, up to {generation.max_new_tokens} tokens"],
        ["rater", rater if isinstance(rater, str) else _named(rater.model)],
        ["intervals", f"95%, {experiment.evaluation.bootstrap_samples} bootstrap resamples of the prompts"],
        ["seed", str(experiment.seed)],
    ]


def _named(source: str) -> str:
    """A source without its folders, which mean nothing to other people who get the report."""
    return source if is_hub_id(source) else Path(source).name


def _notes(
    result: Mapping[str, Any], quality: Mapping[str, Any] | None, kl: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    notes = [result["note"]] if result["note"] else []
    notes += result["caveats"]
    cut = max((counts["capped"] / counts["samples"] for counts in kl.values()), default=0.0)
    if cut > 0.05:
        notes.append(f"Up to {cut:.0%} of the samples behind the KL are cut at the limit: it is a lower bound.")
    notes.append(result["direction"]["sentence"])
    if quality is not None:
        notes.append(quality["sentence"])
    return notes


def _role(experiment: "Experiment", name: str) -> str:
    if name == experiment.data.preference_attribute:
        return "preference"
    if name in ("margin", "margin_reward") or (
        experiment.has_margin_adapter and name == experiment.data.margin_attribute
    ):
        return "margin"
    if name in (*ATTRIBUTES, OVERALL):
        return "rating"
    if name in ("response_tokens", "response_words"):
        return "length"
    return "kl" if name in ("kl_to_sft", "log_ratio_to_sft") else "diagnostic"


def _summary(rows: Rows, differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By measure and policy: mean and interval, and the difference to SFT that holds for all weights at once."""
    summary: dict[str, dict[str, Any]] = {}
    for row in rows:
        against = differences[row["w"]][row["measure"]] if row["w"] else None
        summary.setdefault(row["measure"], {})[policy_label(row["w"])] = {
            "mean": row["mean"],
            "low": row["ci_low"],
            "high": row["ci_high"],
            "delta": against and against["mean"],
            "delta_low": against and against["low"],
            "delta_high": against and against["high"],
            "verdict": against and against["verdict"],
        }
    return summary


def _table(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The table, or none where it would have no rows."""
    return [{"title": title, "caption": caption, "columns": columns, "rows": rows}] if rows else []


def _equal_length(answers: Rows, measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    return _table(
        "At equal length",
        "Difference to SFT as the lengths are, and what is left of it when length is held fixed: by a line within "
        "prompts (interval for all weights at once; extrapolated where hardly any response changed its length the "
        "other way), and among the prompts whose two responses are of about equal length.",
        ("measure", "policy", "as it is", "at equal length", "extrapolated", "similar lengths", "prompts"),
        [
            (
                measures[answer["measure"]].title,
                policy_label(answer["w"]),
                _rounded(answer["raw"]),
                _interval(answer["adjusted"]),
                "yes" if answer["extrapolated"] else "no",
                _interval(answer["close"]),
                answer["close_prompts"],
            )
            for answer in answers
        ],
    )


def _movement(movement: Mapping[str, Mapping[str, Any]], measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    return _table(
        "Movement with w",
        "Rank correlation of w and the mean, the change per unit of w (least squares), and the share of resamples in "
        "which every step of w moves the mean the same way. 95% intervals.",
        ("measure", "rank correlation", "change per unit of w", "monotone resamples"),
        [
            (
                measures[name].title,
                _interval(moved["rank_correlation"]),
                _interval(moved["slope"]),
                _percent(moved["share_of_resamples_monotone"]),
            )
            for name, moved in movement.items()
        ],
    )


def _kl(kl: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return _table(
        "KL to SFT",
        "Mean log-ratio of the policy's own samples at temperature 1 and top-p 1, in nats per response. Where samples "
        "are cut at the limit, it is the divergence of the tokens up to there: a lower bound of all.",
        ("policy", "KL, nats", "standard error", "samples", "cut at the limit"),
        [
            (
                policy_label(w),
                _rounded(metrics["kl"]),
                _rounded(metrics["kl_standard_error"]),
                metrics["samples"],
                _percent(metrics["capped"] / metrics["samples"], decimals=1),
            )
            for w, metrics in sorted(kl.items(), key=lambda item: float(item[0]))
        ],
    )


def _quality(quality: Mapping[str, Any] | None, attribute: str) -> list[dict[str, Any]]:
    if quality is None:
        return []

    def rows(parts: Rows, key: str) -> list[list[Any]]:
        return [[str(part[key]), part["n"], _share(part)] for part in parts if part["n"]]

    return [
        *_table(
            f"What the margin adapter measures: by the gap in {attribute}",
            "Share of validation pairs in which it rewards the chosen response more, by how far the ratings are "
            "apart. 95% intervals, resampling prompts.",
            ("rating gap", "pairs", "ranked right"),
            rows(quality["by_rating_gap"], "rating_gap"),
        ),
        *_table(
            "What the margin adapter measures: by length",
            f"{quality['sentence']} Much shorter (longer): less than half (more than twice) the length.",
            ("the chosen response is", "pairs", "ranked right"),
            rows(quality["by_length"], "chosen_is"),
        ),
    ]


def _prompts(
    experiment: "Experiment", policies: Sequence[PolicyScores], responses: Mapping[str | None, pa.Table]
) -> list[dict[str, Any]]:
    made = {w: {row["prompt_id"]: row for row in table.to_pylist()} for w, table in responses.items()}
    order = {scores.w: {p: i for i, p in enumerate(scores.prompt_ids)} for scores in policies}
    disagreements = _disagreements(experiment, policies)
    shown = [*ATTRIBUTES, OVERALL, "margin_reward", "log_ratio_to_sft", "repetition"]
    prompts = []
    for prompt_id, row in made[None].items():
        of_policies = []
        for scores in policies:
            i, own = order[scores.w][prompt_id], made[scores.w][prompt_id]
            of_policies.append(
                {
                    "text": own["response"],
                    "finish": own["finish_reason"],
                    "tokens": own["response_tokens"],
                    "words": len(own["response"].split()),
                    "scores": {
                        # Enough digits for a reader; the tables of the warehouse have all of them.
                        name: float(f"{scores.measures[name][i]:.4g}")
                        for name in shown
                        if name in scores.measures
                    },
                    "disagreement": float(f"{disagreements[scores.label][prompt_id]:.3g}"),
                }
            )
        prompts.append(
            {"id": prompt_id, "prompt": row["prompt"], "truncated": row["prompt_truncated"], "responses": of_policies}
        )
    return prompts


def _disagreements(experiment: "Experiment", policies: Sequence[PolicyScores]) -> dict[str, dict[str, float]]:
    """How strongly rater and margin reward contradict each other about the margin attribute, by policy and prompt.

    Each is the change from SFT's response to the same prompt, in standard deviations over all responses. The
    disagreement is the geometric mean of their sizes where the two point in opposite directions, else 0. It is 0
    without a rating of the margin attribute and without an adapter.
    """
    attribute = experiment.data.margin_attribute
    reference = policies[0]
    if not experiment.has_margin_adapter or attribute not in reference.measures:
        return {scores.label: dict.fromkeys(scores.prompt_ids, 0.0) for scores in policies}

    def changes(measure: str) -> list[Floats]:
        base = dict(zip(reference.prompt_ids, reference.measures[measure], strict=True))
        return [
            scores.measures[measure] - np.array([base[prompt_id] for prompt_id in scores.prompt_ids])
            for scores in policies
        ]

    rated, rewarded = changes(attribute), changes("margin_reward")
    scale = float(np.concatenate(rated).std() * np.concatenate(rewarded).std()) or 1.0
    return {
        scores.label: dict(zip(scores.prompt_ids, np.sqrt(np.maximum(-a * b, 0) / scale).tolist(), strict=True))
        for scores, a, b in zip(policies, rated, rewarded, strict=True)
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


_Cell = tuple[float, str]
"""A number, by which a table is sorted, and its text."""


def _interval(interval: Mapping[str, float] | None) -> _Cell | None:
    """Such as `0.12 [0.03, 0.21]`, with decimals for the interval's width; the mean alone where it has no ends."""
    if interval is None or interval["mean"] is None:
        return None
    if interval["low"] is None:
        return interval["mean"], f"{interval['mean']:.3g}"
    width = interval["high"] - interval["low"]
    mean, low, high = (number(interval[name], width, Measure("", "")) for name in ("mean", "low", "high"))
    return interval["mean"], f"{mean} [{low}, {high}]"


def _share(share: Mapping[str, float]) -> _Cell:
    return share["mean"], f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


def _percent(share: float, decimals: int = 0) -> _Cell:
    return share, f"{share:.{decimals}%}"

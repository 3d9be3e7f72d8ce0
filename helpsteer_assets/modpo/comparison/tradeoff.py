"""The trade-off: gains and losses as w moves, in numbers, sentences and points for plots.

It brings together the statistics of `fronts`, `differences` and `length`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from helpsteer_assets.modpo.comparison.differences import Measure, differences_to_sft, headlines, statements
from helpsteer_assets.modpo.comparison.fronts import front_with_uncertainty, margin_follows_weight, monotonicity
from helpsteer_assets.modpo.comparison.length import at_equal_length, length_caveats
from helpsteer_assets.modpo.comparison.scores import PolicyScores, paired_difference, score_table, summarize
from helpsteer_assets.modpo.comparison.text import REPETITION_LIMIT
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL

if TYPE_CHECKING:
    from helpsteer_assets.experiment.settings import Experiment


def measures_of(experiment: "Experiment", names: Sequence[str]) -> dict[str, Measure]:
    """The words for the experiment's measures `names`, the most important first."""
    objective, data = experiment.objective, experiment.data
    scale = "0 to 4" if experiment.evaluation.rater == "embedded" else ""
    margin_attribute = [data.margin_attribute] if experiment.has_margin_adapter else []
    rated = [data.preference_attribute, *margin_attribute, *ATTRIBUTES, OVERALL]
    drawn = "sampled" if experiment.generation.do_sample else "greedy"
    if objective.margin == "length_penalty":
        margin, reward = "margin (fewer tokens)", "length penalty"
    else:
        wanted = "less" if objective.margin_sign < 0 else "more"
        margin, reward = f"margin (for {wanted} {data.margin_attribute})", "margin reward"
    unwanted = margin_attribute if objective.margin_sign < 0 else []
    known = [
        *(
            Measure(name, f"rated {name}", "" if name == OVERALL else scale, "lower" if name in unwanted else "higher")
            for name in dict.fromkeys(rated)
        ),
        Measure("margin", margin, "", "higher"),
        Measure("margin_reward", reward, "", "higher" if objective.margin_sign > 0 else "lower"),
        Measure("response_tokens", "response length", "tokens", None, ("longer", "shorter")),
        Measure("response_words", "response length in words", "words"),
        Measure("kl_to_sft", "KL to SFT", "nats", "lower", to_sft=True),
        Measure("log_ratio_to_sft", f"log-ratio to SFT of the {drawn} response", "nats", "lower", to_sft=True),
        Measure("capped", "share of responses cut at the limit", "share", "lower"),
        Measure("repetition", "share of repeated 4-grams", "share", "lower"),
        Measure("empty", "share of empty responses", "share", "lower"),
        Measure("prompt_truncated", "share of prompts cut", "share"),
    ]
    return {measure.name: measure for measure in known if measure.name in names}


def analyse(experiment: "Experiment", policies: Sequence[PolicyScores]) -> dict[str, Any]:
    """The trade-off of an experiment as JSON-able numbers and sentences.

    `policies` are the SFT model's scores and those of the weights, ascending, on the same prompts. Without ratings of
    the preference attribute, the horizontal axis is the distance from SFT: the KL divergence, or where that was not
    estimated the log-ratio of the responses.

    Keys: axes {x, y (measures), x_larger_is_better}, preference_measured, note, caveats (`caveats`, `length_caveats`),
    points (of `plots.tradeoff_plot`), hypervolume_above_sft {mean, low, high}, direction (`margin_follows_weight`),
    movement (`monotonicity` by measure), differences (weight -> measure -> `Difference`), headlines, statements (weight
    -> sentences), equal_length (list of `EqualLength`).
    """
    samples, seed = experiment.evaluation.bootstrap_samples, experiment.seed
    preference = experiment.data.preference_attribute
    names = list(policies[0].measures)
    measures = measures_of(experiment, names)
    measured = preference in measures
    x = preference if measured else "kl_to_sft" if "kl_to_sft" in measures else "log_ratio_to_sft"
    table = score_table(policies, [x, "margin"])
    front = front_with_uncertainty(table[:, :, 0], table[:, :, 1], 0, (measured, True), samples, seed)
    rows = summarize(policies, samples, seed)
    weighted = [scores for scores in policies if scores.w is not None]
    differences = differences_to_sft(policies, list(measures), samples, seed)
    moving = [name for name in dict.fromkeys((x, "margin_reward", "response_tokens", "kl_to_sft")) if name in measures]
    flaws = ("capped", "repetition", "empty")
    shown = [name for name in flaws if any(own[name].verdict != "undecided" for own in differences.values())]
    ends = paired_difference(weighted[-1], weighted[0], "margin_reward", samples, seed)
    # A length penalty is a function of the length: at equal length it cannot differ.
    rewarded = ("margin_reward", experiment.data.margin_attribute) if experiment.has_margin_adapter else ()
    beyond_length = [name for name in dict.fromkeys((preference, *rewarded)) if name in measures]
    equal_length = [
        found for name in beyond_length for found in at_equal_length(policies, measures[name], samples, seed)
    ]
    return {
        "axes": {"x": x, "y": "margin", "x_larger_is_better": measured},
        "preference_measured": measured,
        "note": "" if measured else f"No rater rates {preference}: preference quality is unmeasured.",
        "caveats": [
            *caveats(experiment, policies),
            *(length_caveats(differences, equal_length, measures[preference]) if measured else []),
        ],
        "points": [
            {
                "label": label_of(scores),
                "w": scores.w,
                "is_sft": scores.w is None,
                "on_front": bool(front.on_front[i]),
                "front_probability": float(front.probability[i]),
                **_coordinates(rows, scores, x=x, y="margin"),
            }
            for i, scores in enumerate(policies)
        ],
        "hypervolume_above_sft": asdict(front.hypervolume),
        "direction": _finite(margin_follows_weight(rows, ends, experiment.objective.margin_sign)),
        "movement": _movement(weighted, moving, samples, seed),
        "differences": {w: {m: vars(found) for m, found in own.items()} for w, own in differences.items()},
        "headlines": headlines(
            differences,
            measures[x] if measured else None,
            measures["margin"],
            [measures["response_tokens"], *([] if measured else [measures[x]])],
            front if measured else None,
        ),
        "statements": statements(differences, [measures[name] for name in (*moving, *shown)]),
        "equal_length": [asdict(found) for found in equal_length],
    }


FEW_PROMPTS = 50
"""With fewer prompts, bootstrap intervals are noticeably too narrow (see `simultaneous_interval`)."""
_MANY = 0.05


def caveats(experiment: "Experiment", policies: Sequence[PolicyScores]) -> list[str]:
    """Sentences on whatever weakens the comparison (few prompts, degenerate or cut responses), and what to do."""
    sentences, limits = [], experiment.generation
    prompts = len(policies[0].prompt_ids)
    if prompts < FEW_PROMPTS:
        sentences.append(f"{prompts} prompts are few: intervals are too narrow for so few. Raise evaluation.prompts.")

    def told(shares: dict[str, float], least: float, sentence: str) -> None:
        worst = max(shares, key=lambda label: shares[label])
        if shares[worst] > least:
            much = "below 1%" if shares[worst] < 0.01 else f"{shares[worst]:.0%}"
            sentences.append(sentence.format(share=much, policy=worst))

    def share(name: str, above: float = 0.0) -> dict[str, float]:
        return {label_of(scores): float((scores.measures[name] > above).mean()) for scores in policies}

    told(
        share("capped"),
        _MANY,
        f"Up to {{share}} of the responses ({{policy}}) are cut at {limits.max_new_tokens} tokens: lengths differ by "
        "more than is seen, and what is rated or rewarded is unfinished text. Raise generation.max_new_tokens.",
    )
    told(
        share("prompt_truncated"),
        _MANY,
        f"{{share}} of the prompts are cut to their last {limits.max_prompt_length} tokens. Raise "
        "generation.max_prompt_length.",
    )
    told(share("empty"), 0.0, "Up to {share} of the responses ({policy}) are empty.")
    told(
        share("repetition", REPETITION_LIMIT),
        0.01,
        "Up to {share} of the responses ({policy}) mostly repeat themselves. Read some in the response browser.",
    )
    return sentences


def label_of(scores: PolicyScores) -> str:
    """The policy as plots and tables name it."""
    return "SFT" if scores.w is None else f"w={scores.w}"


def axis_label(measure: Measure) -> str:
    """A measure as the label of an axis."""
    label = f"{measure.title}, {measure.unit}" if measure.unit else measure.title
    if measure.better is None:
        return label
    better = f"{'more' if measure.better == 'higher' else 'less'} is better)"
    return f"{label[:-1]}; {better}" if label.endswith(")") else f"{label} ({better}"


def points_on(policies: Sequence[PolicyScores], x: str, y: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """The policies as points on two measures, with the ends of their 95% intervals."""
    rows = summarize(policies, samples, seed)
    return [
        {"label": label_of(scores), "w": scores.w, "is_sft": scores.w is None, **_coordinates(rows, scores, x=x, y=y)}
        for scores in policies
    ]


def length_points(policies: Sequence[PolicyScores], samples: int, seed: int) -> list[dict[str, Any]]:
    """The policies' response lengths in tokens: mean with its 95% interval, and quartiles over prompts."""
    rows = summarize(policies, samples, seed)
    return [
        {
            "label": label_of(scores),
            "w": scores.w,
            "is_sft": scores.w is None,
            "quartiles": np.quantile(scores.measures["response_tokens"], [0.25, 0.5, 0.75]).tolist(),
            **_coordinates(rows, scores, mean="response_tokens"),
        }
        for scores in policies
    ]


def _coordinates(rows: list[dict[str, Any]], scores: PolicyScores, **axes: str) -> dict[str, float]:
    own = {row["measure"]: row for row in rows if row["policy"] == scores.policy and row["w"] == scores.w}
    return {
        f"{axis}{suffix}": own[measure][name]
        for axis, measure in axes.items()
        for suffix, name in (("", "mean"), ("_low", "ci_low"), ("_high", "ci_high"))
    }


def _movement(
    weighted: Sequence[PolicyScores], names: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    if len(weighted) < 2:
        return {}
    table, weights = score_table(weighted, names), [float(scores.w or 0) for scores in weighted]
    moved = {name: monotonicity(weights, table[:, :, i], samples, seed) for i, name in enumerate(names)}
    return {
        name: {
            "rank_correlation": _finite(vars(found.rank_correlation)),
            "slope": vars(found.slope),
            "share_of_resamples_monotone": found.share_of_resamples_monotone,
        }
        for name, found in moved.items()
    }


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an undefined number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}

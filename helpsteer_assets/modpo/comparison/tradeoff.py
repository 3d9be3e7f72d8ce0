"""The trade-off as w moves: the analysis behind its numbers, sentences and plots.

It only combines the statistics of `fronts`, `differences` and `length`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from helpsteer_assets.modpo.comparison.bootstrap import bootstrap_interval
from helpsteer_assets.modpo.comparison.differences import Measure, differences_to_sft, headlines, percent, statements
from helpsteer_assets.modpo.comparison.fronts import front_with_uncertainty, margin_follows_weight, monotonicity
from helpsteer_assets.modpo.comparison.length import at_equal_length, length_caveats
from helpsteer_assets.modpo.comparison.scores import PolicyScores, score_table, summarize
from helpsteer_assets.modpo.comparison.text import REPETITION_LIMIT
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL
from helpsteer_assets.modpo.margins import Margin


@dataclass(frozen=True)
class TradeoffSettings:
    """How policies were trained, and their responses made and rated, as far as the comparison depends on it."""

    preference: str
    """Attribute on the horizontal axis."""
    margin: Margin
    rating_unit: str
    """Unit of the ratings, as in `Measure.unit`."""
    sampled: bool
    """Whether responses were sampled; else they are greedy."""
    max_prompt_length: int
    """Tokens after which a prompt is cut."""
    max_new_tokens: int
    """Tokens after which a response is cut."""
    samples: int
    """Bootstrap resamples behind every interval."""
    seed: int
    """Seed of the bootstrap."""


def measures_of(settings: TradeoffSettings, names: Sequence[str]) -> dict[str, Measure]:
    """The measures called `names` as sentences speak of them, the most important first."""
    margin, attribute = settings.margin, settings.margin.attribute
    drawn = "sampled" if settings.sampled else "greedy"
    unwanted = attribute if margin.sign < 0 else None
    rated = dict.fromkeys(name for name in (settings.preference, attribute, *ATTRIBUTES, OVERALL) if name)
    units = {OVERALL: ""}
    known = [
        *(
            Measure(
                name, f"rated {name}", units.get(name, settings.rating_unit), "lower" if name == unwanted else "higher"
            )
            for name in rated
        ),
        Measure("margin", margin.name, "", "higher"),
        Measure("margin_reward", margin.reward_name, "", "higher" if margin.sign > 0 else "lower"),
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


def analyse(settings: TradeoffSettings, policies: Sequence[PolicyScores]) -> dict[str, Any]:
    """The trade-off as JSON-able numbers and sentences.

    `policies` are the SFT model's scores and those of the weights, ascending, on the same prompts. Without ratings of
    the preference attribute, the horizontal axis is the distance from SFT: the KL divergence, or where that was not
    estimated the log-ratio of the responses.

    Keys: axes {x, y (measures), x_larger_is_better}, preference_measured, note, caveats (`caveats`, `length_caveats`),
    points (of `plots.tradeoff_plot`), hypervolume_above_sft {mean, low, high}, direction (`margin_follows_weight`),
    movement (`monotonicity` by measure), differences (weight -> measure -> `Difference`), headlines, statements (weight
    -> sentences), equal_length (list of `EqualLength`).
    """
    samples, seed, preference = settings.samples, settings.seed, settings.preference
    measures = measures_of(settings, list(policies[0].measures))
    measured = preference in measures
    x = preference if measured else "kl_to_sft" if "kl_to_sft" in measures else "log_ratio_to_sft"
    goodness = score_table(policies, [x, "margin"]) * np.array([1 if measured else -1, 1])
    front = front_with_uncertainty(goodness, samples, seed)
    rows = summarize(policies, samples, seed)
    weighted = policies[1:]
    differences = differences_to_sft(policies, list(measures), samples, seed)
    moving = [name for name in dict.fromkeys((x, "margin_reward", "response_tokens", "kl_to_sft")) if name in measures]
    flaws = ("capped", "repetition", "empty")
    shown = [name for name in flaws if any(own[name].verdict != "undecided" for own in differences.values())]
    rewards = score_table(weighted, ["margin_reward"])[:, :, 0]
    ends = bootstrap_interval(rewards[:, -1] - rewards[:, 0], samples, seed)
    mean_rewards = {row["w"]: row["mean"] for row in rows if row["measure"] == "margin_reward" and row["w"]}
    # Without an adapter the margin depends on the length alone: at equal length it cannot differ.
    attribute = settings.margin.attribute
    rewarded = () if attribute is None else ("margin_reward", attribute)
    equal_length = [
        answer
        for name in dict.fromkeys((preference, *rewarded))
        if name in measures
        for answer in at_equal_length(policies, measures[name], samples, seed)
    ]
    return {
        "axes": {"x": x, "y": "margin", "x_larger_is_better": measured},
        "preference_measured": measured,
        "note": "" if measured else f"No rater rates {preference}: preference quality is unmeasured.",
        "caveats": [
            *caveats(settings, policies),
            *(length_caveats(differences, equal_length, measures[preference]) if measured else []),
        ],
        "points": [
            {
                **_named(scores),
                "on_front": bool(front.on_front[i]),
                "front_probability": float(front.probability[i]),
                **_coordinates(rows, scores, x=x, y="margin"),
            }
            for i, scores in enumerate(policies)
        ],
        "hypervolume_above_sft": asdict(front.hypervolume),
        "direction": _finite(margin_follows_weight(mean_rewards, len(rewards), ends, settings.margin.sign)),
        "movement": _movement(weighted, moving, samples, seed),
        "differences": {w: {m: vars(difference) for m, difference in own.items()} for w, own in differences.items()},
        "headlines": headlines(
            differences,
            measures[x] if measured else None,
            measures["margin"],
            [measures["response_tokens"], *([] if measured else [measures[x]])],
            front,
        ),
        "statements": statements(differences, [measures[name] for name in (*moving, *shown)]),
        "equal_length": [asdict(answer) for answer in equal_length],
    }


FEW_PROMPTS = 50
"""With fewer prompts, bootstrap intervals are noticeably too narrow (see `simultaneous_interval`)."""


def caveats(settings: TradeoffSettings, policies: Sequence[PolicyScores]) -> list[str]:
    """Flaws of the responses, and too few of them, that limit the comparison: sentences that say what to do."""
    sentences = []
    prompts = len(policies[0].prompt_ids)
    if prompts < FEW_PROMPTS:
        sentences.append(f"{prompts} prompts are few: intervals are too narrow for so few. Raise evaluation.prompts.")

    capped = (
        f"Up to {{share}} of the responses ({{policy}}) are cut at {settings.max_new_tokens} tokens: lengths differ by "
        "more than is seen, and what is rated or rewarded is unfinished text. Raise generation.max_new_tokens."
    )
    truncated = (
        f"{{share}} of the prompts are cut to their last {settings.max_prompt_length} tokens. Raise "
        "generation.max_prompt_length."
    )
    repeated = "Up to {share} of the responses ({policy}) mostly repeat themselves. Read some in the response browser."
    flaws = (
        ("capped", 0, 0.05, capped),
        ("prompt_truncated", 0, 0.05, truncated),
        ("empty", 0, 0.0, "Up to {share} of the responses ({policy}) are empty."),
        ("repetition", REPETITION_LIMIT, 0.01, repeated),
    )
    for measure, limit, tolerated, sentence in flaws:
        shares = {scores.label: float((scores.measures[measure] > limit).mean()) for scores in policies}
        worst = max(shares, key=lambda label: shares[label])
        if shares[worst] > tolerated:
            sentences.append(sentence.format(share=percent(shares[worst]), policy=worst))
    return sentences


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
    return [{**_named(scores), **_coordinates(rows, scores, x=x, y=y)} for scores in policies]


def length_points(policies: Sequence[PolicyScores], samples: int, seed: int) -> list[dict[str, Any]]:
    """The policies' response lengths in tokens: mean with its 95% interval, and quartiles over prompts."""
    rows = summarize(policies, samples, seed)
    return [
        {
            **_named(scores),
            "quartiles": np.quantile(scores.measures["response_tokens"], [0.25, 0.5, 0.75]).tolist(),
            **_coordinates(rows, scores, mean="response_tokens"),
        }
        for scores in policies
    ]


def _named(scores: PolicyScores) -> dict[str, Any]:
    return {"label": scores.label, "w": scores.w, "is_sft": scores.w is None}


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
        name: asdict(own) | {"rank_correlation": _finite(vars(own.rank_correlation))} for name, own in moved.items()
    }


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an undefined number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}

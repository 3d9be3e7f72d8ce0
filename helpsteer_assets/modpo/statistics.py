"""The statistics of the evaluation: pure, seeded functions on numpy arrays.

Uncertainty comes from the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapter 13). What is resampled is the prompt, the unit that was drawn: two responses or two pairs of one prompt are not
independent. One call resamples all its columns by the same draws, so that differences between policies are paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpsteer_assets.errors import HelpsteerError

Floats = NDArray[np.float64]

LEVEL = 0.95
_CHUNK_ELEMENTS = 4_000_000
"""Draws held in memory at once, whatever the number of rows and samples."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PolicyScores:
    """The scores of one policy: `measures[name][i]` belongs to `prompt_ids[i]`.

    `policy` is `sft` or `modpo`; `w` is the weight as its canonical string, None for the SFT model.
    """

    policy: str
    w: str | None
    prompt_ids: list[str]
    measures: dict[str, Floats]

    @property
    def title(self) -> str:
        """The policy as messages name it."""
        return self.policy if self.w is None else f"{self.policy} w={self.w}"


def bootstrap_means(values: ArrayLike, samples: int, seed: int, names: Sequence[str] | None = None) -> Floats:
    """Means of `samples` resamples of the rows of `values` [N, M]: [samples, M].

    All columns share each resample, so the difference of two columns' means is the mean of their paired difference.
    `names` names the columns in messages. Raises ValueError without rows, or naming a column that holds NaN or
    infinity.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"bootstrap_means wants values of shape [rows, columns], got {list(table.shape)}")
    if samples < 1:
        raise ValueError(f"bootstrap_means wants at least one sample, got {samples}")
    rows, columns = table.shape
    if rows == 0:
        raise ValueError("no rows to resample")
    bad = ~np.isfinite(table)
    if bad.any():
        column = int(np.flatnonzero(bad.any(axis=0))[0])
        name = names[column] if names is not None else column
        raise ValueError(f"column {name}: {int(bad[:, column].sum())} of {rows} values are NaN or infinite")
    # Taken from the first row, a constant column gives its own value exactly and a large offset costs no digits.
    centre = table[0]
    centred = table - centre
    rng = np.random.default_rng(seed)
    means = np.empty((samples, columns))
    chunk = max(1, _CHUNK_ELEMENTS // rows)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = rng.integers(0, rows, size=(size, rows))
        draws += (np.arange(size) * rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * rows).reshape(size, rows)
        means[start : start + size] = counts.astype(np.float64) @ centred / rows
    return means + centre


def _means(table: Floats) -> Floats:
    """Means [M] of the columns of `table` [N, M], exact for a constant column."""
    return table[0] + (table - table[0]).mean(axis=0)


def percentile_interval(means: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Lower and upper ends [M] of the central `level` of resampled means [samples, M]."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, got {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def bootstrap_interval(values: ArrayLike, samples: int, seed: int, level: float = LEVEL) -> Interval:
    """Mean of `values` [N], one per prompt, and its percentile bootstrap interval. Raises as `bootstrap_means`."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    low, high = percentile_interval(bootstrap_means(column, samples, seed), level)
    return Interval(float(_means(column)[0]), float(low[0]), float(high[0]))


def _ordered(scores: PolicyScores) -> dict[str, Floats]:
    """The measures in the order of the sorted prompt ids, so that no result depends on the order of rows."""
    for name, values in scores.measures.items():
        if np.shape(values) != (len(scores.prompt_ids),):
            raise ValueError(
                f"{scores.title}: {name} has shape {list(np.shape(values))} for {len(scores.prompt_ids)} prompts"
            )
    order = np.argsort(np.array(scores.prompt_ids))
    return {name: np.asarray(values, dtype=np.float64)[order] for name, values in scores.measures.items()}


def _require_same_prompts(scores: PolicyScores, reference: PolicyScores) -> None:
    own, wanted = set(scores.prompt_ids), set(reference.prompt_ids)
    for policy, ids in ((scores, own), (reference, wanted)):
        if len(ids) != len(policy.prompt_ids):
            raise HelpsteerError(
                f"scores of {policy.title}: {len(policy.prompt_ids) - len(ids)} prompts stand there more than once; "
                "materialize its scores again"
            )
    if own != wanted:
        raise HelpsteerError(
            f"scores of {scores.title} and {reference.title} are for different prompts, so their difference cannot be "
            f"paired: {scores.title} lacks {len(wanted - own)} of the {len(wanted)} prompts of {reference.title} and "
            f"has {len(own - wanted)} others; materialize generations and scores of both again"
        )


def _require_measures(scores: PolicyScores, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in scores.measures]
    if missing:
        raise HelpsteerError(
            f"scores of {scores.title} lack {', '.join(missing)}, which other policies have; materialize its scores "
            "again"
        )
    for name in names:
        values = np.asarray(scores.measures[name], dtype=np.float64)
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise HelpsteerError(
                f"scores of {scores.title}: {name} is missing or not finite for {bad} of {len(values)} prompts; a mean "
                "over the others would compare different prompts"
            )


def summarize(policies: Sequence[PolicyScores], samples: int, seed: int) -> list[dict[str, Any]]:
    """The rows of `score_summary`: every measure of every policy, with intervals, and paired against the SFT model.

    Row: policy, w, measure, n (prompts), mean, sd (ddof 1, null for one prompt), ci_low, ci_high (95%, resampling
    prompts), delta (mean minus the SFT model's on the same prompts), delta_low, delta_high (null for the SFT model).
    Raises HelpsteerError where the SFT model is missing, where policies were scored on different prompts (naming the
    policy and how many are missing) or by different measures, and where a measure has gaps.
    """
    reference = next((scores for scores in policies if scores.policy == "sft"), None)
    if reference is None:
        raise HelpsteerError("there are no scores of the SFT model to compare with; materialize sft_scores")
    if not reference.prompt_ids:
        raise HelpsteerError("scores of sft: no prompts; materialize evaluation_prompts and what follows again")
    measures = list(reference.measures)
    for scores in policies:
        _require_same_prompts(scores, reference)
        _require_measures(scores, measures)
        _require_measures(reference, list(scores.measures))
    sft = _ordered(reference)
    columns: list[Floats] = []
    for scores in policies:
        own = _ordered(scores)
        columns += [own[name] for name in measures]
        columns += [own[name] - sft[name] for name in measures]
    table = np.stack(columns, axis=1)
    low, high = percentile_interval(bootstrap_means(table, samples, seed))
    mean = _means(table)
    prompts = len(table)
    sd = table.std(axis=0, ddof=1) if prompts > 1 else None
    rows = []
    for position, scores in enumerate(policies):
        for offset, measure in enumerate(measures):
            value = 2 * position * len(measures) + offset
            delta = value + len(measures)
            compared = scores is not reference
            rows.append(
                {
                    "policy": scores.policy,
                    "w": scores.w,
                    "measure": measure,
                    "n": prompts,
                    "mean": float(mean[value]),
                    "sd": None if sd is None else float(sd[value]),
                    "ci_low": float(low[value]),
                    "ci_high": float(high[value]),
                    "delta": float(mean[delta]) if compared else None,
                    "delta_low": float(low[delta]) if compared else None,
                    "delta_high": float(high[delta]) if compared else None,
                }
            )
    return rows


def paired_difference(a: PolicyScores, b: PolicyScores, measure: str, samples: int, seed: int) -> Interval:
    """Mean of `measure` under `a` minus under `b` on the same prompts, with its 95% interval (resampling prompts).

    Raises HelpsteerError where the prompts differ or the measure is missing or has gaps.
    """
    _require_same_prompts(a, b)
    _require_measures(a, [measure])
    _require_measures(b, [measure])
    if not a.prompt_ids:
        raise HelpsteerError(f"{a.title} and {b.title} have no scores to compare; materialize their scores")
    return bootstrap_interval(_ordered(a)[measure] - _ordered(b)[measure], samples, seed)


def _checked_points(points: ArrayLike) -> Floats:
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(table).all():
        raise ValueError("a point has a coordinate that is NaN or infinite")
    return table


def pareto_front(points: ArrayLike, larger_is_better: tuple[bool, bool]) -> NDArray[np.bool_]:
    """Which of `points` [N, 2] no other point dominates: [N].

    A point dominates another if it is at least as good on both axes and better on one, so equal points both stay.
    """
    table = _checked_points(points) * np.where(larger_is_better, 1.0, -1.0)
    at_least = (table[:, None] >= table[None, :]).all(axis=2)
    better = (table[:, None] > table[None, :]).any(axis=2)
    return ~(at_least & better).any(axis=0)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Area that `points` [N, 2] dominate above `reference` [2], both axes maximised; in the product of their units.

    Zitzler and Thiele, "Multiobjective Evolutionary Algorithms: A Comparative Case Study and the Strength Pareto
    Approach", 1999. A point that is not above the reference on both axes adds nothing.
    """
    extent = _checked_points(points) - _checked_points(reference)
    extent = extent[(extent > 0).all(axis=1)]
    area, height = 0.0, 0.0
    # From right to left, each point adds a slab of its width above what stands already.
    for x, y in extent[np.argsort(-extent[:, 0], kind="stable")]:
        if y > height:
            area += x * (y - height)
            height = y
    return float(area)


def _average_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of `x` [N] and `y` [N], ties by average ranks.

    NaN where it is undefined: fewer than two values, a constant side, or a NaN among the values.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"rank_correlation wants two lists of one length, got {list(a.shape)} and {list(b.shape)}")
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any():
        return math.nan
    a, b = _average_ranks(a), _average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return math.nan if scale == 0 else float(np.clip(a @ b / scale, -1, 1))


def sanity_metrics(margins: ArrayLike, samples: int, seed: int, groups: Sequence[str] | None = None) -> dict[str, Any]:
    """Does the margin adapter prefer chosen over rejected? `margins` [N] are r(chosen) - r(rejected), in reward units.

    `groups` [N] are prompt ids: prompts are resampled with all their pairs. Without them every pair stands alone.
    Keys: n (pairs), groups, accuracy (share above 0, a tie counts half), accuracy_low, accuracy_high, mean_margin,
    margin_low, margin_high (95% intervals), margin_sd, ties. Without pairs n is 0 and the numbers are null.
    Raises HelpsteerError where a margin is NaN or infinite.
    """
    values = np.asarray(margins, dtype=np.float64)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"sanity_metrics got {len(values)} margins and {len(groups)} groups")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise HelpsteerError(
            f"the margin of {bad} of {len(values)} validation pairs is NaN or infinite: the margin adapter is broken; "
            "train it with a lower margin_adapter.learning_rate, or in fp32"
        )
    metrics: dict[str, Any] = dict.fromkeys(
        ("accuracy", "accuracy_low", "accuracy_high", "mean_margin", "margin_low", "margin_high", "margin_sd")
    )
    metrics |= {"n": len(values), "groups": 0, "ties": int((values == 0).sum())}
    if len(values) == 0:
        return metrics
    won = (values > 0) + 0.5 * (values == 0)
    member = np.arange(len(values)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    sizes = np.bincount(member)
    accuracy, mean_margin = float(won.mean()), float(values.mean())
    # A resample's mean over pairs is a ratio: what the drawn prompts' pairs add up to, over how many they are.
    sums = np.stack(
        [np.bincount(member, won - accuracy), np.bincount(member, values - mean_margin), sizes.astype(float)], axis=1
    )
    means = bootstrap_means(sums, samples, seed)
    low, high = percentile_interval(means[:, :2] / means[:, 2:] + [accuracy, mean_margin])
    return metrics | {
        "groups": len(sizes),
        "accuracy": accuracy,
        "accuracy_low": float(low[0]),
        "accuracy_high": float(high[0]),
        "mean_margin": mean_margin,
        "margin_low": float(low[1]),
        "margin_high": float(high[1]),
        "margin_sd": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


def judge_margin_adapter(metrics: Mapping[str, Any], min_accuracy: float) -> list[str]:
    """Why a margin adapter with these `sanity_metrics` must not be used, one sentence each; empty where it passes.

    It passes if there are validation pairs, more than `min_accuracy` of them are ranked right, and the 95% interval of
    the mean margin lies above 0.
    """
    if metrics["n"] == 0:
        return [
            "there are no validation pairs to judge the margin adapter on (n = 0); give the source validation rows "
            "with unequal ratings of data.margin_attribute, or raise data.validation_share"
        ]
    reasons = []
    if not metrics["accuracy"] > min_accuracy:
        reasons.append(
            f"it prefers chosen over rejected in {metrics['accuracy']:.1%} of {metrics['n']} validation pairs, and "
            f"checks.margin_adapter_min_accuracy asks for more than {min_accuracy:.1%}; train it longer "
            "(margin_adapter.steps or epochs), try another margin_adapter.learning_rate, or check "
            "that data.margin_attribute can be told from the text"
        )
    if not metrics["margin_low"] > 0:
        reasons.append(
            f"its mean margin is {metrics['mean_margin']:.4g} with the 95% interval [{metrics['margin_low']:.4g}, "
            f"{metrics['margin_high']:.4g}] over {metrics['groups']} prompts, which does not lie above 0; train it "
            "longer, or validate on more prompts (data.max_validation_prompts, data.validation_share)"
        )
    return reasons


def margin_follows_weight(
    rows: Sequence[Mapping[str, Any]], ends: Interval, margin_sign: Literal[-1, 1]
) -> dict[str, Any]:
    """Does the margin reward move with w in the direction that the role asks for?

    More weight on the preference leaves less for the margin m = `margin_sign` * margin_reward, so m should fall as w
    rises: margin_reward rises under `cost` (-1) and falls under `reward` and a length penalty (+1). `rows` are
    `summarize`'s; `ends` is margin_reward at the largest w minus at the smallest, paired by prompt.

    Keys: verdict (True if the rank correlation of w and margin_reward and the whole interval of `ends` point the
    right way; None with fewer than two weights), rank_correlation (NaN where undefined), expected (`rises` or
    `falls`), weights, mean_margin_reward, n (prompts), ends_mean, ends_low, ends_high, sentence.
    """
    measured = sorted(
        (float(row["w"]), row["w"], float(row["mean"]), int(row["n"]))
        for row in rows
        if row["policy"] == "modpo" and row["measure"] == "margin_reward"
    )
    weights = [name for _, name, _, _ in measured]
    means = [mean for _, _, mean, _ in measured]
    correlation = rank_correlation([w for w, _, _, _ in measured], means)
    prompts = min((n for _, _, _, n in measured), default=0)
    towards = -margin_sign
    role, expected = ("the role cost", "rises") if margin_sign == -1 else ("an encouraged margin", "falls")
    result = {
        "verdict": None,
        "rank_correlation": correlation,
        "expected": expected,
        "weights": weights,
        "mean_margin_reward": means,
        "n": prompts,
        "ends_mean": ends.mean,
        "ends_low": ends.low,
        "ends_high": ends.high,
    }
    if len(weights) < 2:
        return result | {"sentence": f"A direction takes at least two weights, and there are {len(weights)}."}
    ranked = "undefined" if np.isnan(correlation) else f"{correlation:.2f}"
    numbers = (
        f"rank correlation {ranked} over {len(weights)} weights; from w={weights[0]} to w={weights[-1]} it changes by "
        f"{ends.mean:.3g}, 95% interval [{ends.low:.3g}, {ends.high:.3g}], {prompts} prompts"
    )
    right_order = towards * correlation > 0
    right_ends = min(towards * ends.low, towards * ends.high) > 0
    if right_order and right_ends:
        sentence = f"The margin reward {expected} with w, as {role} asks ({numbers})."
        return result | {"verdict": True, "sentence": sentence}
    wrong_ends = max(towards * ends.low, towards * ends.high) < 0
    if wrong_ends:
        seen = "moves against it"
    elif right_ends:
        seen = "does so between the ends only, not in order"
    else:
        seen = "does not do so clearly"
    sentence = (
        f"Under {role} the margin reward {expected} with w where the objective alone decides; here it {seen} "
        f"({numbers}). What may explain it: the two objectives are strongly correlated, which can turn the slope (the "
        "role promises a difference to the other role at equal w, no monotone movement with w); too little training "
        "(modpo.steps or epochs); too few prompts (evaluation.prompts) for the noise."
    )
    return result | {"verdict": False, "sentence": sentence}

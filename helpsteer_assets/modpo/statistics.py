"""The statistics of the evaluation: pure, seeded functions on numpy arrays.

Uncertainty comes from the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapter 13). What is resampled is the prompt, the unit that was drawn: two responses or two pairs of one prompt are not
independent. One call resamples all its columns by the same draws, so that differences between policies are paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def simultaneous_interval(
    estimates: Floats, resampled: Floats, rows: int, level: float = LEVEL
) -> tuple[Floats, Floats, Floats]:
    """Intervals that hold for all of several estimates at once, and p-values adjusted for their number.

    `estimates` [M] of `rows` resampled rows, `resampled` [samples, M] the same of each resample, by shared draws.
    Returns the lower ends, the upper ends and the p-values against 0, each [M].

    With se_j the bootstrap standard error, the interval is estimate_j -+ c se_j, c being the `level` quantile of
    max_j |resampled_j - estimate_j| / se_j, and the p-value the share of resamples in which that maximum reaches
    |estimate_j| / se_j: the single-step max-|t| method of Westfall and Young, "Resampling-Based Multiple Testing",
    1993, with the bootstrap as in Romano and Wolf, "Exact and Approximate Stepdown Methods for Multiple Hypothesis
    Testing", 2005. Drawn jointly, correlated estimates cost less than Bonferroni's rule would. That se_j is itself
    estimated, the bootstrap does not see: the maxima are stretched from the normal to Student's t distribution with
    rows - 1 degrees of freedom (Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.5).

    Six independent estimates were simulated: at least one interval missed in 5 to 7% of trials for normal values and 20
    to 300 rows, in at most 5% for rare values of -1 and 1, and for exponential values in 5 to 9% with 120 rows or more,
    but in 14 to 18% with 20 to 40: with so few rows a skewed measure is claimed too easily.

    An estimate that no resample moves has an interval of no width and takes no part in the maximum; its p-value is that
    of M exact sign-flip tests (Bonferroni), min(1, M 2^(1 - rows)), for a few rows that agree prove little.
    """
    # The bootstrap divides by rows where an unbiased variance divides by rows - 1.
    deviations = (resampled - estimates) * math.sqrt(rows / max(rows - 1, 1))
    errors = np.sqrt((deviations**2).mean(axis=0))
    moves = errors > 1e-12 * np.abs(estimates)
    same = np.where(estimates == 0, 1.0, min(1.0, len(estimates) * 2.0 ** (1 - rows)))
    if not moves.any():
        return estimates.copy(), estimates.copy(), same
    z, freedom = (np.abs(deviations[:, moves]) / errors[moves]).max(axis=1), max(rows - 1, 1)
    largest = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    half = np.where(moves, np.quantile(largest, level) * errors, 0.0)
    reached = np.abs(estimates[moves]) / errors[moves]
    p_values = same
    p_values[moves] = (1 + (largest[:, None] >= reached).sum(axis=0)) / (1 + len(largest))
    return estimates - half, estimates + half, p_values


def _ordered(scores: PolicyScores) -> dict[str, Floats]:
    """The measures in the order of the sorted prompt ids, so that no result depends on the order of rows."""
    for name, values in scores.measures.items():
        if np.shape(values) != (len(scores.prompt_ids),):
            raise ValueError(
                f"{scores.title}: {name} has shape {list(np.shape(values))} for {len(scores.prompt_ids)} prompts"
            )
    order = np.argsort(np.array(scores.prompt_ids))
    return {name: np.asarray(values, dtype=np.float64)[order] for name, values in scores.measures.items()}


def reference_and_weights(policies: Sequence[PolicyScores]) -> tuple[PolicyScores, list[PolicyScores]]:
    """The SFT model's scores, and the others' by ascending weight. Raises HelpsteerError without the SFT model."""
    reference = next((scores for scores in policies if scores.w is None), None)
    if reference is None:
        raise HelpsteerError("there are no scores of the SFT model to compare with; materialize sft_scores")
    return reference, sorted((s for s in policies if s.w is not None), key=lambda scores: float(scores.w or 0))


def score_table(policies: Sequence[PolicyScores], measures: Sequence[str]) -> Floats:
    """The `measures` of all `policies` on the same prompts, in the order of the sorted prompt ids: [N, P, M].

    Raises HelpsteerError where the prompts differ, there are none, or a measure is missing or has gaps.
    """
    for scores in policies:
        _require_same_prompts(scores, policies[0])
        _require_measures(scores, measures)
    if not policies[0].prompt_ids:
        raise HelpsteerError(
            f"scores of {policies[0].title}: no prompts; materialize evaluation_prompts and what follows again"
        )
    ordered = [_ordered(scores) for scores in policies]
    return np.stack([np.stack([own[name] for name in measures], axis=1) for own in ordered], axis=1)


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
    reference, _ = reference_and_weights(policies)
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


def average_ranks(values: Floats) -> Floats:
    """Ranks [N] of `values` [N] from 1 for the smallest; equal values share the mean of their ranks."""
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
    a, b = average_ranks(a), average_ranks(b)
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

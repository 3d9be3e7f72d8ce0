"""The Pareto front of the policies, how sure it is, and how a measure moves with w.

Pure, seeded functions. Uncertainty comes from resampling prompts, as in `bootstrap`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpsteer_assets.modpo.comparison.bootstrap import (
    Floats,
    Interval,
    bootstrap_means,
    column_means,
    percentile_interval,
    rank_correlation,
)


def _undominated(points: Floats) -> NDArray[np.bool_]:
    """Whether no other of the points [..., P, 2], both axes maximised, dominates each: [..., P].

    A point dominates another if it is at least as good on both axes and better on one, so equal points both stay.
    """
    one, other = points[..., :, None, :], points[..., None, :, :]
    return ~np.any(np.all(one >= other, axis=-1) & np.any(one > other, axis=-1), axis=-2)


def _areas(points: Floats) -> Floats:
    """Hypervolume of each set of `points` [..., P, 2] above the origin, both axes maximised: [...].

    The area that the points dominate (Zitzler and Thiele, "Multiobjective Evolutionary Algorithms: A Comparative Case
    Study and the Strength Pareto Approach", 1999). A point that is not above the origin on both axes adds nothing.
    """
    extent = np.maximum(points, 0.0)
    order = np.argsort(-extent[..., 0], axis=-1, kind="stable")
    # From right to left, each point adds a rectangle of its width above the highest one so far.
    width, height = (np.take_along_axis(extent[..., axis], order, axis=-1) for axis in (0, 1))
    return (width * np.diff(np.maximum.accumulate(height, axis=-1), axis=-1, prepend=0.0)).sum(axis=-1)


@dataclass(frozen=True)
class FrontUncertainty:
    """The front of P policies and how sure it is.

    `probability` estimates how often another set of as many prompts would show a policy on the front. It is not the
    probability that the policy belongs there.
    """

    on_front: NDArray[np.bool_]
    """[P] The front of the means."""
    probability: Floats
    """[P] Share of resamples in which a policy is on the front."""
    hypervolume: Interval
    """Area above the reference, in the product of the axes' units, with its 95% interval."""


def front_with_uncertainty(
    x: ArrayLike,
    y: ArrayLike,
    reference_index: int,
    larger_is_better: tuple[bool, bool],
    samples: int,
    seed: int,
) -> FrontUncertainty:
    """The Pareto front of the policies' means of `x` and `y` [N, P], one row per prompt, with its uncertainty.

    All policies share each resample of the prompts. Means that differ by rounding alone count as equal, and equal
    points stay on the front together. The reference of the hypervolume is the mean of policy `reference_index` (SFT)
    on the same prompts, so only paired differences count.

    The hypervolume is a maximum over noisy points: its expectation lies above the true area, and that of resamples is
    higher still, so a percentile interval can lie wholly above the truth. Where no policy is truly above the reference
    (the area is 0, the least possible) the bootstrap does not even converge to the right spread (Andrews,
    "Inconsistency of the Bootstrap when a Parameter is on the Boundary of the Parameter Space", 2000), and the basic
    interval of an estimate of 0 ends at 0. So each end is the more cautious one of the basic and the percentile
    interval (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2), and not below 0. In
    simulations with 40 and 120 prompts and one to six policies, apart, tied and at an area of 0, this interval
    contained the truth 93 to 100% of the time, the percentile interval 37 to 100%. A lower end above 0 says that some
    policy is better than the reference on both axes.

    Raises ValueError where the shapes differ, there are no rows, or a value is NaN or infinite.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in (x, y)]
    if tables[0].ndim != 2 or tables[0].shape != tables[1].shape:
        raise ValueError(f"x and y want one shape [prompts, policies], got {[list(t.shape) for t in tables]}")
    rows, policies = tables[0].shape
    goodness = np.stack(tables, axis=2) * np.where(larger_is_better, 1.0, -1.0)
    flat = goodness.reshape(rows, 2 * policies)
    resampled = bootstrap_means(flat, samples, seed).reshape(samples, policies, 2)
    scale = np.abs(goodness).max(axis=(0, 1))
    scale[scale == 0] = 1.0
    mean = np.round(goodness.mean(axis=0) / scale, _DIGITS)
    resampled = np.round(resampled / scale, _DIGITS)
    estimate = float(_areas(mean - mean[reference_index]) * scale.prod())
    areas = _areas(resampled - resampled[:, [reference_index]]) * scale.prod()
    low, high = (float(end[0]) for end in percentile_interval(areas[:, None]))
    area = Interval(estimate, max(0.0, min(low, 2 * estimate - high)), max(high, 2 * estimate - low))
    return FrontUncertainty(_undominated(mean), _undominated(resampled).mean(axis=0), area)


_DIGITS = 12
"""Two means are equal if they agree in so many decimals, relative to the largest value; the rest is rounding."""


@dataclass(frozen=True)
class Monotonicity:
    """How one measure moves with w.

    Intervals are 95% percentile intervals.
    """

    rank_correlation: Interval
    """Spearman's, of w and the means; NaN where it is undefined."""
    slope: Interval
    """Slope of the least-squares line, in units of the measure per unit of w."""
    share_of_resamples_monotone: float
    """Share of resamples in which every step of w moves the mean strictly in the slope's direction."""


def monotonicity(weights: Sequence[float], table: ArrayLike, samples: int, seed: int) -> Monotonicity:
    """How the means of `table` [N, W], one row per prompt and one column per weight, move with `weights` [W].

    Noise can only break an order that the means show, so the interval of a rank correlation of 1 reaches down from 1
    and tells how firm that order is. A resample in which all means are equal counts as rank correlation 0.
    Raises ValueError with fewer than two weights or equal ones, without rows, or where a value is NaN or infinite.
    """
    values, w = np.asarray(table, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len(w) < 2 or len(np.unique(w)) != len(w):
        raise ValueError(f"monotonicity wants at least two weights that differ, got {list(weights)}")
    if values.ndim != 2 or values.shape[1] != len(w):
        raise ValueError(f"monotonicity wants one column per weight, got {list(values.shape)} for {len(w)} weights")
    order = np.argsort(w)
    w, values = w[order], values[:, order]
    resampled = bootstrap_means(values, samples, seed)
    mean = column_means(values)
    line = (w - w.mean()) / ((w - w.mean()) ** 2).sum()
    slope = float((mean - mean[0]) @ line)
    # The slope of differences to the first weight: a constant measure then has a slope of 0 exactly.
    low, high = percentile_interval(((resampled - resampled[:, :1]) @ line)[:, None])
    scale = np.abs(values).max() or 1.0
    rounded: Floats = np.round(resampled / scale, _DIGITS).astype(np.float64)
    rank = rank_correlation(w, np.round(mean / scale, _DIGITS))
    rank_low, rank_high = percentile_interval(_rank_correlations(rounded)[:, None])
    ranks = Interval(rank, float(rank_low[0]), float(rank_high[0]))
    return Monotonicity(
        Interval(rank, math.nan, math.nan) if math.isnan(rank) else ranks,
        Interval(slope, float(low[0]), float(high[0])),
        float((np.diff(rounded, axis=1) * np.sign(slope) > 0).all(axis=1).mean()),
    )


def _rank_correlations(values: Floats) -> Floats:
    """Spearman's correlation of each row of `values` [S, W] with its columns' order: [S]; 0 for a constant row."""
    below = (values[:, :, None] > values[:, None, :]).sum(axis=2)
    ranks = below + ((values[:, :, None] == values[:, None, :]).sum(axis=2) + 1) / 2
    place = np.arange(values.shape[1])
    ranks, place = ranks - ranks.mean(axis=1, keepdims=True), place - place.mean()
    scale = np.sqrt((ranks**2).sum(axis=1) * (place**2).sum())
    return np.divide(ranks @ place, scale, out=np.zeros(len(values)), where=scale > 0)


def margin_follows_weight(
    rows: Sequence[Mapping[str, Any]], ends: Interval, margin_sign: Literal[-1, 1]
) -> dict[str, Any]:
    """Does the margin reward move with w in the direction that the role asks for?

    More weight on the preference leaves less for the margin m = `margin_sign` * margin_reward, so m should fall as w
    rises: margin_reward rises under `cost` (-1) and falls under `reward` and a length penalty (+1).

    Args:
        rows: of `summarize`.
        ends: margin_reward at the largest w minus that at the smallest, paired by prompt.
        margin_sign: the sign of the role.

    Keys of the result: verdict (True if the rank correlation of w and margin_reward and the whole interval of `ends`
    point the right way; None with fewer than two weights), rank_correlation (NaN where undefined), expected (`rises`
    or `falls`), weights, mean_margin_reward, n (prompts), ends_mean, ends_low, ends_high, sentence.
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
        return result | {
            "sentence": f"A direction takes at least two weights; here w is {', '.join(weights) or 'missing'}."
        }
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

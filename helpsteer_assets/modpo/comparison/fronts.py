"""The Pareto front of the policies, how sure it is, and how a measure moves with w.

Pure, seeded functions. Uncertainty comes from resampling prompts, as in `bootstrap`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from helpsteer_assets.modpo.comparison.bootstrap import (
    Floats,
    Interval,
    bootstrap_means,
    column_means,
    percentile_interval,
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


def front_with_uncertainty(goodness: Floats, samples: int, seed: int) -> FrontUncertainty:
    """The Pareto front of the policies' means of `goodness` [N, P, 2], one row per prompt, with its uncertainty.

    Both axes are maximised, and policy 0 is the SFT model. All policies share each resample of the prompts. Means that
    differ by rounding alone count as equal, and equal points stay on the front together. The reference of the
    hypervolume is the mean of SFT on the same prompts, so only paired differences count.

    The hypervolume is a maximum over noisy points: its expectation lies above the true area, and that of resamples is
    higher still, so a percentile interval can lie wholly above the truth. Where no policy is truly above the reference
    (the area is 0, the least possible) the bootstrap does not even converge to the right spread (Andrews,
    "Inconsistency of the Bootstrap when a Parameter is on the Boundary of the Parameter Space", 2000), and the basic
    interval of an estimate of 0 ends at 0. So each end is the more cautious one of the basic and the percentile
    interval (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2), and not below 0. In
    simulations with 40 and 120 prompts and one to six policies, apart, tied and at an area of 0, this interval
    contained the truth 93 to 100% of the time, the percentile interval 37 to 100%. A lower end above 0 says that some
    policy is better than the reference on both axes.

    Raises ValueError without rows, or where a value is NaN or infinite.
    """
    rows, policies, _ = goodness.shape
    flat = goodness.reshape(rows, 2 * policies)
    resampled = bootstrap_means(flat, samples, seed).reshape(samples, policies, 2)
    scale = np.abs(goodness).max(axis=(0, 1))
    scale[scale == 0] = 1.0
    mean = np.round(goodness.mean(axis=0) / scale, _DIGITS)
    resampled = np.round(resampled / scale, _DIGITS)
    estimate = float(_areas(mean - mean[0]) * scale.prod())
    areas = _areas(resampled - resampled[:, :1]) * scale.prod()
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


def monotonicity(weights: Sequence[float], values: Floats, samples: int, seed: int) -> Monotonicity:
    """How the means of `values` [N, W], one row per prompt and one column per weight, move with `weights` [W].

    There are at least two weights, and they ascend.

    Noise can only break an order that the means show, so the interval of a rank correlation of 1 reaches down from 1
    and tells how firm that order is. A resample in which all means are equal counts as rank correlation 0.
    Raises ValueError without rows, or where a value is NaN or infinite.
    """
    # In one memory order, so that sums round alike whatever the table was cut from.
    w, values = np.array(weights), np.asfortranarray(values)
    resampled = bootstrap_means(values, samples, seed)
    mean = column_means(values)
    line = (w - w.mean()) / ((w - w.mean()) ** 2).sum()
    slope = float((mean - mean[0]) @ line)
    # The slope of differences to the first weight: a constant measure then has a slope of 0 exactly.
    low, high = percentile_interval(((resampled - resampled[:, :1]) @ line)[:, None])
    scale = np.abs(values).max() or 1.0
    rounded: Floats = np.round(resampled / scale, _DIGITS).astype(np.float64)
    rank = float(_rank_correlations(np.round(mean / scale, _DIGITS).astype(np.float64)))
    rank_low, rank_high = percentile_interval(np.nan_to_num(_rank_correlations(rounded))[:, None])
    ranks = Interval(rank, float(rank_low[0]), float(rank_high[0]))
    return Monotonicity(
        Interval(rank, math.nan, math.nan) if math.isnan(rank) else ranks,
        Interval(slope, float(low[0]), float(high[0])),
        float((np.diff(rounded, axis=1) * np.sign(slope) > 0).all(axis=1).mean()),
    )


def _rank_correlations(values: Floats) -> Floats:
    """Spearman's correlation of each row of `values` [..., W] with its columns' order: [...]; NaN for a constant row.

    Equal values share the mean of their ranks.
    """
    one, other = values[..., :, None], values[..., None, :]
    ranks = (one > other).sum(axis=-1) + ((one == other).sum(axis=-1) + 1) / 2
    place = np.arange(values.shape[-1])
    ranks, place = ranks - ranks.mean(axis=-1, keepdims=True), place - place.mean()
    scale = np.sqrt((ranks**2).sum(axis=-1) * (place**2).sum())
    return np.divide(ranks @ place, scale, out=np.full(values.shape[:-1], math.nan), where=scale > 0)


def margin_follows_weight(
    means: Mapping[str, float], prompts: int, ends: Interval, margin_sign: Literal[-1, 1]
) -> dict[str, Any]:
    """Does the margin reward move with w in the direction that the role asks for?

    More weight on the preference leaves less for the margin m = `margin_sign` * margin_reward, so m should fall as w
    rises: margin_reward rises under `cost` (-1) and falls under `reward` and a length penalty (+1).

    Args:
        means: mean margin_reward by weight, ascending.
        prompts: how many prompts it was measured on.
        ends: margin_reward at the largest w minus that at the smallest, paired by prompt.
        margin_sign: the sign of the role.

    Keys of the result: verdict (True if the rank correlation of w and margin_reward and the whole interval of `ends`
    point the right way; None for one weight), rank_correlation (NaN where undefined), expected (`rises` or `falls`),
    weights, mean_margin_reward, n (prompts), ends_mean, ends_low, ends_high, sentence.
    """
    weights = list(means)
    correlation = float(_rank_correlations(np.array(list(means.values()))))
    role, expected = ("the role cost", "rises") if margin_sign == -1 else ("an encouraged margin", "falls")
    result = {
        "verdict": None,
        "rank_correlation": correlation,
        "expected": expected,
        "weights": weights,
        "mean_margin_reward": list(means.values()),
        "n": prompts,
        "ends_mean": ends.mean,
        "ends_low": ends.low,
        "ends_high": ends.high,
    }
    if len(weights) < 2:
        return result | {"sentence": f"A direction takes at least two weights; here w is {weights[0]}."}
    ranked = "undefined" if math.isnan(correlation) else f"{correlation:.2f}"
    numbers = (
        f"rank correlation {ranked} over {len(weights)} weights; from w={weights[0]} to w={weights[-1]} it changes by "
        f"{ends.mean:.3g}, 95% interval [{ends.low:.3g}, {ends.high:.3g}], {prompts} prompts"
    )
    low, high = sorted((-margin_sign * ends.low, -margin_sign * ends.high))
    if low > 0 and -margin_sign * correlation > 0:
        sentence = f"The margin reward {expected} with w, as {role} asks ({numbers})."
        return result | {"verdict": True, "sentence": sentence}
    seen = "does not do so clearly"
    if high < 0:
        seen = "moves against it"
    elif low > 0:
        seen = "does so between the ends only, not in order"
    sentence = (
        f"Under {role} the margin reward {expected} with w where the objective alone decides; here it {seen} "
        f"({numbers}). What may explain it: the two objectives are strongly correlated, which can turn the slope (the "
        "role promises a difference to the other role at equal w, no monotone movement with w); too little training "
        "(modpo.steps or epochs); too few prompts (evaluation.prompts) for the noise."
    )
    return result | {"verdict": False, "sentence": sentence}

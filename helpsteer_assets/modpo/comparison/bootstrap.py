"""Bootstrap intervals: pure, seeded functions on numpy arrays.

Uncertainty comes from the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapter 13). Prompts are resampled, because they are the unit that was drawn: two responses or two pairs of one prompt
are not independent. One call resamples all columns by the same draws, so that differences between policies are paired.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Coverage of every interval."""

_CHUNK_ELEMENTS = 4_000_000
"""Draws held in memory at once, whatever the number of rows and samples."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_means(values: ArrayLike, samples: int, seed: int) -> Floats:
    """Means of `samples` resamples of the rows of `values` [N, M]: [samples, M].

    All columns share each resample, so the difference of two columns' means is the mean of their paired difference.
    Raises ValueError without rows, or where a value is NaN or infinite.
    """
    table = np.asarray(values, dtype=np.float64)
    rows, columns = table.shape
    if not rows or not np.isfinite(table).all():
        raise ValueError("bootstrap_means wants rows of finite values")
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


def column_means(table: Floats) -> Floats:
    """Means [M] of the columns of `table` [N, M], exact for a constant column."""
    return table[0] + (table - table[0]).mean(axis=0)


def percentile_interval(means: Floats) -> tuple[Floats, Floats]:
    """Lower and upper ends [M] of the central 95% of resampled means [samples, M]."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def bootstrap_interval(values: ArrayLike, samples: int, seed: int) -> Interval:
    """Mean of `values` [N], one per prompt, and its 95% percentile interval. Raises as `bootstrap_means`."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    low, high = percentile_interval(bootstrap_means(column, samples, seed))
    return Interval(float(column_means(column)[0]), float(low[0]), float(high[0]))


def simultaneous_interval(estimates: Floats, resampled: Floats, rows: int) -> tuple[Floats, Floats, Floats]:
    """95% intervals that hold for all of several estimates at once, and p-values adjusted for their number.

    Args:
        estimates: [M], from `rows` rows.
        resampled: [samples, M], the same estimates of each resample; all share its draws.
        rows: how many rows were resampled.

    Returns:
        The lower ends, the upper ends and the p-values against 0, each [M].

    With se_j the bootstrap standard error, the interval is estimate_j -+ c se_j, where c is the 95% quantile of
    max_j |resampled_j - estimate_j| / se_j. The p-value is the share of resamples in which that maximum reaches
    |estimate_j| / se_j. This is the single-step max-|t| method of Westfall and Young, "Resampling-Based Multiple
    Testing", 1993, with the bootstrap as in Romano and Wolf, "Exact and Approximate Stepdown Methods for Multiple
    Hypothesis Testing", 2005. As estimates are drawn jointly, correlated ones cost less than by Bonferroni's rule. The
    bootstrap does not see that se_j is itself an estimate, so the maxima are stretched from the normal to Student's t
    distribution with rows - 1 degrees of freedom (Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964,
    26.7.5).

    In simulations with six independent estimates, at least one interval missed in 5 to 7% of trials for normal values
    and 20 to 300 rows, in at most 5% for rare values of -1 and 1, and for exponential values in 5 to 9% with 120 rows
    or more, but in 14 to 18% with 20 to 40: with so few rows a difference in a skewed measure is claimed too easily.

    An estimate that no resample moves has an interval of no width and takes no part in the maximum. Its p-value is that
    of M exact sign-flip tests (Bonferroni), min(1, M 2^(1 - rows)), because a few rows that agree prove little.
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
    half = np.where(moves, np.quantile(largest, LEVEL) * errors, 0.0)
    reached = np.abs(estimates[moves]) / errors[moves]
    p_values = same
    p_values[moves] = (1 + (largest[:, None] >= reached).sum(axis=0)) / (1 + len(largest))
    return estimates - half, estimates + half, p_values

"""The front, its uncertainty and the movement with w, against brute force, moocore, scipy and simulation."""

import math

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpsteer_assets.modpo.comparison import fronts
from helpsteer_assets.modpo.comparison.bootstrap import Interval, bootstrap_means

small = st.integers(-4, 4)
"""Few values, so that ties and duplicates happen."""


# The front


@settings(deadline=None)
@given(st.lists(st.tuples(small, small), min_size=1, max_size=12))
def test_front_and_hypervolume_agree_with_moocore(points: list[tuple[int, int]]) -> None:
    table = np.array([(-5, -6), *points], dtype=float)
    front = fronts.front_with_uncertainty(table[None], 10, 0)
    expected = moocore.is_nondominated(table, maximise=True, keep_weakly=True)
    assert front.on_front.tolist() == expected.tolist(), "equal points stay together"
    assert front.probability.tolist() == expected.astype(float).tolist()
    assert front.hypervolume.mean == pytest.approx(moocore.hypervolume(table, [-5, -6], maximise=True))


def scattered(seed: int, policies: int = 5, prompts: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = np.column_stack([np.linspace(0, 0.5, policies), np.full(policies, 0.1)])
    return rng.normal(means, 1, (prompts, policies, 2))


def test_probabilities_and_area_agree_with_a_loop_over_moocore() -> None:
    scores = scattered(1)
    front = fronts.front_with_uncertainty(scores, 300, 3)
    resampled = bootstrap_means(scores.reshape(30, 10), 300, 3).reshape(300, 5, 2)
    on = [moocore.is_nondominated(points, maximise=True, keep_weakly=True) for points in resampled]
    assert front.probability.tolist() == pytest.approx(np.mean(on, axis=0).tolist())
    areas = [moocore.hypervolume(points, points[0], maximise=True) for points in resampled]
    means = scores.mean(axis=0)
    estimate = moocore.hypervolume(means, means[0], maximise=True)
    low, high = np.quantile(areas, [0.025, 0.975])
    assert front.hypervolume.mean == pytest.approx(estimate)
    assert front.hypervolume.low == pytest.approx(max(0, min(low, 2 * estimate - high)))
    assert front.hypervolume.high == pytest.approx(max(high, 2 * estimate - low))


def test_scores_that_differ_by_rounding_alone_tie() -> None:
    ratings = np.random.default_rng(9).integers(0, 5, 40) / 10
    rounded = (ratings + 0.7) - 0.7
    assert (rounded != ratings).any()
    worse = np.column_stack([ratings - 0.1, ratings])
    scores = np.stack([np.column_stack([ratings, rounded]), np.column_stack([rounded, ratings]), worse], axis=1)
    front = fronts.front_with_uncertainty(scores, 200, 0)
    assert front.on_front.tolist() == [True, True, False] and front.probability.tolist() == [1, 1, 0]
    assert front.hypervolume.high == 0


# Movement with w


def test_slope_and_rank_correlation_are_scipys_and_their_intervals_those_of_a_loop() -> None:
    w = np.array([0.1, 0.3, 0.5, 0.9])
    table = np.random.default_rng(5).normal(w, 1.0, (25, 4)).round()  # means tie in some resamples
    moved = fronts.monotonicity(w.tolist(), table, 400, 6)
    means = table.mean(axis=0)
    assert moved.slope.mean == pytest.approx(stats.linregress(w, means).slope)
    assert moved.rank_correlation.mean == pytest.approx(stats.spearmanr(w, means).statistic)
    resampled = bootstrap_means(table, 400, 6).round(12)
    slopes = [stats.linregress(w, row).slope for row in resampled]
    ranks = [stats.spearmanr(w, row).statistic for row in resampled]
    assert (moved.slope.low, moved.slope.high) == pytest.approx(tuple(np.quantile(slopes, [0.025, 0.975])))
    low, high = np.quantile(ranks, [0.025, 0.975])
    assert (moved.rank_correlation.low, moved.rank_correlation.high) == pytest.approx((low, high))
    towards = np.sign(moved.slope.mean)
    monotone = np.mean([all(towards * step > 0 for step in np.diff(row)) for row in resampled])
    assert moved.share_of_resamples_monotone == pytest.approx(monotone)


def test_a_measure_that_never_moves_has_no_rank_correlation_and_is_not_monotone() -> None:
    flat = fronts.monotonicity([0.1, 0.9], np.full((10, 2), 0.1), 100, 0)
    assert math.isnan(flat.rank_correlation.mean) and math.isnan(flat.rank_correlation.low)
    assert flat.slope == Interval(0.0, 0.0, 0.0) and flat.share_of_resamples_monotone == 0


# Direction

RISING = {"0.1": -2.0, "0.3": -1.5, "0.5": -1.0, "0.9": -0.5}
FALLING = {w: -mean for w, mean in RISING.items()}


@pytest.mark.parametrize(
    ("means", "ends", "sign", "verdict", "said"),
    [
        (RISING, Interval(1.5, 1.0, 2.0), -1, True, "rises with w, as the role cost asks"),
        (FALLING, Interval(-1.5, -2.0, -1.0), 1, True, "falls with w"),
        (RISING, Interval(1.5, 1.0, 2.0), 1, False, "moves against it"),
        (RISING | {"0.3": 9.0, "0.5": -3.0, "0.9": 1.0}, Interval(3, 0.5, 4.0), -1, False, "between the ends only"),
        ({"0.1": 0.0}, Interval(0, 0, 0), -1, None, "at least two weights"),
    ],
)
def test_the_margin_reward_rises_with_w_under_cost_and_falls_under_reward(
    means: dict[str, float], ends: Interval, sign: int, verdict: bool | None, said: str
) -> None:
    direction = fronts.margin_follows_weight(means, 40, ends, sign)  # type: ignore[arg-type]
    assert direction["verdict"] is verdict
    assert said in direction["sentence"]
    assert verdict is None or "40 prompts" in direction["sentence"]

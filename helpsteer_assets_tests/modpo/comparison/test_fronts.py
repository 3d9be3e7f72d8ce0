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
point_lists = st.lists(st.tuples(small, small), min_size=1, max_size=12)


# The front


@settings(deadline=None)
@given(point_lists, st.tuples(st.booleans(), st.booleans()))
def test_front_and_hypervolume_agree_with_moocore(points: list[tuple[int, int]], larger: tuple[bool, bool]) -> None:
    points = [(-5, -6), *points]
    x, y = (np.array([values], dtype=float) for values in zip(*points, strict=True))
    signs = np.where(larger, 1, -1)
    found = fronts.front_with_uncertainty(signs[0] * x, signs[1] * y, 0, larger, 10, 0)
    table = np.array(points, dtype=float)
    expected = moocore.is_nondominated(table, maximise=True, keep_weakly=True)
    assert found.on_front.tolist() == expected.tolist(), "equal points stay together"
    assert found.probability.tolist() == expected.astype(float).tolist()
    assert found.hypervolume.mean == pytest.approx(moocore.hypervolume(table, [-5, -6], maximise=True))


def resampled_by_hand(x: np.ndarray, y: np.ndarray, samples: int, seed: int) -> tuple[list[float], list[float]]:
    """Share of resamples on the front, and hypervolumes above policy 0, by a loop over moocore."""
    policies = x.shape[1]
    means = bootstrap_means(np.hstack([x, y]), samples, seed)
    on, areas = np.zeros(policies), []
    for row in means:
        points = np.column_stack([row[:policies], row[policies:]])
        on += moocore.is_nondominated(points, maximise=True, keep_weakly=True)
        areas.append(moocore.hypervolume(points, points[0], maximise=True))
    return (on / samples).tolist(), areas


def scattered(seed: int, policies: int = 5, prompts: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(np.linspace(0, 0.5, policies), 1, (prompts, policies)), rng.normal(0.1, 1, (prompts, policies))


def test_probabilities_and_area_agree_with_a_loop_over_moocore() -> None:
    x, y = scattered(1)
    found = fronts.front_with_uncertainty(x, y, 0, (True, True), 300, 3)
    probabilities, areas = resampled_by_hand(x, y, 300, 3)
    assert found.probability.tolist() == pytest.approx(probabilities)
    means = np.column_stack([x.mean(0), y.mean(0)])
    assert found.on_front.tolist() == moocore.is_nondominated(means, maximise=True, keep_weakly=True).tolist()
    estimate = moocore.hypervolume(means, means[0], maximise=True)
    low, high = np.quantile(areas, [0.025, 0.975])
    assert found.hypervolume.mean == pytest.approx(estimate)
    assert found.hypervolume.low == pytest.approx(max(0, min(low, 2 * estimate - high)))
    assert found.hypervolume.high == pytest.approx(max(high, 2 * estimate - low))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.tuples(st.booleans(), st.booleans()))
def test_the_front_turns_with_its_axes_and_ignores_what_all_policies_share(
    seed: int, larger: tuple[bool, bool]
) -> None:
    x, y = scattered(seed)
    found = fronts.front_with_uncertainty(x, y, 2, larger, 100, seed)
    swapped = fronts.front_with_uncertainty(y, x, 2, larger[::-1], 100, seed)
    turned = fronts.front_with_uncertainty(-x, y, 2, (not larger[0], larger[1]), 100, seed)
    hard_prompts = np.random.default_rng(seed).normal(0, 9, (len(x), 1))
    shifted = fronts.front_with_uncertainty(x + hard_prompts, y - 3, 2, larger, 100, seed)
    for other in (swapped, turned, shifted):
        assert other.on_front.tolist() == found.on_front.tolist()
        assert other.probability.tolist() == found.probability.tolist()
        assert tuple(vars(other.hypervolume).values()) == pytest.approx(tuple(vars(found.hypervolume).values()))


def test_policies_with_the_same_scores_are_on_the_front_together() -> None:
    rng = np.random.default_rng(2)
    ratings = rng.integers(0, 5, (33, 1)) / 3
    margins = rng.normal(size=(33, 1))
    x = np.hstack([ratings, ratings - rng.random((33, 1)), ratings])
    y = np.hstack([margins, margins - 0.1, margins])
    found = fronts.front_with_uncertainty(x, y, 0, (True, True), 500, 0)
    assert found.on_front.tolist() == [True, False, True]
    assert found.probability.tolist() == [1, 0, 1]
    assert found.hypervolume == Interval(0.0, 0.0, 0.0)


def test_scores_that_differ_by_rounding_alone_tie() -> None:
    ratings = np.random.default_rng(9).integers(0, 5, (40, 1)) / 10
    rounded = (ratings + 0.7) - 0.7
    assert (rounded != ratings).any()
    x, y = np.hstack([ratings, rounded]), np.hstack([rounded, rounded + 0.7 - 0.7])
    found = fronts.front_with_uncertainty(x, y, 0, (True, True), 200, 0)
    assert found.on_front.all() and found.probability.tolist() == [1, 1] and found.hypervolume.high == 0


def test_a_policy_on_the_verge_is_on_the_front_in_about_half_of_the_resamples() -> None:
    noise = np.random.default_rng(3).normal(size=400)
    noise -= noise.mean()
    x = np.column_stack([np.zeros(400), noise])
    found = fronts.front_with_uncertainty(x, np.zeros((400, 2)), 0, (True, True), 4000, 0)
    assert found.probability[1] == pytest.approx(0.5, abs=0.05)


def test_the_interval_of_the_hypervolume_covers_the_true_area() -> None:
    rng = np.random.default_rng(4)
    w = np.linspace(0, 1, 5)
    scenes = {
        "apart": (np.column_stack([w, 1 - w]), 0.375),
        "tied": (np.full((5, 2), 0.1), 0.01),
        "none above": (np.column_stack([w - 0.5, 0.5 - w]), 0.0),
    }
    for name, (truth, area) in scenes.items():
        covered = 0
        for trial in range(100):
            base = rng.normal(size=(60, 1, 2))
            scores = np.concatenate([base, base + truth + rng.normal(size=(60, 5, 2))], axis=1)
            found = fronts.front_with_uncertainty(scores[:, :, 0], scores[:, :, 1], 0, (True, True), 200, trial)
            covered += found.hypervolume.low <= area <= found.hypervolume.high
        assert covered >= 92, name


def test_scores_that_make_no_front_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \[prompts, policies\]"):
        fronts.front_with_uncertainty(np.zeros((3, 2)), np.zeros((3, 1)), 0, (True, True), 10, 0)
    with pytest.raises(ValueError, match="no rows"):
        fronts.front_with_uncertainty(np.zeros((0, 2)), np.zeros((0, 2)), 0, (True, True), 10, 0)
    alone = fronts.front_with_uncertainty(np.ones((3, 1)), np.ones((3, 1)), 0, (True, True), 10, 0)
    assert alone.on_front.tolist() == [True] and alone.hypervolume.high == 0


# Movement with w


def test_slope_and_rank_correlation_are_scipys_and_their_intervals_those_of_a_loop() -> None:
    rng = np.random.default_rng(5)
    weights = [0.9, 0.1, 0.3, 0.5]
    table = rng.normal(np.array(weights), 1.0, (25, 4))
    found = fronts.monotonicity(weights, table, 400, 6)
    means = table.mean(axis=0)
    assert found.slope.mean == pytest.approx(stats.linregress(weights, means).slope)
    assert found.rank_correlation.mean == pytest.approx(stats.spearmanr(weights, means).statistic)
    order = np.argsort(weights)
    resampled = bootstrap_means(table[:, order], 400, 6)
    w = np.array(weights)[order]
    slopes = [stats.linregress(w, row).slope for row in resampled]
    ranks = [stats.spearmanr(w, row).statistic for row in resampled]
    assert (found.slope.low, found.slope.high) == pytest.approx(tuple(np.quantile(slopes, [0.025, 0.975])))
    assert (found.rank_correlation.low, found.rank_correlation.high) == pytest.approx(
        tuple(np.quantile(ranks, [0.025, 0.975]))
    )
    towards = np.sign(found.slope.mean)
    monotone = np.mean([all(towards * step > 0 for step in np.diff(row)) for row in resampled])
    assert found.share_of_resamples_monotone == pytest.approx(monotone)


def test_a_clear_movement_is_monotone_in_every_resample_and_its_mirror_image_too() -> None:
    table = np.random.default_rng(8).normal(size=(50, 1)) + np.array([1.0, 2.0, 4.0])
    rising = fronts.monotonicity([0.1, 0.5, 0.9], table, 200, 0)
    assert rising.rank_correlation == Interval(1.0, 1.0, 1.0) and rising.share_of_resamples_monotone == 1
    assert (rising.slope.low, rising.slope.high) == pytest.approx((3.75, 3.75))
    falling = fronts.monotonicity([0.1, 0.5, 0.9], -table, 200, 0)
    assert falling.rank_correlation.mean == -1 and falling.share_of_resamples_monotone == 1


def test_a_measure_that_never_moves_has_no_rank_correlation_and_is_not_monotone() -> None:
    flat = fronts.monotonicity([0.1, 0.9], np.full((10, 2), 0.1), 100, 0)
    assert math.isnan(flat.rank_correlation.mean) and math.isnan(flat.rank_correlation.low)
    assert flat.slope == Interval(0.0, 0.0, 0.0) and flat.share_of_resamples_monotone == 0
    for weights, columns in (([0.5], 1), ([0.5, 0.5], 2)):
        with pytest.raises(ValueError, match="at least two weights that differ"):
            fronts.monotonicity(weights, np.zeros((4, columns)), 10, 0)
    with pytest.raises(ValueError, match="one column per weight"):
        fronts.monotonicity([0.1, 0.2], np.zeros((4, 3)), 10, 0)


# Direction


def rows_of(**mean_by_weight: float) -> list[dict]:
    rows = [{"policy": "sft", "w": None, "measure": "margin_reward", "mean": 9.0, "n": 40}]
    for name, mean in mean_by_weight.items():
        row = {"policy": "modpo", "w": name.replace("w", "0."), "n": 40, "mean": mean}
        rows += [row | {"measure": "margin_reward"}, row | {"measure": "response_words", "mean": -mean}]
    return rows


def test_under_cost_the_margin_reward_rises_with_w_and_under_reward_it_falls() -> None:
    rows = rows_of(w9=-0.5, w1=-2.0, w5=-1.0)
    rising = fronts.margin_follows_weight(rows, Interval(1.5, 1.0, 2.0), -1)
    assert rising["verdict"] is True and rising["rank_correlation"] == 1
    assert rising["weights"] == ["0.1", "0.5", "0.9"] and rising["mean_margin_reward"] == [-2.0, -1.0, -0.5]
    assert "rises with w, as the role cost asks" in rising["sentence"] and "40 prompts" in rising["sentence"]
    against = fronts.margin_follows_weight(rows, Interval(1.5, 1.0, 2.0), 1)
    assert against["verdict"] is False and "moves against it" in against["sentence"]
    for explanation in ("correlated", "training", "prompts"):
        assert explanation in against["sentence"]
    falling = fronts.margin_follows_weight(rows_of(w1=2.0, w9=1.0), Interval(-1, -1.5, -0.5), 1)
    assert falling["verdict"] is True and falling["expected"] == "falls"


def test_an_unclear_movement_does_not_pass() -> None:
    unclear = fronts.margin_follows_weight(rows_of(w1=0.0, w9=0.1), Interval(0.1, -0.2, 0.4), -1)
    assert unclear["verdict"] is False and "not do so clearly" in unclear["sentence"]
    only_ends = fronts.margin_follows_weight(
        rows_of(w1=0.0, w2=4.0, w3=3.0, w8=-2.0, w9=1.0), Interval(1, 0.5, 1.5), -1
    )
    assert only_ends["verdict"] is False and "between the ends only" in only_ends["sentence"]


def test_one_weight_has_no_direction() -> None:
    single = fronts.margin_follows_weight(rows_of(w1=0.0), Interval(0, 0, 0), -1)
    assert single["verdict"] is None and "at least two weights" in single["sentence"]

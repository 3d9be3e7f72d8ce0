"""The front, its uncertainty and the movement with w, against brute force, moocore, scipy and simulation."""

import itertools
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


# Front and hypervolume


@settings(deadline=None)
@given(point_lists, st.tuples(st.booleans(), st.booleans()))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]], larger: tuple[bool, bool]) -> None:
    def goodness(point: tuple[int, int]) -> tuple[int, int]:
        return tuple(v if up else -v for v, up in zip(point, larger, strict=True))  # type: ignore[return-value]

    expected = []
    for point in points:
        x, y = goodness(point)
        expected.append(not any(a >= x and b >= y and (a > x or b > y) for a, b in map(goodness, points)))
    assert fronts.pareto_front(points, larger).tolist() == expected


def test_equal_points_both_stay_on_the_front() -> None:
    assert fronts.pareto_front([[1, 1], [1, 1], [0, 1]], (True, True)).tolist() == [True, True, False]
    assert fronts.pareto_front([[1, 1], [1, 1], [0, 1]], (False, True)).tolist() == [False, False, True]


@settings(deadline=None)
@given(point_lists, st.tuples(small, small))
def test_the_hypervolume_counts_the_dominated_unit_squares(
    points: list[tuple[int, int]], reference: tuple[int, int]
) -> None:
    squares = {
        (x, y) for px, py in points for x, y in itertools.product(range(reference[0], px), range(reference[1], py))
    }
    assert fronts.hypervolume(points, reference) == len(squares)


def test_the_hypervolume_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(11)
    points, darts = rng.random((6, 2)), rng.random((100_000, 2))
    hit = (darts[:, None] <= points[None]).all(axis=2).any(axis=1).mean()
    assert fronts.hypervolume(points, [0, 0]) == pytest.approx(hit, abs=0.01)
    with pytest.raises(ValueError, match="NaN"):
        fronts.hypervolume([[0.1, math.nan]], [0, 0])


@settings(deadline=None)
@given(point_lists)
def test_front_and_hypervolume_agree_with_moocore(points: list[tuple[int, int]]) -> None:
    table = np.array(points, dtype=float)
    expected = moocore.is_nondominated(table, maximise=True, keep_weakly=True)
    assert fronts.pareto_front(points, (True, True)).tolist() == expected.tolist()
    assert fronts.hypervolume(points, [-5, -6]) == pytest.approx(moocore.hypervolume(table, [-5, -6], maximise=True))


# Uncertainty


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
    assert (
        found.on_front.tolist() == fronts.pareto_front(np.column_stack([x.mean(0), y.mean(0)]), (True, True)).tolist()
    )
    estimate = fronts.hypervolume(np.column_stack([x.mean(0), y.mean(0)]), [x[:, 0].mean(), y[:, 0].mean()])
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


def test_the_interval_of_the_hypervolume_covers_where_the_percentile_interval_does_not() -> None:
    rng = np.random.default_rng(4)
    w = np.linspace(0, 1, 5)
    scenes = {
        "apart": (np.column_stack([w, 1 - w]), 0.375),
        "tied": (np.full((5, 2), 0.1), 0.01),
        "none above": (np.column_stack([w - 0.5, 0.5 - w]), 0.0),
    }
    percentile = {}
    for name, (truth, area) in scenes.items():
        covered = naive = 0
        for trial in range(100):
            base = rng.normal(size=(60, 1, 2))
            scores = np.concatenate([base, base + truth + rng.normal(size=(60, 5, 2))], axis=1)
            x, y = scores[:, :, 0], scores[:, :, 1]
            found = fronts.front_with_uncertainty(x, y, 0, (True, True), 200, trial).hypervolume
            covered += found.low <= area <= found.high
            means = bootstrap_means(np.hstack([x, y]), 200, trial)
            areas = fronts._areas(np.stack([means[:, :6] - means[:, :1], means[:, 6:] - means[:, 6:7]], axis=2))
            naive += np.quantile(areas, 0.025) <= area <= np.quantile(areas, 0.975)
        assert covered >= 92, name
        percentile[name] = naive
    assert percentile["tied"] < 70


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


def test_the_slope_resamples_as_scipys_bootstrap_does() -> None:
    weights = [0.1, 0.5, 0.9]
    table = np.random.default_rng(7).normal(np.array(weights), 1.0, (60, 3))
    found = fronts.monotonicity(weights, table, 4000, 0).slope

    def slope(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
        return (c.mean(axis=axis) - a.mean(axis=axis)) / 0.8

    expected = stats.bootstrap(
        tuple(table.T), slope, paired=True, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


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

"""Intervals against closed forms, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from helpsteer_assets.modpo.comparison import bootstrap
from helpsteer_assets.modpo.comparison.bootstrap import (
    bootstrap_interval,
    bootstrap_means,
    percentile_interval,
    simultaneous_interval,
)


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = bootstrap_interval(values, samples=4000, seed=0)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_seed_fixes_the_resamples_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=(30, 3))
    whole = bootstrap_means(values, samples=100, seed=6)
    assert (bootstrap_means(values, samples=100, seed=7) != whole).any()
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * 30)
    assert bootstrap_means(values, samples=100, seed=6) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0], [1.0, math.nan]]])
def test_values_without_rows_or_with_gaps_are_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="rows of finite values"):
        bootstrap_means(np.array(values).reshape(len(values), 2), 10, 0)


def simultaneous(values: np.ndarray, samples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means = bootstrap_means(values, samples, seed)
    return simultaneous_interval(values.mean(axis=0), means, len(values))


def test_simultaneous_intervals_hold_together_as_often_as_they_say_and_pointwise_ones_do_not() -> None:
    rng = np.random.default_rng(20)
    together = pointwise = 0
    for trial in range(300):
        shared = rng.normal(size=(60, 1))
        values = 0.6 * shared + rng.normal(size=(60, 6)) ** 3 / 4
        low, high, _ = simultaneous(values, 400, trial)
        together += bool(((low <= 0) & (high >= 0)).all())
        low, high = percentile_interval(bootstrap_means(values, 400, trial))
        pointwise += bool(((low <= 0) & (high >= 0)).all())
    assert 0.90 <= together / 300 <= 0.99
    assert pointwise / 300 < 0.86


def test_one_simultaneous_interval_is_an_ordinary_one_and_agrees_with_scipys_t_interval() -> None:
    values = np.random.default_rng(21).normal(1.0, 2.0, size=(200, 1))
    low, high, p_value = simultaneous(values, 20_000)
    expected = stats.ttest_1samp(values[:, 0], 0.0)
    interval = expected.confidence_interval()
    assert low[0] == pytest.approx(interval.low, abs=0.03)
    assert high[0] == pytest.approx(interval.high, abs=0.03)
    assert p_value[0] == pytest.approx(expected.pvalue, abs=0.01)


def test_a_column_that_never_moves_has_no_width_and_counts_as_agreeing_prompts() -> None:
    values = np.column_stack([np.full(8, 0.3), np.zeros(8), np.random.default_rng(24).normal(size=8)])
    low, high, p_values = simultaneous(values)
    assert (low[0], high[0], low[1], high[1]) == pytest.approx((0.3, 0.3, 0, 0))
    assert p_values[0] == pytest.approx(3 * stats.binomtest(8, 8).pvalue) and p_values[1] == 1
    moving = simultaneous(values[:, 2:])
    assert (low[2], high[2], p_values[2]) == pytest.approx((moving[0][0], moving[1][0], moving[2][0]))
    assert simultaneous(np.full((3, 2), 0.3))[2].tolist() == [0.5, 0.5]

"""Differences at equal length, on data whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from helpsteer_assets.modpo.comparison.differences import Measure
from helpsteer_assets.modpo.comparison.length import EqualLength, at_equal_length
from helpsteer_assets.modpo.comparison.scores import PolicyScores
from helpsteer_assets_tests.modpo.comparison.policies import policy

RATING = Measure("helpfulness", "rated helpfulness", "0 to 4", "higher")


def scores(w: str | None, helpfulness: np.ndarray, tokens: np.ndarray) -> PolicyScores:
    return policy(w, helpfulness=helpfulness, response_tokens=tokens)


def changed(
    seed: int, prompts: int, *, gain: float, per_token: float, longer: float = 10.0
) -> tuple[PolicyScores, PolicyScores]:
    """SFT and a policy whose rating is SFT's + gain + per_token * (change of length) + noise."""
    rng = np.random.default_rng(seed)
    tokens, rating = rng.integers(50, 150, prompts).astype(float), rng.normal(2, 1, prompts)
    more = rng.normal(longer, 20, prompts).round()
    after = rating + gain + per_token * more + rng.normal(0, 0.3, prompts)
    return scores(None, rating, tokens), scores("0.3", after, tokens + more)


def compare(*policies: PolicyScores, seed: int = 0, samples: int = 400) -> list[EqualLength]:
    return at_equal_length(policies, RATING, samples, seed)


def test_the_line_is_that_of_scipy_and_its_interval_about_as_wide() -> None:
    sft, other = changed(1, 50, gain=0.2, per_token=0.02)
    (answer,) = compare(sft, other)
    x = other.measures["response_tokens"] - sft.measures["response_tokens"]
    y = other.measures["helpfulness"] - sft.measures["helpfulness"]
    expected = stats.linregress(x, y)
    assert answer.adjusted is not None
    assert (answer.adjusted.mean, answer.per_token) == pytest.approx((expected.intercept, expected.slope))
    assert answer.raw == pytest.approx(y.mean())
    assert answer.adjusted.high - answer.adjusted.low == pytest.approx(2 * 1.96 * expected.intercept_stderr, rel=0.3)


def test_a_gain_that_is_length_alone_goes_and_one_that_is_not_stays() -> None:
    sft, lengthened = changed(2, 200, gain=0.0, per_token=0.02, longer=20)
    (answer,) = compare(sft, lengthened)
    assert answer.raw > 0.3 and answer.adjusted is not None
    assert answer.adjusted.low < 0 < answer.adjusted.high
    assert "at equal length rated helpfulness is not shown to differ from SFT's" in answer.sentence
    sft, improved = changed(3, 200, gain=0.4, per_token=-0.02, longer=20)
    (answer,) = compare(sft, improved)
    assert abs(answer.raw) < 0.1 and answer.adjusted is not None
    assert answer.adjusted.low < 0.4 < answer.adjusted.high and answer.adjusted.low > 0.2
    assert "w=0.3: at equal length rated helpfulness is higher than SFT's (0.39 points [0.33, 0.46]" in answer.sentence
    assert answer.close is not None and answer.close.low > 0.1 and answer.verdict == "higher"


def test_only_responses_within_a_tenth_of_each_others_length_are_close() -> None:
    tokens = np.full(24, 100.0)
    other = np.array([100, 90, 110, 111.0] * 6)  # 90 is a tenth shorter than 100, 100 almost a tenth than 110 and 111
    rating = np.where(other == 111, 5.0, 1.0)
    (answer,) = compare(scores(None, np.zeros(24), tokens), scores("0.3", rating, other))
    assert answer.close_prompts == 24 and answer.close is not None
    (answer,) = compare(scores(None, np.zeros(24), tokens), scores("0.3", rating, other + np.where(other == 111, 1, 0)))
    assert answer.close_prompts == 18 and answer.close is not None and answer.close.mean == 1


def test_without_enough_change_of_length_there_is_no_line_and_no_claim() -> None:
    sft, other = changed(4, 9, gain=0.2, per_token=0.0)
    (few,) = compare(sft, other)
    assert few.adjusted is None and few.per_token is None and few.close is None
    assert few.verdict == "undecided" and "9 responses changed their length, too few to tell more" in few.sentence
    tokens, rating = np.arange(20.0), np.zeros(20)
    (same,) = compare(scores(None, rating, tokens), scores("0.3", rating + 1, tokens))
    assert same.adjusted is None and same.close is not None and same.close.low == same.close.high == 1
    assert "over the 20 prompts whose lengths differ by a tenth at most: 1 points [1, 1]" in same.sentence
    (moved,) = compare(scores(None, rating, tokens), scores("0.3", rating + 1, tokens + 7))
    assert moved.adjusted is None and "20 responses changed their length, all by the same" in moved.sentence


def test_a_line_beyond_what_was_seen_says_that_it_extrapolates() -> None:
    (far,) = compare(*changed(5, 60, gain=0.0, per_token=0.01, longer=200))
    assert far.extrapolated and "this is extrapolated" in far.sentence
    (near,) = compare(*changed(5, 60, gain=0.0, per_token=0.01))
    assert not near.extrapolated and "extrapolated" not in near.sentence

"""Scores of policies are paired by prompt, summarized, and refused where they cannot be compared."""

import math

import numpy as np
import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.scores import PolicyScores, score_table, summarize
from helpsteer_assets_tests.modpo.comparison.policies import policy, shuffled


def test_a_summary_holds_means_spread_and_paired_differences() -> None:
    rng = np.random.default_rng(8)
    base = rng.normal(0, 5, size=60)
    sft = policy(None, margin_reward=base, words=[10.0] * 60)
    shifted = policy("0.5", margin_reward=base + 1 + rng.normal(0, 0.1, 60), words=[12.0] * 60)
    rows = {(r["w"], r["measure"]): r for r in summarize([sft, shifted], samples=1000, seed=0)}
    assert set(rows) == {(None, "margin_reward"), (None, "words"), ("0.5", "margin_reward"), ("0.5", "words")}
    row = rows["0.5", "margin_reward"]
    assert list(row) == [
        "policy", "w", "measure", "n", "mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high",
    ]  # fmt: skip
    values = shifted.measures["margin_reward"]
    assert (row["policy"], row["n"]) == ("modpo", 60)
    assert row["mean"] == pytest.approx(values.mean())
    assert row["sd"] == pytest.approx(values.std(ddof=1))
    assert row["ci_low"] < row["mean"] < row["ci_high"]
    assert row["delta"] == pytest.approx((values - base).mean())
    # Paired: the prompts' spread of 5 is no part of the difference's uncertainty.
    assert row["delta_high"] - row["delta_low"] < 0.1 * (row["ci_high"] - row["ci_low"])
    assert rows["0.5", "words"]["delta_low"] == rows["0.5", "words"]["delta_high"] == 2.0
    own = rows[None, "margin_reward"]
    assert (own["policy"], own["delta"], own["delta_low"], own["delta_high"]) == ("sft", None, None, None)
    assert summarize([policy(None, m=[2.0])], 100, 0)[0]["sd"] is None
    assert summarize([shuffled(sft, 1), shuffled(shifted, 2)], 1000, 0) == list(rows.values())


def test_a_score_table_pairs_policies_by_prompt_id() -> None:
    sft, other = policy(None, m=[1, 2], k=[5, 6]), policy("0.2", m=[3, 4], k=[7, 8])
    assert score_table([sft, shuffled(other, 1)], ["k", "m"]).tolist() == [[[5, 1], [7, 3]], [[6, 2], [8, 4]]]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([policy("0.2", m=[1, 2])], "w=0.2 and SFT are for different prompts"),
        ([PolicyScores("modpo", "0.2", ["p0000", "p0001", "p0001"], {"m": np.zeros(3)})], "different prompts"),
        ([policy("0.2", m=[1, math.nan, math.inf])], "w=0.2: m is missing or not finite"),
        ([policy("0.2", other=[1, 2, 3])], "w=0.2: m is missing"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused_by_name(others: list[PolicyScores], message: str) -> None:
    with pytest.raises(HelpsteerError, match=message):
        score_table([policy(None, m=[1, 2, 3]), *others], ["m"])

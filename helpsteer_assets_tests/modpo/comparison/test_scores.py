"""Scores of policies are paired by prompt, summarized, and refused where they cannot be compared."""

import math

import numpy as np
import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.scores import (
    PolicyScores,
    paired_difference,
    reference_and_weights,
    score_table,
    summarize,
)


def policy(w: str | None, **measures: list[float]) -> PolicyScores:
    prompts = len(next(iter(measures.values())))
    arrays = {name: np.array(values, dtype=float) for name, values in measures.items()}
    return PolicyScores("sft" if w is None else "modpo", w, [f"p{i:03d}" for i in range(prompts)], arrays)


def test_a_summary_holds_means_spread_and_paired_differences() -> None:
    rng = np.random.default_rng(8)
    base = rng.normal(0, 5, size=60)
    sft = policy(None, margin_reward=base.tolist(), words=[10.0] * 60)
    shifted = policy("0.5", margin_reward=(base + 1 + rng.normal(0, 0.1, 60)).tolist(), words=[12.0] * 60)
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
    ends = paired_difference(shifted, sft, "margin_reward", 1000, 0)
    assert (ends.mean, ends.low, ends.high) == pytest.approx((row["delta"], row["delta_low"], row["delta_high"]))


def test_a_summary_matches_prompts_by_id_and_does_not_depend_on_row_order() -> None:
    rng = np.random.default_rng(9)
    sft = policy(None, m=rng.normal(size=20).tolist())
    other = policy("0.1", m=rng.normal(size=20).tolist())
    order = rng.permutation(20)
    shuffled = PolicyScores("modpo", "0.1", [other.prompt_ids[i] for i in order], {"m": other.measures["m"][order]})
    assert summarize([sft, shuffled], 200, 0) == summarize([sft, other], 200, 0)


def test_scores_that_cannot_be_compared_are_refused_by_name() -> None:
    sft = policy(None, m=[1.0, 2.0, 3.0])
    with pytest.raises(HelpsteerError, match=r"modpo w=0.2 lacks 1 of the 3 prompts of sft and has 0 others"):
        summarize([sft, policy("0.2", m=[1.0, 2.0])], 100, 0)
    with pytest.raises(HelpsteerError, match="no scores of the SFT model"):
        summarize([policy("0.2", m=[1.0])], 100, 0)
    with pytest.raises(HelpsteerError, match=r"scores of modpo w=0.2: m is missing or not finite for 2 of 3 prompts"):
        summarize([sft, policy("0.2", m=[1.0, math.nan, math.inf])], 100, 0)
    with pytest.raises(HelpsteerError, match=r"scores of modpo w=0.2 lack m"):
        summarize([sft, policy("0.2", other=[1.0, 2.0, 3.0])], 100, 0)
    twice = PolicyScores("modpo", "0.3", ["p000", "p001", "p001"], {"m": np.zeros(3)})
    with pytest.raises(HelpsteerError, match=r"scores of modpo w=0.3: 1 prompts occur more than once"):
        paired_difference(twice, sft, "m", 100, 0)


def test_a_score_table_pairs_policies_by_prompt_id() -> None:
    sft, other = policy(None, m=[1.0, 2.0], k=[5.0, 6.0]), policy("0.2", m=[3.0, 4.0], k=[7.0, 8.0])
    turned = PolicyScores("modpo", "0.2", other.prompt_ids[::-1], {n: v[::-1] for n, v in other.measures.items()})
    table = score_table([sft, turned], ["k", "m"])
    assert table.tolist() == [[[5, 1], [7, 3]], [[6, 2], [8, 4]]]
    with pytest.raises(HelpsteerError, match="lack other"):
        score_table([sft, turned], ["other"])
    with pytest.raises(HelpsteerError, match="no prompts"):
        score_table([PolicyScores("sft", None, [], {"m": np.zeros(0)})], ["m"])


def test_the_reference_is_told_from_the_weights_which_ascend_as_numbers() -> None:
    policies = [policy("0.9", m=[1.0]), policy("1", m=[1.0]), policy(None, m=[1.0]), policy("0.25", m=[1.0])]
    reference, compared = reference_and_weights(policies)
    assert reference.w is None and [scores.w for scores in compared] == ["0.25", "0.9", "1"]

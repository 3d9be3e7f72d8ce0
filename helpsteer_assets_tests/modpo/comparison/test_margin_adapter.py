"""The margin adapter: how well it ranks pairs, and whether it measures more than length, where the answer is known."""

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.bootstrap import bootstrap_interval
from helpsteer_assets.modpo.comparison.margin_adapter import (
    WORST_FAILURES,
    judge_margin_adapter,
    judge_pairs,
    margin_adapter_quality,
    sanity_metrics,
)


def judged(margins: list[float] | np.ndarray, groups: list[str] | None = None, samples: int = 500) -> dict[str, Any]:
    """Sanity metrics of pairs, by default each of a prompt of its own."""
    return sanity_metrics(margins, groups or [f"p{i:03d}" for i in range(len(margins))], samples, 0)


def test_sanity_metrics_count_wins_ties_and_means() -> None:
    metrics = judged([2.0, 1.0, 0.0, -1.0])
    assert (metrics["n"], metrics["groups"], metrics["ties"]) == (4, 4, 1)
    assert (metrics["accuracy"], metrics["mean_margin"]) == (0.625, 0.5)
    assert metrics["margin_low"] < 0.5 < metrics["margin_high"]
    assert metrics["margin_sd"] == pytest.approx(np.std([2, 1, 0, -1], ddof=1))
    with pytest.raises(HelpsteerError, match="margin of 1 of 2 validation pairs is NaN"):
        judged([1.0, math.nan])


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    rng = np.random.default_rng(12)
    per_prompt = rng.normal(size=30)
    margins, groups = np.repeat(per_prompt, 10), [f"p{i}" for i in np.repeat(range(30), 10)]
    apart = judged(margins, samples=2000)
    together = judged(margins, groups, 2000)
    # Ten copies of a pair say no more than one: the honest interval is that of the 30 prompts.
    honest = bootstrap_interval(per_prompt, 2000, 0)
    width = together["margin_high"] - together["margin_low"]
    assert together["groups"] == 30
    assert width == pytest.approx(honest.high - honest.low, rel=0.1)
    assert width > 2.5 * (apart["margin_high"] - apart["margin_low"])


@pytest.mark.parametrize(
    ("margins", "threshold", "reasons"),
    [
        ([3.0, 2.0, 1.0] * 70, 0.5, []),
        ([3.0, 2.0, -1.0] * 70, 0.99, ["66.7% of 210 .* 99.0%"]),
        ([-3.0, -2.0, 1.0] * 70, 0.5, ["margin_adapter_min_accuracy", "does not lie above 0"]),
        ([], 0.5, ["n = 0"]),
    ],
)
def test_a_good_adapter_passes_and_a_bad_one_is_told_why(
    margins: list[float], threshold: float, reasons: list[str]
) -> None:
    given = judge_margin_adapter(judged(margins), threshold)
    assert len(given) == len(reasons)
    assert all(re.search(reason, sentence) for reason, sentence in zip(reasons, given, strict=True))


def test_pairs_are_judged_by_the_adapters_own_reward_and_the_worst_are_shown() -> None:
    def judge(differences: list[float]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        names = ("prompt_id", "prompt", "chosen_id", "rejected_id", "chosen", "rejected")
        pairs = pa.table({name: [f"{name} {i}" for i in range(len(differences))] for name in names})
        ratios = {f"chosen_id {i}": 7.0 + d for i, d in enumerate(differences)}
        ratios |= {f"rejected_id {i}": 7.0 for i in range(len(differences))}
        return judge_pairs(pairs, ratios, beta=0.5, samples=200, seed=0)

    metrics, failures = judge([4.0, -2.0, -6.0, 0.0, 8.0])
    assert metrics["accuracy"] == 0.5 and metrics["mean_margin"] == pytest.approx(0.5 * 0.8)
    assert [(row["prompt"], row["margin"]) for row in failures] == [("prompt 2", -3.0), ("prompt 1", -1.0)]
    assert failures[0].keys() == {"margin", "prompt", "chosen", "rejected"}
    _, failures = judge([-float(i + 1) for i in range(15)])
    assert len(failures) == WORST_FAILURES and failures[0]["margin"] == -7.5


def pairs(seed: int = 0, prompts: int = 120, per_prompt: int = 3, longer_chosen: float = 0.7) -> dict[str, np.ndarray]:
    """Pairs in which the chosen response is the longer one with this probability."""
    rng = np.random.default_rng(seed)
    n = prompts * per_prompt
    one, other = rng.integers(20, 400, (2, n))
    chosen_longer = rng.random(n) < longer_chosen
    return {
        "rating_gap": rng.integers(1, 4, n),
        "chosen_tokens": np.where(chosen_longer, np.maximum(one, other), np.minimum(one, other)),
        "rejected_tokens": np.where(chosen_longer, np.minimum(one, other), np.maximum(one, other)),
        "prompt_ids": np.repeat([f"p{i:03d}" for i in range(prompts)], per_prompt),
    }


def quality(data: dict[str, np.ndarray], chosen: np.ndarray, rejected: np.ndarray, samples: int = 400) -> dict:
    ids = data["prompt_ids"].tolist()
    arrays = {name: values for name, values in data.items() if name != "prompt_ids"}
    return margin_adapter_quality(
        **arrays, chosen_log_ratio=chosen, rejected_log_ratio=rejected, prompt_ids=ids, samples=samples, seed=0
    )


def test_an_adapter_that_only_measures_length_is_said_to_be_one_also_with_noise_and_when_it_prefers_short() -> None:
    data, rng = pairs(), np.random.default_rng(1)
    for scale, noise, rule in ((0.05, 0.0, "longer"), (0.05, 2.5, "longer"), (-0.05, 1.0, "shorter")):
        rewards = [scale * data[side] + rng.normal(0, noise, 360) for side in ("chosen_tokens", "rejected_tokens")]
        measured = quality(data, *rewards)
        assert measured["only_length"] is True and measured["length_rule"] == rule
        assert "measures length, and nothing shows that it measures more" in measured["sentence"]
        assert f"where the {rule} response is the rejected one" in measured["sentence"]


def test_an_adapter_that_measures_its_attribute_is_not_called_a_ruler_although_length_helps() -> None:
    data, rng = pairs(), np.random.default_rng(2)
    chosen = 0.01 * data["chosen_tokens"] + 2.0 * data["rating_gap"] + rng.normal(0, 1.5, 360)
    measured = quality(data, chosen, 0.01 * data["rejected_tokens"] + rng.normal(0, 1.5, 360))
    assert measured["only_length"] is False and measured["length_rule_wrong"]["low"] > 0.5
    assert "measures more than length" in measured["sentence"] and "it gains" in measured["sentence"]


def test_an_adapter_that_knows_nothing_or_was_asked_too_little_gets_no_verdict() -> None:
    rng = np.random.default_rng(3)
    verdicts = []
    for longer_chosen, seed in itertools.product((0.3, 0.5, 0.7), range(8)):
        data = pairs(seed, longer_chosen=longer_chosen)
        noise = quality(data, rng.normal(size=360), rng.normal(size=360))
        verdicts.append(noise["only_length"])
        assert noise["only_length"] is not None or "It is not shown whether" in noise["sentence"]
    assert verdicts.count(None) >= 20 and True not in verdicts
    few = pairs(prompts=9)
    measured = quality(few, few["chosen_tokens"], few["rejected_tokens"])
    assert measured["only_length"] is None and "27 validation pairs of 9 prompts are too few" in measured["sentence"]


def test_accuracies_and_bins_agree_with_counting() -> None:
    data, rng = pairs(4), np.random.default_rng(5)
    data["rejected_tokens"][:40] = data["chosen_tokens"][:40]
    chosen, rejected = rng.integers(0, 4, (2, 360)).astype(float)
    measured = quality(data, chosen, rejected)

    def accuracy(members: list[int]) -> tuple[int, float]:
        won = [1.0 if chosen[i] > rejected[i] else 0.5 if chosen[i] == rejected[i] else 0.0 for i in members]
        return len(won), pytest.approx(sum(won) / len(won))

    def length_bin(i: int) -> str:
        ours, theirs = data["chosen_tokens"][i], data["rejected_tokens"][i]
        if max(ours, theirs) - min(ours, theirs) <= 0.1 * max(ours, theirs):
            return "about equal"
        much = "much " if max(ours, theirs) > 2 * min(ours, theirs) else ""
        return much + ("longer" if ours > theirs else "shorter")

    everything = range(360)
    assert (measured["accuracy"]["n"], measured["accuracy"]["mean"]) == accuracy(list(everything))
    for part in measured["by_rating_gap"]:
        assert (part["n"], part["mean"]) == accuracy(
            [i for i in everything if data["rating_gap"][i] == part["rating_gap"]]
        )
    assert sum(part["n"] for part in measured["by_length"]) == 360
    for part in measured["by_length"]:
        members = [i for i in everything if length_bin(i) == part["chosen_is"]]
        assert (part["n"], part["mean"]) == accuracy(members)
        assert part["prompts"] == len({data["prompt_ids"][i] for i in members})
        assert part["low"] <= part["mean"] <= part["high"]
    longer = np.sign(data["chosen_tokens"] - data["rejected_tokens"])
    assert measured["longer_wins"]["mean"] == pytest.approx(((longer + 1) / 2).mean())
    assert measured["prefers_longer"]["n"] == (longer != 0).sum()
    rule = longer if measured["length_rule"] == "longer" else -longer
    assert measured["length_rule_wrong"]["n"] == (rule < 0).sum()
    assert measured["gain_over_length"]["mean"] == pytest.approx(measured["accuracy"]["mean"] - ((rule + 1) / 2).mean())
    json.dumps(measured, allow_nan=False)


def test_correlations_are_scipys_over_distinct_responses_and_their_intervals_widen_with_shared_prompts() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(10, 300, (80, 2))
    rewards = 0.01 * tokens + rng.normal(0, 1, (80, 2)) + rng.normal(0, 1, (80, 1))
    data = {
        "rating_gap": np.ones(80, dtype=int),
        "chosen_tokens": tokens[:, 0],
        "rejected_tokens": tokens[:, 1],
        "prompt_ids": np.array([f"p{i // 2}" for i in range(80)]),
    }
    measured = quality(data, rewards[:, 0], rewards[:, 1], samples=2000)
    pearson = stats.pearsonr(tokens.ravel(), rewards.ravel())
    assert measured["pearson"]["value"] == pytest.approx(pearson.statistic)
    assert measured["spearman"]["value"] == pytest.approx(stats.spearmanr(tokens.ravel(), rewards.ravel()).statistic)
    interval = pearson.confidence_interval()
    assert measured["pearson"]["low"] == pytest.approx(interval.low, abs=0.1)
    assert measured["pearson"]["high"] == pytest.approx(interval.high, abs=0.1)
    # The same pairs again are no new responses.
    again = {name: np.concatenate([values, values]) for name, values in data.items()}
    repeated = quality(again, *(np.concatenate([side, side]) for side in rewards.T))
    assert repeated["pearson"]["value"] == pytest.approx(measured["pearson"]["value"])


def test_all_right_is_no_certainty() -> None:
    data = pairs(9, prompts=20, per_prompt=1)
    measured = quality(data, np.ones(20), np.zeros(20))
    exact = stats.binomtest(20, 20).proportion_ci()
    assert (measured["accuracy"]["low"], measured["accuracy"]["high"]) == pytest.approx((exact.low, exact.high))
    inverted = quality(data, np.zeros(20), np.ones(20))["accuracy"]
    assert (inverted["low"], inverted["high"]) == pytest.approx((1 - exact.high, 1 - exact.low))


def test_no_pairs_one_length_and_broken_numbers_are_told_apart() -> None:
    nothing = margin_adapter_quality([], [], [], [], [], [], samples=10, seed=0)
    assert nothing["n"] == 0 and nothing["accuracy"]["mean"] is None and nothing["only_length"] is None
    json.dumps(nothing, allow_nan=False)
    data = pairs(10, prompts=20, per_prompt=2)
    data["rating_gap"][0] = 4  # a part of one pair, which many resamples lack
    data["chosen_tokens"] = data["rejected_tokens"] = np.full(40, 9)
    flat = quality(data, np.ones(40), np.zeros(40))
    assert flat["pearson"] == flat["spearman"] == {"value": None, "low": None, "high": None}
    assert flat["prefers_longer"]["n"] == 0 and flat["only_length"] is False  # right at equal length
    json.dumps(flat, allow_nan=False)
    with pytest.raises(HelpsteerError, match="1 of 40 validation pairs is NaN or infinite"):
        quality(data, np.where(np.arange(40) == 3, math.nan, 1.0), np.zeros(40))

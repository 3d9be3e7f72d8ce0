"""Degenerate text, equal length, the quality of the implicit reward, KL: on data whose answer is known."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison import length as diagnostics
from helpsteer_assets.modpo.comparison.bootstrap import bootstrap_means
from helpsteer_assets.modpo.comparison.differences import Measure
from helpsteer_assets.modpo.comparison.length import EqualLength
from helpsteer_assets.modpo.comparison.scores import PolicyScores

RATING = Measure("helpfulness", "rated helpfulness", "0 to 4", "higher")

# Degenerate text


def test_repetition_counts_the_4_grams_that_occurred_before() -> None:
    assert diagnostics.repetition("a b c d") == 0
    assert diagnostics.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert diagnostics.repetition("no " * 103) == pytest.approx(99 / 100)
    assert diagnostics.repetition("a b a") == diagnostics.repetition("") == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_repetition_agrees_with_a_search_through_all_that_came_before(words: list[str]) -> None:
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert diagnostics.repetition("  ".join(words)) == pytest.approx(before / len(grams) if grams else 0)


def test_text_without_spaces_counts_by_characters() -> None:
    assert diagnostics.repetition("请帮我写一封信给我的朋友") == 0
    assert diagnostics.repetition("我们我们我们我们我们") == pytest.approx(5 / 7)
    assert diagnostics.repetition("我們 " * 20) > 0.9
    assert diagnostics.repetition("สวัสดีครับ") == 0
    assert diagnostics.repetition("x" * 10_000) > 0.99
    assert diagnostics.repetition("abcdefghij" * 3) == 0  # one word of 30 letters
    assert diagnostics.repetition("abcdefghij" * 5) == pytest.approx(37 / 47)


def test_long_text_of_any_kind_stays_linear() -> None:
    for text in ("word " * 200_000, "x" * 1_000_000, "字" * 1_000_000, " " * 1_000_000):
        assert 0 <= diagnostics.repetition(text) < 1


def test_empty_is_what_shows_nothing_and_degenerate_is_empty_or_mostly_repeated() -> None:
    for text in ("", " \n\t", "\u200b\u200e", "\x00", "\u3000"):
        assert diagnostics.is_empty(text) and diagnostics.is_degenerate(text)
    for text in (".", "字", "a", "🙂"):
        assert not diagnostics.is_empty(text) and not diagnostics.is_degenerate(text)
    assert diagnostics.is_degenerate("I am sorry. " * 10)
    assert not diagnostics.is_degenerate("Put the cup on the shelf. Then put the plate on the shelf beside the cup.")


# Equal length


def scores(w: str | None, helpfulness: np.ndarray, tokens: np.ndarray) -> PolicyScores:
    ids = [f"p{i:04d}" for i in range(len(tokens))]
    return PolicyScores(
        "sft" if w is None else "modpo", w, ids, {"helpfulness": helpfulness, "response_tokens": tokens}
    )


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
    return diagnostics.at_equal_length(policies, RATING, samples, seed)


def test_the_line_is_that_of_scipy_and_its_interval_that_of_a_loop_over_resamples() -> None:
    sft, other = changed(1, 50, gain=0.2, per_token=0.02)
    (found,) = compare(sft, other)
    x = other.measures["response_tokens"] - sft.measures["response_tokens"]
    y = other.measures["helpfulness"] - sft.measures["helpfulness"]
    expected = stats.linregress(x, y)
    assert found.adjusted is not None
    assert (found.adjusted.mean, found.per_token) == pytest.approx((expected.intercept, expected.slope))
    assert found.raw == pytest.approx(y.mean())
    # The same resamples, drawn as indicators of rows.
    counts = (bootstrap_means(np.eye(50), 400, 0) * 50).round().astype(int)
    lines = [stats.linregress(np.repeat(x, c), np.repeat(y, c)).intercept for c in counts]
    deviations = np.abs(np.array(lines) - expected.intercept) * math.sqrt(50 / 49)
    half = np.quantile(deviations, 0.95)
    half *= stats.t.ppf(0.975, 49) / stats.norm.ppf(0.975)
    assert (found.adjusted.low, found.adjusted.high) == pytest.approx(
        (expected.intercept - half, expected.intercept + half), abs=0.003
    )
    assert half == pytest.approx(1.96 * expected.intercept_stderr, rel=0.3)


def test_a_gain_that_is_length_alone_goes_and_one_that_is_not_stays() -> None:
    sft, lengthened = changed(2, 200, gain=0.0, per_token=0.02, longer=20)
    (found,) = compare(sft, lengthened)
    assert found.raw > 0.3 and found.adjusted is not None
    assert found.adjusted.low < 0 < found.adjusted.high
    assert "at equal length rated helpfulness is not shown to differ from SFT's" in found.sentence
    sft, improved = changed(3, 200, gain=0.4, per_token=-0.02, longer=20)
    (found,) = compare(sft, improved)
    assert abs(found.raw) < 0.1 and found.adjusted is not None
    assert found.adjusted.low < 0.4 < found.adjusted.high and found.adjusted.low > 0.2
    assert "w=0.3: at equal length rated helpfulness is higher than SFT's (0.39 points [0.33, 0.46]" in found.sentence
    assert found.close is not None and found.close.low > 0.1 and found.verdict == "higher"


def test_the_interval_at_equal_length_covers_the_true_gain() -> None:
    covered = 0
    for trial in range(200):
        (found,) = compare(*changed(100 + trial, 60, gain=0.2, per_token=0.03), seed=trial, samples=200)
        assert found.adjusted is not None
        covered += found.adjusted.low <= 0.2 <= found.adjusted.high
    assert 0.89 <= covered / 200 <= 0.99


def test_only_responses_within_a_tenth_of_each_others_length_are_close() -> None:
    tokens = np.full(24, 100.0)
    other = np.array([100, 90, 110, 111.0] * 6)  # 90 is a tenth shorter than 100, 100 almost a tenth than 110 and 111
    rating = np.where(other == 111, 5.0, 1.0)
    (found,) = compare(scores(None, np.zeros(24), tokens), scores("0.3", rating, other))
    assert found.close_prompts == 24 and found.close is not None
    (found,) = compare(scores(None, np.zeros(24), tokens), scores("0.3", rating, other + np.where(other == 111, 1, 0)))
    assert found.close_prompts == 18 and found.close is not None and found.close.mean == 1


def test_without_enough_change_of_length_there_is_no_line_and_no_claim() -> None:
    sft, other = changed(4, 9, gain=0.2, per_token=0.0)
    (few,) = compare(sft, other)
    assert few.adjusted is None and few.per_token is None and few.close is None
    assert few.verdict == "undecided"
    assert (
        few.sentence
        == "w=0.3: 9 responses changed their length, too few to tell more: no line of rated helpfulness on length."
    )
    tokens, rating = np.arange(20.0), np.zeros(20)
    (same,) = compare(scores(None, rating, tokens), scores("0.3", rating + 1, tokens))
    assert same.adjusted is None and same.close is not None and same.close.low == same.close.high == 1
    assert same.sentence.endswith("; over the 20 prompts whose lengths differ by a tenth at most: 1 points [1, 1].")
    (moved,) = compare(scores(None, rating, tokens), scores("0.3", rating + 1, tokens + 7))
    assert moved.adjusted is None and "20 responses changed their length, all by the same" in moved.sentence


def test_a_line_that_prompts_of_about_equal_length_contradict_gives_no_verdict() -> None:
    rng = np.random.default_rng(8)
    tokens = np.full(100, 100.0)
    more = np.where(np.arange(100) < 30, 0, rng.integers(-40, 60, 100))
    rating = np.where(more == 0, 0.0, 1.0 + 0.001 * more)  # unchanged responses are no better, changed ones are
    (found,) = compare(scores(None, np.zeros(100), tokens), scores("0.3", rating, tokens + more))
    assert found.adjusted is not None and found.adjusted.low > 0 and found.close is not None
    close = [(r, m) for r, m in zip(rating, more, strict=True) if abs(m) <= 0.1 * max(100, 100 + m)]
    assert found.close.mean == pytest.approx(np.mean([r for r, _ in close])) and found.close_prompts == len(close)
    (flat,) = compare(
        scores(None, np.zeros(100), tokens), scores("0.3", np.where(np.abs(more) <= 11, 0.0, rating), tokens + more)
    )
    assert flat.adjusted is not None and flat.adjusted.low > 0 and flat.verdict == "undecided"
    assert "is higher than SFT's by the line, which prompts of about equal length do not show" in flat.sentence


def test_a_length_penalty_has_nothing_left_at_equal_length() -> None:
    sft, other = changed(7, 60, gain=0.0, per_token=0.0)
    penalized = [
        PolicyScores(p.policy, p.w, p.prompt_ids, p.measures | {"helpfulness": -0.003 * p.measures["response_tokens"]})
        for p in (sft, other)
    ]
    (found,) = compare(*penalized)
    assert found.adjusted is not None and vars(found.adjusted) == {"mean": 0, "low": 0, "high": 0}
    assert found.per_token == pytest.approx(-0.003) and "is not shown to differ" in found.sentence


def test_a_line_beyond_what_was_seen_says_that_it_extrapolates() -> None:
    (found,) = compare(*changed(5, 60, gain=0.0, per_token=0.01, longer=200))
    assert found.extrapolated and "this is extrapolated" in found.sentence
    (found,) = compare(*changed(5, 60, gain=0.0, per_token=0.01))
    assert not found.extrapolated and "extrapolated" not in found.sentence


def test_weights_without_a_line_stand_beside_those_with_one() -> None:
    sft, other = changed(6, 40, gain=0.5, per_token=0.01)
    still = PolicyScores("modpo", "0.1", sft.prompt_ids, sft.measures)
    found = compare(other, sft, still)
    assert [own.w for own in found] == ["0.1", "0.3"]
    assert found[0].adjusted is None and found[1].adjusted is not None
    assert found[1].raw == pytest.approx(compare(other, sft)[0].raw)
    assert found[1].sentence == compare(other, sft)[0].sentence


# Quality of the implicit reward


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
    return diagnostics.margin_adapter_quality(
        **arrays, chosen_log_ratio=chosen, rejected_log_ratio=rejected, prompt_ids=ids, samples=samples
    )


def test_an_adapter_that_only_measures_length_is_said_to_be_one_also_with_noise_and_when_it_prefers_short() -> None:
    data, rng = pairs(), np.random.default_rng(1)
    for scale, noise, rule in ((0.05, 0.0, "longer"), (0.05, 2.5, "longer"), (-0.05, 1.0, "shorter")):
        rewards = [scale * data[side] + rng.normal(0, noise, 360) for side in ("chosen_tokens", "rejected_tokens")]
        found = quality(data, *rewards)
        assert found["only_length"] is True and found["length_rule"] == rule
        assert "measures length, and nothing shows that it measures more" in found["sentence"]
        assert f"where the {rule} response is the rejected one" in found["sentence"]


def test_an_adapter_that_measures_its_attribute_is_not_called_a_ruler_although_length_helps() -> None:
    data, rng = pairs(), np.random.default_rng(2)
    chosen = 0.01 * data["chosen_tokens"] + 2.0 * data["rating_gap"] + rng.normal(0, 1.5, 360)
    found = quality(data, chosen, 0.01 * data["rejected_tokens"] + rng.normal(0, 1.5, 360))
    assert found["only_length"] is False
    assert "measures more than length" in found["sentence"] and "it gains" in found["sentence"]
    assert found["length_rule_wrong"]["low"] > 0.5
    accuracies = [part["mean"] for part in found["by_rating_gap"]]
    assert accuracies == sorted(accuracies)


def test_an_adapter_that_knows_better_where_length_misleads_is_no_ruler_although_length_alone_does_better() -> None:
    data = pairs(12, longer_chosen=0.9)
    right = np.random.default_rng(13).random(360) < 0.75
    found = quality(data, right.astype(float), np.full(360, 0.5))
    assert found["gain_over_length"]["high"] < 0 and found["length_rule_wrong"]["low"] > 0.5
    assert found["only_length"] is False


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
    found = quality(few, few["chosen_tokens"], few["rejected_tokens"])
    assert found["only_length"] is None and "27 validation pairs of 9 prompts are too few" in found["sentence"]


def test_accuracies_and_bins_agree_with_counting() -> None:
    data, rng = pairs(4), np.random.default_rng(5)
    data["rejected_tokens"][:40] = data["chosen_tokens"][:40]
    chosen, rejected = rng.integers(0, 4, (2, 360)).astype(float)
    found = quality(data, chosen, rejected)

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
    assert (found["accuracy"]["n"], found["accuracy"]["mean"]) == accuracy(list(everything))
    for part in found["by_rating_gap"]:
        assert (part["n"], part["mean"]) == accuracy(
            [i for i in everything if data["rating_gap"][i] == part["rating_gap"]]
        )
    assert sum(part["n"] for part in found["by_length"]) == 360
    for part in found["by_length"]:
        members = [i for i in everything if length_bin(i) == part["chosen_is"]]
        assert (part["n"], part["mean"]) == accuracy(members)
        assert part["prompts"] == len({data["prompt_ids"][i] for i in members})
        assert part["low"] <= part["mean"] <= part["high"]
    longer = np.sign(data["chosen_tokens"] - data["rejected_tokens"])
    assert found["longer_wins"]["mean"] == pytest.approx(((longer + 1) / 2).mean())
    assert found["prefers_longer"]["n"] == (longer != 0).sum()
    rule = longer if found["length_rule"] == "longer" else -longer
    assert found["length_rule_wrong"]["n"] == (rule < 0).sum()
    assert found["gain_over_length"]["mean"] == pytest.approx(found["accuracy"]["mean"] - ((rule + 1) / 2).mean())
    json.dumps(found, allow_nan=False)


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
    found = quality(data, rewards[:, 0], rewards[:, 1], samples=2000)
    pearson = stats.pearsonr(tokens.ravel(), rewards.ravel())
    assert found["pearson"]["value"] == pytest.approx(pearson.statistic)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(tokens.ravel(), rewards.ravel()).statistic)
    interval = pearson.confidence_interval()
    assert found["pearson"]["low"] == pytest.approx(interval.low, abs=0.1)
    assert found["pearson"]["high"] == pytest.approx(interval.high, abs=0.1)
    # Ten pairs more between the same responses are no new responses.
    again = {name: np.concatenate([values, values[:10]]) for name, values in data.items()}
    repeated = quality(
        again, np.concatenate([rewards[:, 0], rewards[:10, 0]]), np.concatenate([rewards[:, 1], rewards[:10, 1]])
    )
    assert repeated["pearson"]["value"] == pytest.approx(found["pearson"]["value"])


def test_the_interval_of_an_accuracy_resamples_prompts_and_not_pairs() -> None:
    rng = np.random.default_rng(7)
    data = pairs(8, prompts=40, per_prompt=10)
    wins = np.repeat(rng.random(40) < 0.6, 10).astype(float)
    found = quality(data, wins, np.full(400, 0.5), samples=2000)["accuracy"]
    per_prompt = stats.bootstrap(
        (wins.reshape(40, 10).mean(axis=1),), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((per_prompt.low, per_prompt.high), abs=0.03)


def test_all_right_is_no_certainty() -> None:
    data = pairs(9, prompts=20, per_prompt=1)
    found = quality(data, np.ones(20), np.zeros(20))
    exact = stats.binomtest(20, 20).proportion_ci()
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx((exact.low, exact.high))
    inverted = quality(data, np.zeros(20), np.ones(20))
    exact = stats.binomtest(0, 20).proportion_ci()
    assert (inverted["accuracy"]["low"], inverted["accuracy"]["high"]) == pytest.approx((exact.low, exact.high))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_the_verdict_depends_on_neither_the_order_of_pairs_nor_the_scale_of_the_reward(seed: int, scale: float) -> None:
    data, rng = pairs(seed, prompts=20), np.random.default_rng(seed)
    chosen, rejected = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    found = quality(data, chosen, rejected, samples=50)
    order = rng.permutation(60)
    turned = {name: values[order] for name, values in data.items()}
    again = quality(turned, scale * chosen[order], scale * rejected[order], samples=50)
    assert again["only_length"] == found["only_length"]
    for key in ("accuracy", "prefers_longer", "gain_over_length"):
        assert again[key] == pytest.approx(found[key])
    for key in ("pearson", "spearman"):
        assert again[key] == pytest.approx(found[key], abs=1e-9)


def test_no_pairs_one_length_and_broken_numbers_are_told_apart() -> None:
    nothing = diagnostics.margin_adapter_quality([], [], [], [], [], [])
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
    with pytest.raises(ValueError, match="one entry per pair"):
        quality(data, np.ones(39), np.zeros(40))


# KL


def test_kl_is_the_mean_log_ratio_of_a_prompts_samples() -> None:
    found = diagnostics.kl_by_prompt(
        ["b", "a", "b", "a", "c"], [1.0, -2.0, 3.0, 1.0, 0.5], [True, False, False, False, True]
    )
    assert found.prompt_ids == ["a", "b", "c"]
    assert found.kl.tolist() == [-0.5, 2.0, 0.5]
    assert found.capped.tolist() == [0, 0.5, 1]
    assert diagnostics.kl_by_prompt([], [], []).prompt_ids == []
    with pytest.raises(HelpsteerError, match=r"1 of 2 samples is NaN or infinite.*modpo.learning_rate"):
        diagnostics.kl_by_prompt(["a", "a"], [1.0, math.inf], [False, False])


def test_the_estimate_is_unbiased_for_an_exact_kl_and_bounded_by_it_when_samples_are_cut() -> None:
    rng = np.random.default_rng(11)
    policy, sft = rng.dirichlet(np.ones(6), 2), rng.dirichlet(np.ones(6), 2)  # two independent tokens
    exact = [float(stats.entropy(policy[t], sft[t])) for t in range(2)]
    draws = np.stack([rng.choice(6, 40_000, p=policy[t]) for t in range(2)])
    ratios = np.stack([np.log(policy[t] / sft[t])[draws[t]] for t in range(2)])
    ids = [f"p{i}" for i in np.arange(40_000) % 100]
    whole = diagnostics.kl_by_prompt(ids, ratios.sum(axis=0), [False] * 40_000)
    cut = diagnostics.kl_by_prompt(ids, ratios[0], [True] * 40_000)
    error = ratios.sum(axis=0).std() / 200
    assert whole.kl.mean() == pytest.approx(sum(exact), abs=4 * error)
    assert cut.kl.mean() == pytest.approx(exact[0], abs=4 * error)
    assert cut.capped.min() == 1 and exact[0] < sum(exact)

"""Differences to SFT and the sentences that tell them: only what the numbers carry."""

import numpy as np
import pytest

from helpsteer_assets.modpo.comparison.bootstrap import Interval, bootstrap_means, simultaneous_interval
from helpsteer_assets.modpo.comparison.differences import (
    Difference,
    Measure,
    differences_to_sft,
    headlines,
    statements,
)
from helpsteer_assets.modpo.comparison.fronts import FrontUncertainty
from helpsteer_assets_tests.modpo.comparison.policies import policy, shuffled

HELP = Measure("helpfulness", "rated helpfulness", "0 to 4", "higher")
MARGIN = Measure("margin", "margin", "", "higher")
LENGTH = Measure("response_tokens", "length", "tokens", None, ("longer", "shorter"))
CAPPED = Measure("capped", "share of capped responses", "share", "lower")


def difference(w: str, measure: Measure, mean: float, low: float, high: float, prompts: int = 100) -> Difference:
    verdict = "higher" if low > 0 else "lower" if high < 0 else "undecided"
    return Difference(w, measure.name, prompts, mean, low, high, 0.5, verdict)


def told(measure: Measure, mean: float, low: float, high: float) -> str:
    own = {"0.2": {measure.name: difference("0.2", measure, mean, low, high)}}
    (sentence,) = statements(own, [measure])["0.2"]
    return sentence


# Differences


def test_differences_are_paired_and_simultaneous_over_the_weights_of_each_measure() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 5, 60)
    changes = {w: rng.normal(mean, 1, 60) for w, mean in (("0.1", -1.0), ("0.5", 0.0), ("0.9", 1.0))}
    policies = [policy(None, margin=base, k=base), *(policy(w, margin=base + c, k=base) for w, c in changes.items())]
    differences = differences_to_sft(policies, ["margin", "k"], 500, 2)
    assert [own["margin"].verdict for own in differences.values()] == ["lower", "undecided", "higher"]
    table = np.column_stack(list(changes.values()))
    low, high, p_values = simultaneous_interval(table.mean(axis=0), bootstrap_means(table, 500, 2), 60)
    for i, (w, own) in enumerate(differences.items()):
        shown = own["margin"]
        assert (shown.mean, shown.low, shown.high, shown.p_value, shown.prompts) == pytest.approx(
            (changes[w].mean(), low[i], high[i], p_values[i], 60), abs=1e-9
        )
    assert differences_to_sft([shuffled(scores, 3) for scores in policies], ["margin", "k"], 500, 2) == differences


def test_a_difference_that_is_the_same_on_every_prompt_is_decided_by_enough_prompts_only() -> None:
    for prompts, verdict in ((1, "undecided"), (5, "undecided"), (8, "higher")):
        sft = policy(None, m=np.zeros(prompts), k=np.ones(prompts))
        other = policy("0.1", m=np.full(prompts, 2.0), k=np.ones(prompts))
        own = differences_to_sft([sft, other], ["m", "k"], 100, 0)["0.1"]
        assert (own["m"].low, own["m"].high, own["m"].verdict) == (2, 2, verdict)
        assert own["k"].verdict == "undecided"
        assert "the same as SFT's on each" in statements({"0.1": own}, [Measure("k", "k")])["0.1"][0]
    few = statements({"0.1": {"m": Difference("0.1", "m", 3, 2.0, 2.0, 2.0, 0.25, "undecided")}}, [Measure("m", "m")])
    assert few["0.1"] == ["M: no difference shown by 3 prompts (2)."]


# Statements


def test_a_shown_difference_names_its_side_its_size_and_its_interval() -> None:
    assert told(LENGTH, -31.2, -38.4, -24.1) == "Shorter than SFT by 31 tokens [24, 38]."
    assert told(LENGTH, 31.2, 24.1, 38.4) == "Longer than SFT by 31 tokens [24, 38]."
    assert told(HELP, 0.31, 0.123, 0.5) == "Rated helpfulness: higher than SFT's by 0.31 points [0.12, 0.50]."
    assert told(MARGIN, -0.4, -0.53, -0.27) == "Margin: lower than SFT's by 0.40 [0.27, 0.53]."
    assert told(CAPPED, 0.12, 0.05, 0.19) == (
        "Share of capped responses: higher than SFT's by 12 percentage points [5, 19]."
    )


def test_no_difference_shown_is_not_called_equal_and_says_how_large_one_could_be() -> None:
    assert told(HELP, -0.05, -0.2, 0.1) == (
        "Rated helpfulness: no difference shown (-0.05 points [-0.20, 0.10]); one of up to 0.20 points is not ruled "
        "out."
    )
    assert "no difference shown (2.3 tokens [-0.1, 4.8])" in told(LENGTH, 2.3, -0.1, 4.8)
    assert told(CAPPED, 0.0, 0.0, 0.0) == "Share of capped responses: the same as SFT's on each of 100 prompts."
    assert "-0.00" not in told(HELP, -0.001, -0.2, 0.2)


# Headlines

GRID = {
    "0.1": {
        "helpfulness": difference("0.1", HELP, -0.5, -0.7, -0.3),
        "margin": difference("0.1", MARGIN, 0.4, 0.3, 0.5),
        "response_tokens": difference("0.1", LENGTH, -9, -12, -6),
    },
    "0.5": {
        "helpfulness": difference("0.5", HELP, -0.1, -0.3, 0.1),
        "margin": difference("0.5", MARGIN, 0.2, 0.1, 0.3),
        "response_tokens": difference("0.5", LENGTH, -3, -6, 0.5),
    },
    "0.9": {
        "helpfulness": difference("0.9", HELP, 0.5, 0.3, 0.7),
        "margin": difference("0.9", MARGIN, -0.3, -0.4, -0.2),
        "response_tokens": difference("0.9", LENGTH, 7, 4, 10),
    },
}


FRONT = FrontUncertainty(
    np.array([True, True, False, True]), np.array([1.0, 0.995, 0.4, 0.001]), Interval(0.02, 0.0, 0.1)
)


def test_headlines_tell_what_moves_where_and_which_weight_to_read_first() -> None:
    helpfulness, margin, length, both, most_margin, most_help, on, area = headlines(GRID, HELP, MARGIN, [LENGTH], FRONT)
    assert helpfulness == (
        "Against SFT, rated helpfulness is higher at w=0.9 (by 0.50 points [0.30, 0.70]); lower at w=0.1 (by 0.50 "
        "points [0.30, 0.70]); not shown to differ at w=0.5."
    )
    assert margin.startswith("Against SFT, margin is higher at w=0.1 and w=0.5 (by 0.40 [0.30, 0.50], most at w=0.1);")
    assert length.startswith("Against SFT, responses are longer at w=0.9 (by 7.0 tokens")
    assert both == "No weight is shown to be better than SFT in both rated helpfulness and margin."
    assert most_margin == (
        "Of the weights whose rated helpfulness is not shown to be worse than SFT's (w=0.5 and w=0.9), w=0.5 has the "
        "highest mean margin. There, margin is higher than SFT's by 0.20 [0.10, 0.30]; rated helpfulness: no "
        "difference shown (-0.10 points [-0.30, 0.10]); one of up to 0.30 points is not ruled out."
    )
    assert "w=0.5 has the highest mean rated helpfulness, but SFT's own is higher. There, rated" in most_help
    assert on.endswith("SFT (100%), w=0.1 (above 99%), w=0.9 (below 1%); off it: w=0.5 (40%).")
    assert "0.02 [0, 0.1]; it is not shown that any policy is better than SFT in both." in area
    sure = FrontUncertainty(FRONT.on_front, FRONT.probability, Interval(0.02, 0.01, 0.1))
    assert "; some policy is better than SFT in both." in headlines(GRID, HELP, MARGIN, [], sure)[-1]

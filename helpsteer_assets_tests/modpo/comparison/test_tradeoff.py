"""The trade-off as numbers and sentences: what is known to be there is found, what is not is not claimed."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpsteer_assets.modpo.comparison.scores import PolicyScores
from helpsteer_assets.modpo.comparison.tradeoff import (
    TradeoffSettings,
    analyse,
    axis_label,
    caveats,
    measures_of,
)
from helpsteer_assets.modpo.margins import implicit_reward, length_penalty
from helpsteer_assets_tests.modpo.comparison.policies import policy, shuffled

PROMPTS = 80
REWARD = implicit_reward(0.1, "reward", "verbosity")
SETTINGS = TradeoffSettings(
    preference="helpfulness",
    margin=implicit_reward(0.1, "cost", "verbosity"),
    rating_unit="0 to 4",
    sampled=False,
    max_prompt_length=64,
    max_new_tokens=96,
    samples=200,
    seed=0,
)


def policies(rated: bool = True, **shifts: dict[str, float]) -> list[PolicyScores]:
    """SFT and the weights 0.1, 0.5 and 0.9, each measure moved from SFT's by so much, with a little noise."""
    rng = np.random.default_rng(1)
    flaws = ("kl_to_sft", "log_ratio_to_sft", "capped", "prompt_truncated", "repetition", "empty")
    base: dict[str, Any] = {name: np.zeros(PROMPTS) for name in flaws}
    base |= {"margin_reward": rng.normal(0, 1, PROMPTS), "response_tokens": rng.integers(20, 60, PROMPTS).astype(float)}
    if rated:
        base |= {"helpfulness": rng.normal(2.5, 0.8, PROMPTS), "verbosity": rng.normal(2, 0.8, PROMPTS)}
    made = []
    for w in (None, "0.1", "0.5", "0.9"):
        moved = {
            name: values + shifts.get(name, {}).get(w or "", 0.0) + (0 if w is None else rng.normal(0, 0.05, PROMPTS))
            for name, values in base.items()
        }
        moved["margin"] = -moved["margin_reward"]
        made.append(policy(w, **moved))
    return made


TRADE = {
    "helpfulness": {"0.1": -0.4, "0.9": 0.4},
    "margin_reward": {"0.1": -0.5, "0.9": 0.5},
    "response_tokens": {"0.1": -12.0, "0.9": 9.0},
    "kl_to_sft": {"0.1": 0.8, "0.5": 0.3, "0.9": 0.9},
}


def test_a_trade_off_that_is_there_is_found_and_said() -> None:
    result = analyse(SETTINGS, policies(**TRADE))
    assert result["preference_measured"] and result["axes"]["x"] == "helpfulness"
    by_label = {point["label"]: point for point in result["points"]}
    assert by_label["w=0.9"]["on_front"] and by_label["w=0.1"]["on_front"]
    assert by_label["w=0.9"]["front_probability"] == 1.0
    verdicts = {w: own["helpfulness"]["verdict"] for w, own in result["differences"].items()}
    assert verdicts == {"0.1": "lower", "0.5": "undecided", "0.9": "higher"}
    assert result["differences"]["0.1"]["response_tokens"]["mean"] == pytest.approx(-12, abs=0.05)
    assert any(re.match(r"Longer than SFT by (8\.9|9\.0)\d* tokens", said) for said in result["statements"]["0.9"])
    assert result["direction"]["verdict"] is True
    assert result["movement"]["margin_reward"]["slope"]["low"] > 0
    # Nothing is better on both axes, so there is no area above SFT that noise would not explain.
    assert result["hypervolume_above_sft"]["low"] == 0


def test_where_nothing_moves_nothing_is_claimed() -> None:
    result = analyse(SETTINGS, policies())
    # Over measures nothing is adjusted: among the others one may differ by chance.
    traded = ("helpfulness", "margin_reward", "response_tokens")
    assert {own[name]["verdict"] for own in result["differences"].values() for name in traded} == {"undecided"}
    assert "no difference shown" in " ".join(result["statements"]["0.5"])
    assert result["direction"]["verdict"] is False


def test_without_a_rater_or_an_adapter_less_is_compared_and_that_is_said() -> None:
    result = analyse(SETTINGS, policies(rated=False, **TRADE))
    assert not result["preference_measured"]
    assert result["axes"] == {"x": "kl_to_sft", "y": "margin", "x_larger_is_better": False}
    assert "unmeasured" in result["note"]
    penalty = analyse(replace(SETTINGS, margin=length_penalty(0.1)), policies(**TRADE))
    assert {answer["measure"] for answer in penalty["equal_length"]} == {"helpfulness"}, "of the length itself"


def test_the_result_is_json_and_the_same_whatever_the_order_of_prompts() -> None:
    given = policies(**TRADE)
    expected = json.dumps(analyse(SETTINGS, given), allow_nan=False)
    turned = [shuffled(scores, seed) for seed, scores in enumerate(given)]
    assert json.dumps(analyse(SETTINGS, turned), allow_nan=False) == expected


def flawed(**flaws: float) -> list[PolicyScores]:
    """Policies of which w=0.9 has a measure at 1 in this share of the responses."""
    made = policies()
    for scores in made:
        for name in ("capped", "prompt_truncated", "empty", "repetition"):
            share = flaws.get(name, 0.0) if scores.w == "0.9" else 0.0
            scores.measures[name] = (np.arange(PROMPTS) < share * PROMPTS).astype(float)
    return made


@pytest.mark.parametrize(
    ("flaw", "share", "said"),
    [
        ("capped", 0.5, r"Up to 50% of the responses \(w=0.9\) are cut at 96 tokens.* generation.max_new_tokens"),
        ("prompt_truncated", 0.1, "10% of the prompts are cut .* generation.max_prompt_length"),
        ("empty", 0.0125, r"Up to 1% of the responses \(w=0.9\) are empty"),
        ("repetition", 0.05, r"Up to 5% of the responses \(w=0.9\) mostly repeat themselves"),
    ],
)
def test_flaws_of_the_responses_are_said_with_what_to_do(flaw: str, share: float, said: str) -> None:
    assert caveats(SETTINGS, flawed()) == []
    (sentence,) = caveats(SETTINGS, flawed(**{flaw: share}))
    assert re.match(said, sentence)
    few = [policy(s.w, **{name: values[:10] for name, values in s.measures.items()}) for s in flawed()]
    assert "10 prompts are few" in caveats(SETTINGS, few)[0]


def test_measures_say_which_way_is_better_in_the_sense_of_the_role() -> None:
    names = ["margin_reward", "margin", "helpfulness", "verbosity", "response_tokens"]
    cost, reward = measures_of(SETTINGS, names), measures_of(replace(SETTINGS, margin=REWARD), names)
    assert cost["margin_reward"].better == cost["verbosity"].better == "lower"
    assert cost["helpfulness"].better == "higher"
    assert reward["margin_reward"].better == reward["verbosity"].better == "higher"
    assert axis_label(cost["margin"]) == "margin (for less verbosity; more is better)"
    assert axis_label(cost["helpfulness"]) == "rated helpfulness, 0 to 4 (more is better)"
    penalty = measures_of(replace(SETTINGS, margin=length_penalty(0.1)), names)
    assert penalty["margin"].title == "margin (fewer tokens)" and penalty["verbosity"].better == "higher"
    assert next(iter(cost)) == "helpfulness"

"""The kinds of margin: what the policy trades its preference reward against, and how reports speak of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Margin:
    """A margin m = sign * r_m, which MODPO encourages. r_m is the margin reward."""

    reward: Callable[[ArrayLike, ArrayLike], Floats]
    """r_m in reward units, of log p_adapter(y|x) - log p_sft(y|x) in nats (not read without an adapter) and the tokens
    of the uncut responses."""
    sign: Literal[-1, 1]
    attribute: str | None
    """The attribute that its margin adapter learnt; None without an adapter."""
    name: str
    """m in tables and sentences."""
    reward_name: str
    """r_m in tables and sentences."""
    pull: str
    """The direction in which it moves the policy: a verb and its object."""
    scale: str
    """The setting that scales r_m, with its value."""
    facts: str
    """Kind, direction and scale in a few words."""
    conflict: Callable[[str, Mapping[str, Any]], tuple[float, list[str]]]
    """The share of pairs in which margin and preference disagree, and sentences on it. The arguments are the preference
    attribute and the description of its pairs by `describe_pairs`."""


def implicit_reward(margin_beta: float, role: Literal["cost", "reward"], attribute: str) -> Margin:
    """r_m = margin_beta (log p_adapter - log p_sft), the implicit reward of DPO (Rafailov et al., 2023, section 4).

    The role `cost` discourages what the adapter prefers (m = -r_m), `reward` encourages it (m = +r_m).
    """
    cost = role == "cost"

    def conflict(preference: str, pairs: Mapping[str, Any]) -> tuple[float, list[str]]:
        agrees, opposes, ties = (pairs["other"][name] for name in ("agrees", "opposes", "ties"))
        share = agrees if cost else opposes
        return share, [
            f"In the {preference} pairs, {attribute} agrees (the chosen response is rated higher on it too) in "
            f"{agrees:.1%}, opposes in {opposes:.1%} and ties in {ties:.1%}.",
            f"The role `{role}` {'penalizes' if cost else 'encourages'} {attribute}: the "
            f"{'agreeing' if cost else 'opposing'} pairs ({share:.1%}) are the conflict that w decides.",
        ]

    return Margin(
        reward=lambda log_ratios, response_tokens: margin_beta * np.asarray(log_ratios, dtype=np.float64),
        sign=-1 if cost else 1,
        attribute=attribute,
        name=f"margin (for {'less' if cost else 'more'} {attribute})",
        reward_name="margin reward",
        pull=f"{'discourages' if cost else 'encourages'} {attribute}",
        scale=f"margin_beta {margin_beta}",
        facts=f"{attribute}, {'discouraged' if cost else 'encouraged'} ({role}), margin_beta {margin_beta:g}",
        conflict=conflict,
    )


def length_penalty(penalty: float) -> Margin:
    """r_m = -penalty * response tokens; needs no adapter."""

    def conflict(preference: str, pairs: Mapping[str, Any]) -> tuple[float, list[str]]:
        share = pairs["chosen_longer"]
        return share, [
            f"In {share:.1%} of the {preference} pairs the chosen response has more words: under the length penalty "
            "these are the conflict that w decides."
        ]

    return Margin(
        reward=lambda log_ratios, response_tokens: -penalty * np.asarray(response_tokens, dtype=np.float64),
        sign=1,
        attribute=None,
        name="margin (fewer tokens)",
        reward_name="length penalty",
        pull="encourages shorter responses",
        scale=f"penalty {penalty}",
        facts=f"length penalty of {penalty:g} per token",
        conflict=conflict,
    )


def margins_by_response(margin_rewards: pa.Table, margin: Margin) -> dict[str, float]:
    """m by response_id, reward units, of the unscaled table: response_id, log_ratio, response_tokens."""
    rewards = margin.reward(
        margin_rewards["log_ratio"].to_numpy(zero_copy_only=False),
        margin_rewards["response_tokens"].to_numpy(zero_copy_only=False),
    )
    return dict(zip(margin_rewards["response_id"].to_pylist(), (margin.sign * rewards).tolist(), strict=True))

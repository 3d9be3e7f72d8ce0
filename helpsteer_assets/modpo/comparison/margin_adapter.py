"""Does the margin adapter rank pairs right, is it good enough to train on, and does it measure more than length?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.bootstrap import LEVEL, Floats, bootstrap_means, percentile_interval
from helpsteer_assets.modpo.comparison.length import FEWEST_PROMPTS, about_equal

_CORRELATION_OF_A_RULER = 0.9
"""From this rank correlation with length on, a reward is taken to follow length."""


def margin_adapter_quality(
    rating_gap: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    chosen_log_ratio: ArrayLike,
    rejected_log_ratio: ArrayLike,
    prompt_ids: Sequence[str],
    *,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Does the margin adapter measure its attribute, or length? All arrays [N], one entry per validation pair.

    Log-ratios are log p_adapter - log p_sft in nats, unscaled; lengths in tokens; `rating_gap` is the chosen minus the
    rejected rating. A pair counts as right where the chosen log-ratio is the larger, and as half right where they are
    equal.

    A share is {n (pairs), prompts, mean, low, high} with a 95% percentile interval that resamples prompts with all
    their pairs; its numbers are null without pairs. Where all pairs are right (or all wrong) no resample differs, and
    the interval is that of Clopper and Pearson, 1934, with the prompts as trials. A correlation is {value, low, high},
    null where undefined. Intervals are pointwise. JSON-able keys:

    n, prompts: pairs and prompts
    accuracy: share of pairs ranked right
    by_rating_gap: a share per gap, ascending, with its `rating_gap`
    by_length: a share per `chosen_is`: much shorter (less than half as long as rejected), shorter, about equal (see
        `about_equal`), longer, much longer (more than twice as long)
    prefers_longer: share of the pairs of unequal length in which the adapter ranks the longer response higher
    pearson, spearman: correlations of log-ratio and tokens over the distinct responses (two of one prompt with the same
        length and log-ratio count once); the resamples of `spearman` keep the ranks of the whole sample
    longer_wins: accuracy of the rule "the longer response is the chosen one" on the same pairs (equal length: half)
    length_rule: "longer" or "shorter", the one that the adapter prefers more often
    length_rule_right, length_rule_wrong: accuracy over the pairs in which the length rule is right, or wrong
    gain_over_length: accuracy minus that of the length rule on the same pairs
    gain_at_equal_length: the same over pairs of about equal length
    only_length: False if the adapter is shown to measure more than length, by one of these: length_rule_wrong above
        1/2, or a gain above 0 together with an accuracy above 1/2, over all pairs or over those of about equal length.
        Else True if it is shown to follow length: length_rule_right above 1/2, and either length_rule_wrong below 1/2
        or a rank correlation with length of at least 0.9 in size. None if neither is shown, or with fewer than 10
        prompts. "Above" and "below" mean the whole interval.
    sentence: the verdict in words, with its numbers

    A gain alone proves little: a noisy measure of length can do better than the length rule where that rule does worse
    than chance, but then its own accuracy is below 1/2.

    Raises HelpsteerError where a number is NaN or infinite.
    """
    columns = (rating_gap, chosen_tokens, rejected_tokens, chosen_log_ratio, rejected_log_ratio)
    gap, chosen, rejected, chosen_reward, rejected_reward = (np.asarray(c, dtype=np.float64) for c in columns)
    _require_finite(gap + chosen + rejected + chosen_reward + rejected_reward, "log-ratio or length")
    # Numbered by sorted id, so that no result depends on the order of pairs.
    member = np.unique(np.array(prompt_ids, dtype=str), return_inverse=True)[1]
    right = _wins(chosen_reward - rejected_reward)
    longer_wins = _wins(chosen - rejected)
    unequal, chosen_longer = chosen != rejected, chosen > rejected
    prefers_longer = np.where(chosen_longer, right, 1 - right)
    rule = "longer" if not unequal.any() or prefers_longer[unequal].mean() >= 0.5 else "shorter"
    rule_right = longer_wins if rule == "longer" else 1 - longer_wins
    everything = np.ones(len(gap), dtype=bool)
    equal = about_equal(chosen, rejected)
    much_shorter, much_longer = 2 * chosen < rejected, chosen > 2 * rejected
    shorter, longer = ~chosen_longer & ~equal & ~much_shorter, chosen_longer & ~equal & ~much_longer
    gaps = np.unique(gap).astype(int).tolist()
    shares = {
        "accuracy": (right, everything),
        "prefers_longer": (prefers_longer, unequal),
        "longer_wins": (longer_wins, everything),
        "length_rule_right": (right, rule_right == 1),
        "length_rule_wrong": (right, rule_right == 0),
    }
    gains = {
        "gain_over_length": (right - rule_right, everything),
        "gain_at_equal_length": (right - rule_right, equal),
    }
    by_gap = {g: (right, gap == g) for g in gaps}
    by_length = {
        "much shorter": (right, much_shorter),
        "shorter": (right, shorter),
        "about equal": (right, equal),
        "longer": (right, longer),
        "much longer": (right, much_longer),
    }
    ratios = _ratios(shares | gains | by_gap | by_length, member, samples, seed)
    responses = np.unique(
        np.concatenate(
            [np.stack([member, chosen, chosen_reward], 1), np.stack([member, rejected, rejected_reward], 1)]
        ),
        axis=0,
    )
    owner, tokens, rewards = responses[:, 0].astype(int), responses[:, 1], responses[:, 2]
    result = {
        "n": len(gap),
        "prompts": len(np.unique(member)),
        **{name: _share(ratios[name]) for name in shares},
        **{name: ratios[name] for name in gains},
        "by_rating_gap": [{"rating_gap": g} | _share(ratios[g]) for g in by_gap],
        "by_length": [{"chosen_is": name} | _share(ratios[name]) for name in by_length],
        "pearson": _correlation(rewards, tokens, owner, samples, seed),
        "spearman": _correlation(_average_ranks(rewards), _average_ranks(tokens), owner, samples, seed),
        "length_rule": rule,
    }
    only_length = _only_length(result)
    return result | {"only_length": only_length, "sentence": _quality_sentence(result, only_length)}


def _require_finite(values: Floats, what: str) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise HelpsteerError(
            f"the {what} of {bad} of {len(values)} validation pairs is NaN or infinite: the margin adapter is broken; "
            "train it with a lower margin_adapter.learning_rate, or in fp32"
        )


def _wins(differences: Floats) -> Floats:
    return (differences > 0) + 0.5 * (differences == 0)


_Ratio = dict[str, Any]


def _ratios(
    parts: Mapping[Any, tuple[Floats, NDArray[np.bool_]]], member: NDArray[np.intp], samples: int, seed: int
) -> dict[Any, _Ratio]:
    """Mean of each `values[mask]`, both [N], with its interval; `member` [N] is the number of a pair's prompt."""
    if not len(member):
        return {name: {"n": 0, "prompts": 0, "mean": None, "low": None, "high": None} for name in parts}
    means = [float(values[mask].mean()) if mask.any() else 0.0 for values, mask in parts.values()]
    # The mean over pairs is a ratio: the sum over the pairs of the drawn prompts, divided by their number.
    sums = [np.bincount(member, (v - mean) * mask) for (v, mask), mean in zip(parts.values(), means, strict=True)]
    sizes = [np.bincount(member, mask.astype(float)) for _, mask in parts.values()]
    drawn = bootstrap_means(np.stack([*sums, *sizes], axis=1), samples, seed)
    ratios = {}
    for i, (name, (_, mask)) in enumerate(parts.items()):
        ratio: _Ratio = {"n": int(mask.sum()), "prompts": int((sizes[i] > 0).sum())}
        if mask.any():
            present = drawn[:, len(parts) + i] > 0
            low, high = percentile_interval(drawn[present, i] / drawn[present, len(parts) + i])
            ratio |= {"mean": means[i], "low": means[i] + float(low), "high": means[i] + float(high)}
        else:
            ratio |= {"mean": None, "low": None, "high": None}
        ratios[name] = ratio
    return ratios


def _share(ratio: _Ratio) -> _Ratio:
    """A share with its interval; the one of exactly 0 or 1, whose resamples cannot differ, is Clopper and Pearson's."""
    if ratio["mean"] is None:
        return ratio
    ratio = ratio | {"low": max(ratio["low"], 0.0), "high": min(ratio["high"], 1.0)}  # outside by rounding only
    if ratio["mean"] == 1:
        return ratio | {"low": ((1 - LEVEL) / 2) ** (1 / ratio["prompts"])}
    if ratio["mean"] == 0:
        return ratio | {"high": 1 - ((1 - LEVEL) / 2) ** (1 / ratio["prompts"])}
    return ratio


def _average_ranks(values: Floats) -> Floats:
    """Ranks [N] of `values` [N] from 1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlation(a: Floats, b: Floats, member: NDArray[np.intp], samples: int, seed: int) -> dict[str, float | None]:
    """Pearson's correlation of `a` [N] and `b` [N] and its percentile interval, by resamples as in `_ratios`."""
    if len(a) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"value": None, "low": None, "high": None}
    u, v = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    sums = np.stack([np.bincount(member, c) for c in (np.ones(len(u)), u, v, u * u, v * v, u * v)], axis=1)
    drawn = bootstrap_means(sums, samples, seed)
    mean_u, mean_v, uu, vv, uv = (drawn[:, i] / drawn[:, 0] for i in range(1, 6))
    spread = (uu - mean_u**2) * (vv - mean_v**2)
    kept = spread > 1e-12
    correlations = np.clip((uv - mean_u * mean_v)[kept] / np.sqrt(spread[kept]), -1, 1)
    value = float(np.clip((u * v).mean(), -1, 1))
    low, high = _ends(correlations)
    return {"value": value, "low": low, "high": high}


def _ends(resampled: Floats) -> tuple[float | None, float | None]:
    """Ends of the central 95% of a number's resamples; None where it was defined in none of them."""
    if not len(resampled):
        return None, None
    low, high = percentile_interval(resampled)
    return float(low), float(high)


def _only_length(result: dict[str, Any]) -> bool | None:
    def above(ratio: _Ratio, chance: float) -> bool:
        return ratio["low"] is not None and ratio["low"] > chance

    if result["prompts"] < FEWEST_PROMPTS:
        return None
    at_equal_length = next(share for share in result["by_length"] if share["chosen_is"] == "about equal")
    if (
        above(result["length_rule_wrong"], 0.5)
        or (above(result["accuracy"], 0.5) and above(result["gain_over_length"], 0))
        or (above(at_equal_length, 0.5) and above(result["gain_at_equal_length"], 0))
    ):
        return False
    wrong, rank = result["length_rule_wrong"]["high"], result["spearman"]["value"]
    follows = (wrong is not None and wrong < 0.5) or (rank is not None and abs(rank) >= _CORRELATION_OF_A_RULER)
    return True if above(result["length_rule_right"], 0.5) and follows else None


def _quality_sentence(result: dict[str, Any], only_length: bool | None) -> str:
    if result["prompts"] < FEWEST_PROMPTS:
        return (
            f"{result['n']} validation pairs of {result['prompts']} prompts are too few to say whether the margin "
            "adapter measures more than length."
        )

    def share(key: str) -> str:
        ratio = result[key]
        if ratio["mean"] is None:
            return "none, for there is no such pair"
        return f"{ratio['mean']:.0%} [{ratio['low']:.0%}, {ratio['high']:.0%}] of {ratio['n']} pairs"

    rule = result["length_rule"]
    rank = result["spearman"]["value"]
    correlation = "" if rank is None else f"; its reward's rank correlation with length is {rank:.2f}"
    numbers = (
        f"it is right in {share('accuracy')}; where the {rule} response is the rejected one, in "
        f"{share('length_rule_wrong')}; where it is the chosen one, in {share('length_rule_right')}{correlation}"
    )
    if only_length:
        return f"The margin adapter measures length, and nothing shows that it measures more: {numbers}."
    if only_length is None:
        return f"It is not shown whether the margin adapter measures more than length: {numbers}."
    gain = result["gain_over_length"]
    better = f'; against the rule "{rule} wins" it gains {_points(gain)} percentage points over all pairs'
    equal = result["gain_at_equal_length"]
    at_equal = "" if equal["mean"] is None else f" and {_points(equal)} over the {equal['n']} of about equal length"
    return f"The margin adapter measures more than length: {numbers}{better}{at_equal}."


def _points(ratio: _Ratio) -> str:
    return f"{100 * ratio['mean']:.0f} [{100 * ratio['low']:.0f}, {100 * ratio['high']:.0f}]"


def sanity_metrics(margins: ArrayLike, groups: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    """Does the margin adapter prefer chosen over rejected?

    Args:
        margins: [N] r(chosen) - r(rejected) of the pairs, in reward units.
        groups: [N] the prompt of each pair: prompts are resampled with all their pairs.
        samples: bootstrap resamples.
        seed: seed of the bootstrap.

    Keys: n (pairs), groups, accuracy (share above 0, a tie counts half), accuracy_low, accuracy_high, mean_margin,
    margin_low, margin_high (95% intervals), margin_sd, ties. Without pairs n is 0 and the numbers are null.
    Raises HelpsteerError where a margin is NaN or infinite.
    """
    values = np.asarray(margins, dtype=np.float64)
    _require_finite(values, "margin")
    metrics: dict[str, Any] = dict.fromkeys(
        ("accuracy", "accuracy_low", "accuracy_high", "mean_margin", "margin_low", "margin_high", "margin_sd")
    )
    metrics |= {"n": len(values), "groups": 0, "ties": int((values == 0).sum())}
    if len(values) == 0:
        return metrics
    won = _wins(values)
    member = np.unique(np.array(groups), return_inverse=True)[1]
    sizes = np.bincount(member)
    accuracy, mean_margin = float(won.mean()), float(values.mean())
    # The mean over pairs is a ratio, as in `_ratios`.
    sums = np.stack(
        [np.bincount(member, won - accuracy), np.bincount(member, values - mean_margin), sizes.astype(float)], axis=1
    )
    means = bootstrap_means(sums, samples, seed)
    low, high = percentile_interval(means[:, :2] / means[:, 2:] + [accuracy, mean_margin])
    return metrics | {
        "groups": len(sizes),
        "accuracy": accuracy,
        "accuracy_low": float(low[0]),
        "accuracy_high": float(high[0]),
        "mean_margin": mean_margin,
        "margin_low": float(low[1]),
        "margin_high": float(high[1]),
        "margin_sd": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


def judge_margin_adapter(metrics: Mapping[str, Any], min_accuracy: float) -> list[str]:
    """Reasons why a margin adapter with these `sanity_metrics` must not be used, a sentence each; empty if it passes.

    It passes if there are validation pairs, more than `min_accuracy` of them are ranked right, and the 95% interval of
    the mean margin lies above 0.
    """
    if metrics["n"] == 0:
        return [
            "there are no validation pairs to judge the margin adapter on (n = 0); give the source validation rows "
            "with unequal ratings of data.margin_attribute, or raise data.validation_share"
        ]
    reasons = []
    if not metrics["accuracy"] > min_accuracy:
        reasons.append(
            f"it prefers chosen over rejected in {metrics['accuracy']:.1%} of {metrics['n']} validation pairs, and "
            f"checks.margin_adapter_min_accuracy asks for more than {min_accuracy:.1%}; train it longer "
            "(margin_adapter.steps or epochs), try another margin_adapter.learning_rate, or check "
            "that data.margin_attribute can be told from the text"
        )
    if not metrics["margin_low"] > 0:
        reasons.append(
            f"its mean margin is {metrics['mean_margin']:.4g} with the 95% interval [{metrics['margin_low']:.4g}, "
            f"{metrics['margin_high']:.4g}] over {metrics['groups']} prompts, which does not lie above 0; train it "
            "longer, or validate on more prompts (data.max_validation_prompts, data.validation_share)"
        )
    return reasons


WORST_FAILURES = 10
"""Number of the most wrongly ranked pairs that are shown."""


def judge_pairs(
    pairs: pa.Table, log_ratios: dict[str, float], *, beta: float, samples: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Does the adapter prefer chosen over rejected on these pairs?

    Args:
        pairs: validation pairs of the attribute that the adapter was trained on.
        log_ratios: log p_adapter - log p_sft by response_id, nats.
        beta: the DPO beta that trained the adapter; its implicit reward is beta * log-ratio.
        samples: bootstrap resamples (of prompts).
        seed: seed of the bootstrap.

    Returns:
        `sanity_metrics` of r(chosen) - r(rejected), and the pairs that the adapter ranks most wrongly: margin, prompt,
        chosen and rejected.
    """
    rows = pairs.select(["prompt_id", "prompt", "chosen_id", "rejected_id", "chosen", "rejected"]).to_pylist()
    differences = np.array([beta * (log_ratios[r["chosen_id"]] - log_ratios[r["rejected_id"]]) for r in rows])
    metrics = sanity_metrics(differences, [row["prompt_id"] for row in rows], samples, seed)
    failures = [
        {"margin": float(differences[i])} | {key: rows[i][key] for key in ("prompt", "chosen", "rejected")}
        for i in np.argsort(differences, kind="stable")[:WORST_FAILURES]
        if differences[i] < 0
    ]
    return metrics, failures

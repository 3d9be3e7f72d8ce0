"""What might make a trade-off look like something it is not: degenerate text, length, an adapter that measures length.

Pure, seeded functions. As in `statistics`, prompts are resampled with all that belongs to them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparisons import Differences, Measure, Verdict, listed, number, with_interval
from helpsteer_assets.modpo.statistics import (
    LEVEL,
    Floats,
    Interval,
    PolicyScores,
    average_ranks,
    bootstrap_interval,
    bootstrap_means,
    reference_and_weights,
    score_table,
    simultaneous_interval,
)

# Degenerate text

REPETITION_LIMIT = 0.5
"""Text in which more than this share of the 4-grams occurred before counts as degenerate: it mostly repeats itself."""
_NGRAM = 4
_LONGEST_WORD = 40
_UNITS = re.compile(
    # Scripts written without spaces: Thai to Myanmar, Khmer, kana, Chinese characters.
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
    "|[^\\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


def repetition(text: str) -> float:
    """Share of the word 4-grams of `text` that occurred before in it: 0 (none, or fewer than 4 words) up to below 1.

    1 - (distinct 4-grams) / (4-grams): seq-rep-4 of Welleck et al., "Neural Text Generation with Unlikelihood
    Training", ICLR 2020, section 6, on words instead of tokens. Where a script has no spaces, and in a word of more
    than 40 characters, each character stands for a word. Time grows linearly with the text.
    """
    units: list[str] = []
    for unit in _UNITS.findall(text):
        units.extend(unit if len(unit) > _LONGEST_WORD else (unit,))
    grams = len(units) - _NGRAM + 1
    if grams < 1:
        return 0.0
    return 1 - len(set(zip(*(units[i:] for i in range(_NGRAM)), strict=False))) / grams


def is_empty(text: str) -> bool:
    """Whether `text` shows nothing: no character but spaces, control and format characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def is_degenerate(text: str) -> bool:
    """Whether `text` is empty or mostly repeats itself (`repetition` above REPETITION_LIMIT)."""
    return is_empty(text) or repetition(text) > REPETITION_LIMIT


# Equal length

CLOSE_LENGTHS = 0.1
"""Two responses are of about equal length if the shorter is shorter by at most this share of the longer."""
_FEWEST_PROMPTS = 10
"""Fewer give no line and no interval worth showing."""


@dataclass(frozen=True)
class EqualLength:
    """The difference of one measure between a policy and the SFT model, as it is and with length held fixed.

    `raw` is the paired mean difference over `prompts` prompts. `adjusted` is its value at equal length by regression,
    with the ends of its simultaneous 95% interval; `per_token` is the slope of the regression; both are None where
    they are undefined. `extrapolated` tells that nearly all responses changed their length one way, so that equal
    length lies at the edge of what was seen or beyond. `close` is the mean difference over the `close_prompts` whose
    two responses are of about equal length (pointwise 95% interval), None with fewer than 10. `verdict` is higher or
    lower where the whole interval of `adjusted` says so, and that of `close` too unless it is None.
    """

    w: str
    measure: str
    prompts: int
    raw: float
    adjusted: Interval | None
    per_token: float | None
    extrapolated: bool
    close: Interval | None
    close_prompts: int
    verdict: Verdict
    sentence: str


def at_equal_length(
    policies: Sequence[PolicyScores],
    measure: Measure,
    samples: int,
    seed: int,
    *,
    length: str = "response_tokens",
) -> list[EqualLength]:
    """Does `measure` still differ from the SFT model when length is held fixed? One answer per weight, w ascending.

    Per policy, least squares over prompts: (measure - SFT's) = a + b (length - SFT's length). The intercept a is the
    difference that the line gives two responses of one prompt that are equally long: an analysis of covariance within
    prompts, as Dubois et al., "Length-Controlled AlpacaEval", 2024, do by a logistic model. It assumes that the measure
    changes linearly with length, equally in all prompts, and that what else decides the change of length does not
    decide the measure: where a policy is longer just where it is better, b takes part of its merit. Length is itself a
    result of the policy, so a says what else moved, not what a policy held to a length would do. `close` assumes no
    line, and looks at fewer prompts, which need not be like the others. Intervals resample prompts; those of `adjusted`
    hold for all weights at once (`simultaneous_interval`).

    Equal responses count as of equal length, with a difference of 0, and hold the line there. With fewer than 10
    prompts whose responses changed their length there is no line. `policies` are the SFT model's scores and those of
    the weights; `length` is the measure that counts tokens. Raises as `score_table`, and HelpsteerError without the
    SFT model.
    """
    reference, compared = reference_and_weights(policies)
    if not compared:
        return []
    table = score_table([reference, *compared], [measure.name, length])
    changes = table[:, 1:] - table[:, :1]
    y, x = changes[:, :, 0], changes[:, :, 1]
    rows, raw = len(table), y.mean(axis=0)
    changed = (x != 0).sum(axis=0)
    usable = (np.ptp(x, axis=0) > 0) & (changed >= _FEWEST_PROMPTS)
    slopes = np.full(len(compared), np.nan)
    adjusted: list[Interval | None] = [None] * len(compared)
    if usable.any():
        intercepts, slopes[usable], low, high = _intercepts(x[:, usable], y[:, usable], samples, seed)
        for position, i in enumerate(np.flatnonzero(usable)):
            adjusted[i] = Interval(float(intercepts[position]), float(low[position]), float(high[position]))
    close = _about_equal(table[:, 1:, 1], table[:, :1, 1])
    found = []
    for i, scores in enumerate(compared):
        near = y[close[:, i], i]
        extrapolated = bool(min((x[:, i] <= 0).mean(), (x[:, i] >= 0).mean()) < 0.05)
        cross_check = bootstrap_interval(near, samples, seed) if len(near) >= _FEWEST_PROMPTS else None
        sides = {_side(interval) for interval in (adjusted[i], cross_check) if interval is not None}
        decided = adjusted[i] is not None and len(sides) == 1
        found.append(
            EqualLength(
                w=scores.w or "",
                measure=measure.name,
                prompts=rows,
                raw=float(raw[i]),
                adjusted=adjusted[i],
                per_token=float(slopes[i]) if usable[i] else None,
                extrapolated=extrapolated,
                close=cross_check,
                close_prompts=len(near),
                verdict=sides.pop() if decided else "undecided",
                sentence="",
            )
        )
        found[-1] = replace(found[-1], sentence=_equal_length_sentence(found[-1], measure, int(changed[i])))
    return found


def length_caveats(differences: Differences, found: Sequence[EqualLength], measure: Measure) -> list[str]:
    """A sentence on the differences in `measure` that are shown as the lengths are and not at equal length, if any."""
    gone = [
        own.w
        for own in found
        if own.measure == measure.name and differences[own.w][measure.name].verdict not in ("undecided", own.verdict)
    ]
    if not gone:
        return []
    return [
        f"At equal length no difference to SFT in {measure.title} is shown at {listed(gone)}: what differs there may "
        "be length alone."
    ]


def _side(interval: Interval) -> Verdict:
    return "higher" if interval.low > 0 else "lower" if interval.high < 0 else "undecided"


def _about_equal(a: Floats, b: Floats) -> NDArray[np.bool_]:
    return np.abs(a - b) <= CLOSE_LENGTHS * np.maximum(a, b)


def _intercepts(x: Floats, y: Floats, samples: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Intercepts and slopes [W] of the columns' lines y = a + b x, and the ends of the intercepts' intervals."""
    # A line depends on four means only, so resampled means give resampled lines. Centring keeps their digits.
    centre_x, centre_y, width = x.mean(axis=0), y.mean(axis=0), x.shape[1]
    u, v = x - centre_x, y - centre_y
    moments = np.concatenate([u, v, u * u, u * v], axis=1)

    def line(means: Floats) -> tuple[Floats, Floats]:
        mean_u, mean_v, mean_uu, mean_uv = (means[..., i * width : (i + 1) * width] for i in range(4))
        slope = (mean_uv - mean_u * mean_v) / (mean_uu - mean_u**2)
        return mean_v + centre_y - slope * (mean_u + centre_x), slope

    # Where length explains all, as it does a length penalty, what is left is rounding.
    scale = np.abs(y).max(axis=0)
    scale[scale == 0] = 1.0
    intercepts, slopes = line(moments.mean(axis=0))
    intercepts = np.round(intercepts / scale, 12) * scale
    means = bootstrap_means(moments, samples, seed)
    spread = means[:, 2 * width : 3 * width] - means[:, :width] ** 2
    # A resample may repeat so few prompts that it has no line.
    means = means[(spread > 1e-9 * (u * u).mean(axis=0)).all(axis=1)]
    low, high, _ = simultaneous_interval(intercepts, np.round(line(means)[0] / scale, 12) * scale, len(x))
    return intercepts, slopes, low, high


def _equal_length_sentence(found: EqualLength, measure: Measure, changed: int) -> str:
    adjusted, close = found.adjusted, found.close
    if adjusted is None:
        why = "all by the same" if changed >= _FEWEST_PROMPTS else "too few to tell more"
        sentence = f"{changed} responses changed their length, {why}: no line of {measure.title} on length"
    else:
        seen = "is not shown to differ from SFT's"
        if found.verdict != "undecided":
            seen = f"is {found.verdict} than SFT's"
        elif _side(adjusted) != "undecided":
            seen = f"is {_side(adjusted)} than SFT's by the line, which prompts of about equal length do not show"
        raw = number(found.raw, adjusted.high - adjusted.low, measure)
        numbers = with_interval(adjusted.mean, adjusted.low, adjusted.high, measure)
        sentence = f"at equal length {measure.title} {seen} ({numbers}; as the lengths are, {raw})"
    if close is not None:
        near = with_interval(close.mean, close.low, close.high, measure)
        sentence += f"; over the {found.close_prompts} prompts whose lengths differ by a tenth at most: {near}"
    doubt = " Hardly any response changed its length the other way: this is extrapolated." if found.extrapolated else ""
    return f"w={found.w}: {sentence}.{doubt}"


# Quality of the implicit reward

_BINS = ("much shorter", "shorter", "about equal", "longer", "much longer")
"""Chosen against rejected: much shorter than half, much longer than twice; about equal as CLOSE_LENGTHS says."""
_CORRELATION_OF_A_RULER = 0.9


def margin_adapter_quality(
    rating_gap: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    chosen_log_ratio: ArrayLike,
    rejected_log_ratio: ArrayLike,
    prompt_ids: Sequence[str],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Does the margin adapter measure its attribute, or length? All arrays [N], one entry per validation pair.

    Log-ratios are log p_adapter - log p_sft in nats, unscaled; lengths in tokens; `rating_gap` is the chosen minus the
    rejected rating. A pair counts as right where the chosen log-ratio is the larger, half where they are equal.

    A share is {n (pairs), prompts, mean, low, high}: a 95% percentile interval resampling prompts with all their
    pairs, null without pairs. Where all pairs are right (or all wrong), no resample differs, and the interval is that
    of Clopper and Pearson, 1934, with the prompts as trials. A correlation is {value, low, high}, null where undefined.
    Intervals are pointwise. JSON-able keys:

    n, prompts: pairs and prompts
    accuracy: share of pairs ranked right
    by_rating_gap: a share per gap, ascending, with its `rating_gap`
    by_length: a share per `chosen_is` (much shorter, shorter, about equal, longer, much longer than rejected)
    prefers_longer: share of the pairs of unequal length in which the adapter ranks the longer response higher
    pearson, spearman: correlations of log-ratio and tokens over the distinct responses (two of one prompt with the same
        length and log-ratio count once); the resamples of `spearman` keep the ranks of the whole sample
    longer_wins: accuracy of the rule "the longer response is the chosen one" on the same pairs (equal length: half)
    length_rule: "longer" or "shorter": which of the two the adapter prefers more often
    length_rule_right, length_rule_wrong: its accuracy where preferring by that rule alone would be right, or wrong
    gain_over_length: accuracy minus that of the length rule on the same pairs
    gain_at_equal_length: the same over pairs of about equal length
    only_length: False if one of these shows that it tells more than length: length_rule_wrong above 1/2, or a gain
        above 0 where its accuracy is above 1/2, over all pairs or over those of about equal length. Else True if it
        does what a ruler does: right where the rule is right (above 1/2), and wrong where the rule is wrong (below 1/2)
        or at a rank correlation with length of 0.9 or more either way. None if neither is shown, or with fewer than 10
        prompts. Above and below speak of the whole interval.
    sentence: the verdict in words, with its numbers

    A noisy measure of length is right less often than the length rule or less often than chance, whichever way the
    rule points, which is why both together show more than length.

    Raises HelpsteerError where a number is NaN or infinite.
    """
    columns = (rating_gap, chosen_tokens, rejected_tokens, chosen_log_ratio, rejected_log_ratio)
    gap, chosen, rejected, chosen_reward, rejected_reward = (np.asarray(c, dtype=np.float64) for c in columns)
    if any(values.shape != (len(prompt_ids),) for values in (gap, chosen, rejected, chosen_reward, rejected_reward)):
        raise ValueError("margin_adapter_quality wants one entry per pair in each of its arrays")
    bad = int((~np.isfinite(gap + chosen + rejected + chosen_reward + rejected_reward)).sum())
    if bad:
        raise HelpsteerError(
            f"the log-ratio or length of {bad} of {len(gap)} validation pairs is NaN or infinite: the margin adapter "
            "is broken; train it with a lower margin_adapter.learning_rate, or in fp32"
        )
    # By the ids' names, so that no result depends on the order of pairs.
    member = np.unique(np.array(prompt_ids, dtype=str), return_inverse=True)[1]
    right = _wins(chosen_reward - rejected_reward)
    longer_wins = _wins(chosen - rejected)
    unequal = chosen != rejected
    chosen_longer = chosen > rejected
    prefers_longer = np.where(chosen_longer, right, 1 - right)
    rule = "longer" if not unequal.any() or prefers_longer[unequal].mean() >= 0.5 else "shorter"
    rule_right = longer_wins if rule == "longer" else 1 - longer_wins
    everything = np.ones(len(gap), dtype=bool)
    equal = _about_equal(chosen, rejected)
    much_shorter, much_longer = 2 * chosen < rejected, chosen > 2 * rejected
    shorter, longer = ~chosen_longer & ~equal & ~much_shorter, chosen_longer & ~equal & ~much_longer
    gaps = np.unique(gap)
    asked = {
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
    masks = [*(gap == g for g in gaps), much_shorter, shorter, equal, longer, much_longer]
    found = _ratios([*asked.values(), *gains.values(), *((right, mask) for mask in masks)], member, samples, seed)
    by_part = [_share(ratio) for ratio in found[len(asked) + len(gains) :]]
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
        **{name: _share(ratio) for name, ratio in zip(asked, found, strict=False)},
        **{name: ratio for name, ratio in zip(gains, found[len(asked) :], strict=False)},
        "by_rating_gap": [{"rating_gap": int(g)} | share for g, share in zip(gaps, by_part, strict=False)],
        "by_length": [{"chosen_is": b} | share for b, share in zip(_BINS, by_part[len(gaps) :], strict=True)],
        "pearson": _correlation(rewards, tokens, owner, samples, seed),
        "spearman": _correlation(average_ranks(rewards), average_ranks(tokens), owner, samples, seed),
        "length_rule": rule,
    }
    only_length = _only_length(result)
    return result | {"only_length": only_length, "sentence": _quality_sentence(result, only_length)}


def _wins(differences: Floats) -> Floats:
    return (differences > 0) + 0.5 * (differences == 0)


_Ratio = dict[str, Any]


def _ratios(
    asked: Sequence[tuple[Floats, NDArray[np.bool_]]], member: NDArray[np.intp], samples: int, seed: int
) -> list[_Ratio]:
    """Mean of each `values[mask]`, both [N], with its interval, resampling the clusters that `member` [N] numbers."""
    if not len(member):
        return [{"n": 0, "prompts": 0, "mean": None, "low": None, "high": None} for _ in asked]
    means = [float(values[mask].mean()) if mask.any() else 0.0 for values, mask in asked]
    # The mean over pairs is a ratio: what the drawn prompts' pairs add up to, over how many they are.
    sums = [np.bincount(member, (values - mean) * mask) for (values, mask), mean in zip(asked, means, strict=True)]
    sizes = [np.bincount(member, mask.astype(float)) for _, mask in asked]
    drawn = bootstrap_means(np.stack([*sums, *sizes], axis=1), samples, seed)
    found = []
    for i, (_, mask) in enumerate(asked):
        present = drawn[:, len(asked) + i] > 0
        low, high = None, None
        if mask.any():
            deviations = drawn[present, i] / drawn[present, len(asked) + i]
            low, high = (means[i] + float(d) for d in np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        prompts = int((sizes[i] > 0).sum())
        found.append(
            {"n": int(mask.sum()), "prompts": prompts, "mean": means[i] if prompts else None, "low": low, "high": high}
        )
    return found


def _share(ratio: _Ratio) -> _Ratio:
    """A ratio of 0 or 1 with the interval of Clopper and Pearson in place of that of resamples that cannot differ."""
    if ratio["mean"] is None:
        return ratio
    ratio = ratio | {"low": max(ratio["low"], 0.0), "high": min(ratio["high"], 1.0)}  # but for rounding they are
    if ratio["mean"] == 1:
        return ratio | {"low": ((1 - LEVEL) / 2) ** (1 / ratio["prompts"])}
    if ratio["mean"] == 0:
        return ratio | {"high": 1 - ((1 - LEVEL) / 2) ** (1 / ratio["prompts"])}
    return ratio


def _correlation(a: Floats, b: Floats, member: NDArray[np.intp], samples: int, seed: int) -> dict[str, float | None]:
    """Pearson's correlation of `a` [N] and `b` [N] and its percentile interval, resampling the clusters of `member`."""
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
    if not len(correlations):
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(correlations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def _only_length(result: dict[str, Any]) -> bool | None:
    def above(ratio: _Ratio, chance: float) -> bool:
        return ratio["low"] is not None and ratio["low"] > chance

    if result["prompts"] < _FEWEST_PROMPTS:
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
    if result["prompts"] < _FEWEST_PROMPTS:
        return (
            f"{result['n']} validation pairs of {result['prompts']} prompts are too few to say whether the margin "
            "adapter measures more than length."
        )

    def share(key: str) -> str:
        found = result[key]
        if found["mean"] is None:
            return "none, for there is no such pair"
        return f"{found['mean']:.0%} [{found['low']:.0%}, {found['high']:.0%}] of {found['n']} pairs"

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


# KL


@dataclass(frozen=True)
class KlByPrompt:
    """Estimates per prompt, by sorted prompt id: `kl` [N] in nats, `capped` [N] the share of its samples cut."""

    prompt_ids: list[str]
    kl: Floats
    capped: Floats


def kl_by_prompt(prompt_ids: Sequence[str], log_ratios: ArrayLike, capped: Sequence[bool]) -> KlByPrompt:
    """KL(policy || SFT) of each prompt's responses, from samples of the policy; all arguments one entry per sample.

    `log_ratios` are log p_policy(y|x) - log p_sft(y|x) in nats of responses y drawn from the policy itself, at
    temperature 1 with nothing altered; `capped` tells which were cut at the length limit. The estimate is their plain
    mean: k1 of Schulman, "Approximating KL Divergence", 2020. It is unbiased and may by chance be negative. A sample
    cut after T tokens holds the log-ratio of these T tokens, so capped samples give the KL of the responses' first T
    tokens: never more than that of whole responses (data-processing inequality; Cover and Thomas, "Elements of
    Information Theory", 2006, section 2.8), so with capped samples the estimate is of a lower bound.

    Raises HelpsteerError where a log-ratio is NaN or infinite.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if not len(prompt_ids) == len(values) == len(capped):
        raise ValueError("kl_by_prompt wants one prompt id, log-ratio and mark of being capped per sample")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise HelpsteerError(
            f"the log-ratio of {bad} of {len(values)} samples is NaN or infinite: the policy is broken; train it "
            "with a lower modpo.learning_rate, or in fp32"
        )
    if not len(values):
        return KlByPrompt([], np.zeros(0), np.zeros(0))
    names, member = np.unique(np.array(prompt_ids, dtype=str), return_inverse=True)
    sizes = np.bincount(member)
    cut = np.asarray(capped, dtype=np.float64)
    return KlByPrompt(names.tolist(), np.bincount(member, values) / sizes, np.bincount(member, cut) / sizes)

"""Does a measure still differ from the SFT model's at equal length? Pure, seeded functions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helpsteer_assets.modpo.comparison.bootstrap import (
    Floats,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    simultaneous_interval,
)
from helpsteer_assets.modpo.comparison.differences import (
    Differences,
    Measure,
    Verdict,
    listed,
    number,
    side_of_zero,
    with_interval,
)
from helpsteer_assets.modpo.comparison.scores import PolicyScores, score_table

CLOSE_LENGTHS = 0.1
"""Two responses are of about equal length if the shorter is shorter by at most this share of the longer."""
FEWEST_PROMPTS = 10
"""Fewer prompts get no line and no verdict."""


@dataclass(frozen=True)
class EqualLength:
    """The difference of one measure between a policy and the SFT model, as it is and at equal length."""

    w: str
    measure: str
    prompts: int
    raw: float
    """Paired mean difference over the prompts."""
    adjusted: Interval | None
    """The difference at equal length by regression, with its simultaneous 95% interval; None without a line."""
    per_token: float | None
    """Slope of the regression; None without a line."""
    extrapolated: bool
    """Whether nearly all responses changed their length the same way, so that equal length was hardly seen."""
    close: Interval | None
    """Mean difference over the prompts whose two responses are of about equal length, with its pointwise 95% interval;
    None with fewer than 10 such prompts."""
    close_prompts: int
    """How many such prompts there are."""
    verdict: Verdict
    """The side that the whole interval of `adjusted` shows, and that of `close` too unless it is None."""
    sentence: str


def at_equal_length(policies: Sequence[PolicyScores], measure: Measure, samples: int, seed: int) -> list[EqualLength]:
    """Does `measure` still differ from the SFT model's at equal length? One answer per weight, w ascending.

    Per policy, least squares over prompts: (measure - SFT's) = a + b (response tokens - SFT's). The intercept a is the
    difference on the line for two responses to one prompt that are equally long: an analysis of covariance within
    prompts, as Dubois et al., "Length-Controlled AlpacaEval", 2024, do by a logistic model. It assumes that the measure
    changes linearly with length, equally in all prompts, and that no other cause changes both length and measure: if a
    policy is longer only where it is better, b takes a part of that gain. Length is itself a result of the policy, so a
    tells what else changed, not what a policy would do if its length were fixed. `close` assumes no line, but uses
    fewer prompts, which may differ from the others. Intervals resample prompts; those of `adjusted` hold for all
    weights at once (`simultaneous_interval`).

    Unchanged responses count with a difference of 0 at equal length. With fewer than 10 prompts whose responses changed
    their length there is no line. `policies` are the SFT model's scores and then those of the weights. Raises as
    `score_table`.
    """
    compared = policies[1:]
    table = score_table(policies, [measure.name, "response_tokens"])
    changes = table[:, 1:] - table[:, :1]
    y, x = changes[:, :, 0], changes[:, :, 1]
    rows, raw = len(table), y.mean(axis=0)
    changed = (x != 0).sum(axis=0)
    usable = (np.ptp(x, axis=0) > 0) & (changed >= FEWEST_PROMPTS)
    slopes = np.full(len(compared), np.nan)
    adjusted: list[Interval | None] = [None] * len(compared)
    if usable.any():
        intercepts, slopes[usable], low, high = _intercepts(x[:, usable], y[:, usable], samples, seed)
        for position, i in enumerate(np.flatnonzero(usable).tolist()):
            adjusted[i] = Interval(float(intercepts[position]), float(low[position]), float(high[position]))
    close = about_equal(table[:, 1:, 1], table[:, :1, 1])
    answers = []
    for i, scores in enumerate(compared):
        near = y[close[:, i], i]
        cross_check = bootstrap_interval(near, samples, seed) if len(near) >= FEWEST_PROMPTS else None
        sides = {
            side_of_zero(interval.low, interval.high) for interval in (adjusted[i], cross_check) if interval is not None
        }
        decided = adjusted[i] is not None and len(sides) == 1
        answer = EqualLength(
            w=scores.w or "",
            measure=measure.name,
            prompts=rows,
            raw=float(raw[i]),
            adjusted=adjusted[i],
            per_token=float(slopes[i]) if usable[i] else None,
            extrapolated=bool(min((x[:, i] <= 0).mean(), (x[:, i] >= 0).mean()) < 0.05),
            close=cross_check,
            close_prompts=len(near),
            verdict=sides.pop() if decided else "undecided",
            sentence="",
        )
        answers.append(replace(answer, sentence=_sentence(answer, measure, int(changed[i]))))
    return answers


def length_caveats(differences: Differences, equal_length: Sequence[EqualLength], measure: Measure) -> list[str]:
    """A sentence about the shown differences in `measure` that are not shown at equal length, if there are any."""
    gone = [
        own.w
        for own in equal_length
        if own.measure == measure.name and differences[own.w][measure.name].verdict not in ("undecided", own.verdict)
    ]
    if not gone:
        return []
    return [
        f"At equal length no difference to SFT in {measure.title} is shown at {listed(gone)}: what differs there may "
        "be length alone."
    ]


def about_equal(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Whether lengths `a` and `b` differ by at most CLOSE_LENGTHS of the longer one, elementwise."""
    return np.abs(a - b) <= CLOSE_LENGTHS * np.maximum(a, b)


def _intercepts(x: Floats, y: Floats, samples: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Intercepts and slopes [W] of the columns' lines y = a + b x, and the ends of the intercepts' intervals."""
    # A line depends on four means only, so resampled means give resampled lines. Centring keeps precision.
    centre_x, centre_y, width = x.mean(axis=0), y.mean(axis=0), x.shape[1]
    u, v = x - centre_x, y - centre_y
    moments = np.concatenate([u, v, u * u, u * v], axis=1)

    def line(means: Floats) -> tuple[Floats, Floats]:
        mean_u, mean_v, mean_uu, mean_uv = (means[..., i * width : (i + 1) * width] for i in range(4))
        slope = (mean_uv - mean_u * mean_v) / (mean_uu - mean_u**2)
        return mean_v + centre_y - slope * (mean_u + centre_x), slope

    # Where length explains everything, as with a length penalty, the rest is rounding.
    scale = np.abs(y).max(axis=0)
    scale[scale == 0] = 1.0
    intercepts, slopes = line(moments.mean(axis=0))
    intercepts = np.round(intercepts / scale, 12) * scale
    means = bootstrap_means(moments, samples, seed)
    spread = means[:, 2 * width : 3 * width] - means[:, :width] ** 2
    # A resample may consist of so few different prompts that it has no line.
    means = means[(spread > 1e-9 * (u * u).mean(axis=0)).all(axis=1)]
    low, high, _ = simultaneous_interval(intercepts, np.round(line(means)[0] / scale, 12) * scale, len(x))
    return intercepts, slopes, low, high


def _sentence(answer: EqualLength, measure: Measure, changed: int) -> str:
    adjusted, close = answer.adjusted, answer.close
    if adjusted is None:
        why = "all by the same" if changed >= FEWEST_PROMPTS else "too few to tell more"
        sentence = f"{changed} responses changed their length, {why}: no line of {measure.title} on length"
    else:
        side = side_of_zero(adjusted.low, adjusted.high)
        seen = "is not shown to differ from SFT's" if side == "undecided" else f"is {side} than SFT's"
        if side != answer.verdict:
            seen += " by the line, which prompts of about equal length do not show"
        raw = number(answer.raw, adjusted.high - adjusted.low, measure)
        numbers = with_interval(adjusted.mean, adjusted.low, adjusted.high, measure)
        sentence = f"at equal length {measure.title} {seen} ({numbers}; as the lengths are, {raw})"
    if close is not None:
        near = with_interval(close.mean, close.low, close.high, measure)
        sentence += f"; over the {answer.close_prompts} prompts whose lengths differ by a tenth at most: {near}"
    if answer.extrapolated:
        sentence += ". Hardly any response changed its length the other way: this is extrapolated"
    return f"w={answer.w}: {sentence}."

"""Differences between policies at equal length of their responses.

Pure, seeded functions. As in `bootstrap`, prompts are resampled with all that belongs to them.
"""

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
from helpsteer_assets.modpo.comparison.differences import Differences, Measure, Verdict, listed, number, with_interval
from helpsteer_assets.modpo.comparison.scores import PolicyScores, reference_and_weights, score_table

CLOSE_LENGTHS = 0.1
"""Two responses are of about equal length if they differ by at most this share of the longer one."""
_FEWEST_PROMPTS = 10
"""With fewer prompts, no line and no interval is worth showing."""


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
    results = []
    for i, scores in enumerate(compared):
        near = y[close[:, i], i]
        extrapolated = bool(min((x[:, i] <= 0).mean(), (x[:, i] >= 0).mean()) < 0.05)
        cross_check = bootstrap_interval(near, samples, seed) if len(near) >= _FEWEST_PROMPTS else None
        sides = {_side(interval) for interval in (adjusted[i], cross_check) if interval is not None}
        decided = adjusted[i] is not None and len(sides) == 1
        results.append(
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
        results[-1] = replace(results[-1], sentence=_equal_length_sentence(results[-1], measure, int(changed[i])))
    return results


def length_caveats(differences: Differences, equal_length: Sequence[EqualLength], measure: Measure) -> list[str]:
    """A sentence on the differences in `measure` that are shown, but not at equal length; none without any."""
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


def _side(interval: Interval) -> Verdict:
    return "higher" if interval.low > 0 else "lower" if interval.high < 0 else "undecided"


def _about_equal(a: Floats, b: Floats) -> NDArray[np.bool_]:
    return np.abs(a - b) <= CLOSE_LENGTHS * np.maximum(a, b)


def _intercepts(x: Floats, y: Floats, samples: int, seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Intercepts and slopes [W] of the columns' lines y = a + b x, and the ends of the intercepts' intervals."""
    # A line depends on four means only, so resampled means give resampled lines. Centring avoids rounding errors.
    centre_x, centre_y, width = x.mean(axis=0), y.mean(axis=0), x.shape[1]
    u, v = x - centre_x, y - centre_y
    moments = np.concatenate([u, v, u * u, u * v], axis=1)

    def line(means: Floats) -> tuple[Floats, Floats]:
        mean_u, mean_v, mean_uu, mean_uv = (means[..., i * width : (i + 1) * width] for i in range(4))
        slope = (mean_uv - mean_u * mean_v) / (mean_uu - mean_u**2)
        return mean_v + centre_y - slope * (mean_u + centre_x), slope

    # Where length explains everything, as with a length penalty, only rounding is left.
    scale = np.abs(y).max(axis=0)
    scale[scale == 0] = 1.0
    intercepts, slopes = line(moments.mean(axis=0))
    intercepts = np.round(intercepts / scale, 12) * scale
    means = bootstrap_means(moments, samples, seed)
    spread = means[:, 2 * width : 3 * width] - means[:, :width] ** 2
    # A resample may have too few different prompts for a line.
    means = means[(spread > 1e-9 * (u * u).mean(axis=0)).all(axis=1)]
    low, high, _ = simultaneous_interval(intercepts, np.round(line(means)[0] / scale, 12) * scale, len(x))
    return intercepts, slopes, low, high


def _equal_length_sentence(difference: EqualLength, measure: Measure, changed: int) -> str:
    adjusted, close = difference.adjusted, difference.close
    if adjusted is None:
        why = "all by the same" if changed >= _FEWEST_PROMPTS else "too few to tell more"
        sentence = f"{changed} responses changed their length, {why}: no line of {measure.title} on length"
    else:
        seen = "is not shown to differ from SFT's"
        if difference.verdict != "undecided":
            seen = f"is {difference.verdict} than SFT's"
        elif _side(adjusted) != "undecided":
            seen = f"is {_side(adjusted)} than SFT's by the line, which prompts of about equal length do not show"
        raw = number(difference.raw, adjusted.high - adjusted.low, measure)
        numbers = with_interval(adjusted.mean, adjusted.low, adjusted.high, measure)
        sentence = f"at equal length {measure.title} {seen} ({numbers}; as the lengths are, {raw})"
    if close is not None:
        near = with_interval(close.mean, close.low, close.high, measure)
        sentence += f"; over the {difference.close_prompts} prompts whose lengths differ by a tenth at most: {near}"
    doubt = " Hardly any response changed its length the other way: this is extrapolated."
    return f"w={difference.w}: {sentence}.{doubt if difference.extrapolated else ''}"

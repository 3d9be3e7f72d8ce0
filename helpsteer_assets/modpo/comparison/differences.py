"""Differences of each weight to the SFT model, in numbers that hold for all weights at once, and in sentences.

When several weights are compared, one of them looks different by chance more often than 1 time in 20. So intervals and
p-values are simultaneous over the weights of each measure; nothing is adjusted for the number of measures. A difference
whose interval contains 0 is called "not shown", never "none".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from helpsteer_assets.modpo.comparison.bootstrap import LEVEL, bootstrap_means, column_means, simultaneous_interval
from helpsteer_assets.modpo.comparison.fronts import FrontUncertainty
from helpsteer_assets.modpo.comparison.scores import PolicyScores, policy_label, score_table

Verdict = Literal["higher", "lower", "undecided"]


@dataclass(frozen=True)
class Measure:
    """A measure of the responses, as sentences speak of it."""

    name: str
    title: str
    """Its name in sentences, such as "rated helpfulness"."""
    unit: str = ""
    """Such as "tokens"; a "share" (0 to 1) is shown in percentage points, "0 to 4" in points. Empty: none."""
    better: Literal["higher", "lower"] | None = None
    """The better side; None where neither is better."""
    comparatives: tuple[str, str] | None = None
    """Words for responses that have more and less of it ("longer", "shorter"); None: "higher" and "lower"."""
    to_sft: bool = False
    """Whether it is a distance to SFT, such as KL. SFT's own is 0, so it is told as a value and not as a difference."""


@dataclass(frozen=True)
class Difference:
    """Mean of a measure under weight `w` minus the SFT model's on the same prompts, in the measure's unit.

    `low` and `high` are the ends of a 95% interval, and `p_value` tests against no difference; both hold for all the
    compared weights at once. `verdict` is the side of 0 on which the whole interval lies.
    """

    w: str
    measure: str
    prompts: int
    mean: float
    low: float
    high: float
    p_value: float
    verdict: Verdict


Differences = Mapping[str, Mapping[str, Difference]]
"""By weight, ascending, then by measure."""


def differences_to_sft(
    policies: Sequence[PolicyScores], measures: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Difference]]:
    """Paired differences of every weight to the SFT model, with `simultaneous_interval`s over the weights per measure.

    `policies` are the SFT model's scores and then those of the weights, on the same prompts. A difference that is the
    same on every prompt has an interval of no width; it is decided only if its p-value is at most 0.05, because a few
    prompts can agree by chance. Raises as `score_table`.
    """
    table = score_table(policies, measures)
    differences: dict[str, dict[str, Difference]] = {scores.w or "": {} for scores in policies[1:]}
    changes = table[:, 1:] - table[:, :1]
    rows = len(changes)
    for m, measure in enumerate(measures):
        column = changes[:, :, m]
        mean = column_means(column)
        ends = simultaneous_interval(mean, bootstrap_means(column, samples, seed), rows)
        for i, w in enumerate(differences):
            low, high, p_value = (float(end[i]) for end in ends)
            verdict = side_of_zero(low, high)
            if p_value > 1 - LEVEL and low == high:
                verdict = "undecided"
            differences[w][measure] = Difference(w, measure, rows, float(mean[i]), low, high, p_value, verdict)
    return differences


def side_of_zero(low: float, high: float) -> Verdict:
    """The side of 0 on which the whole interval lies."""
    return "higher" if low > 0 else "lower" if high < 0 else "undecided"


def statements(differences: Differences, measures: Sequence[Measure]) -> dict[str, list[str]]:
    """One sentence per weight and measure, in the order of `measures`; measures without a difference are left out."""
    return {
        w: [_statement(own[measure.name], measure) for measure in measures if measure.name in own]
        for w, own in differences.items()
    }


def _statement(difference: Difference, measure: Measure) -> str:
    if measure.to_sft:
        sentence = f"{measure.title}: {_value(difference, measure)}."
    elif difference.verdict == "undecided":
        sentence = f"{measure.title}: {_undecided(difference, measure)}."
    elif measure.comparatives:
        sentence = f"{_side(difference.verdict, measure)} than SFT by {_amount(difference, measure)}."
    else:
        sentence = f"{measure.title}: {difference.verdict} than SFT's by {_amount(difference, measure)}."
    return sentence[0].upper() + sentence[1:]


def _value(difference: Difference, measure: Measure) -> str:
    return with_interval(difference.mean, difference.low, difference.high, measure)


def _side(verdict: Verdict, measure: Measure) -> str:
    higher, lower = measure.comparatives or ("higher", "lower")
    return higher if verdict == "higher" else lower


def _amount(difference: Difference, measure: Measure) -> str:
    """The size of a difference without its sign, such as `31 tokens [24, 38]`: the words beside it name the side."""
    ends = (difference.low, difference.high) if difference.mean > 0 else (-difference.high, -difference.low)
    return with_interval(abs(difference.mean), *ends, measure)


def _undecided(difference: Difference, measure: Measure) -> str:
    if difference.low == difference.high == 0:
        return f"the same as SFT's on each of {difference.prompts} prompts"
    if difference.low == difference.high:
        return f"no difference shown by {difference.prompts} prompts ({number(difference.mean, 0, measure)})"
    numbers = _value(difference, measure)
    bound = max(-difference.low, difference.high)
    largest = f"{number(bound, difference.high - difference.low, measure)}{_unit(measure)}"
    return f"no difference shown ({numbers}); one of up to {largest} is not ruled out"


def with_interval(mean: float, low: float, high: float, measure: Measure) -> str:
    """A mean with its interval and the measure's unit, such as `31.2 tokens [24.0, 38.1]`."""
    width = high - low
    # Where the interval excludes 0, no end may be rounded to 0.
    nearest = min(abs(low), abs(high)) if low * high > 0 else width
    numbers = [number(value, min(width, 10 * nearest) if width else 0, measure) for value in (mean, low, high)]
    return f"{numbers[0]}{_unit(measure)} [{numbers[1]}, {numbers[2]}]"


def number(value: float, width: float, measure: Measure) -> str:
    """`value` with the decimals that show two digits of the interval's `width`; three digits where it has no width."""
    scale = 100 if measure.unit == "share" else 1
    if not width:
        return f"{value * scale:.3g}"
    decimals = min(max(0, 1 - math.floor(math.log10(width * scale))), 9)
    rounded = round(value * scale, decimals)
    return f"{rounded if rounded else 0.0:.{decimals}f}"


def _unit(measure: Measure) -> str:
    unit = {"share": "percentage points", "0 to 4": "points"}.get(measure.unit, measure.unit)
    return f" {unit}" if unit else ""


def headlines(
    differences: Differences,
    preference: Measure | None,
    margin: Measure,
    others: Sequence[Measure],
    front: FrontUncertainty,
) -> list[str]:
    """The most important results as sentences: what moves at which w, which w to look at, how sure the front is.

    Args:
        differences: of all weights; see `differences_to_sft`.
        preference: the horizontal axis; None where no rater measured it. Then nothing is said about costs and front.
        margin: the vertical axis.
        others: measures that are told after the axes, such as the length.
        front: the front of the SFT model and then the weights, in the order of `differences`.

    The sentences call no weight the best: they name the best estimates and what is shown about them.
    """
    if preference is None:
        return [_movement(differences, measure) for measure in (margin, *others)]
    return [
        *(_movement(differences, measure) for measure in (preference, margin, *others)),
        _both(differences, preference, margin),
        _best(differences, preference, margin),
        _best(differences, margin, preference),
        _front(front, [policy_label(w) for w in (None, *differences)]),
        _area(front, preference, margin),
    ]


def listed(weights: Sequence[str]) -> str:
    """Weights in a sentence: `w=0.1, w=0.3 and w=0.5`."""
    names = [policy_label(w) for w in weights]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _with_verdict(differences: Differences, measure: Measure, verdict: Verdict) -> list[str]:
    return [w for w, own in differences.items() if own[measure.name].verdict == verdict]


def _movement(differences: Differences, measure: Measure) -> str:
    if measure.to_sft:
        values = [f"{_value(own[measure.name], measure)} at w={w}" for w, own in differences.items()]
        return f"{measure.title[0].upper()}{measure.title[1:]}: {'; '.join(values)}."
    parts = []
    sides: tuple[Verdict, ...] = ("higher", "lower")
    for verdict in sides:
        if weights := _with_verdict(differences, measure, verdict):
            largest = max(weights, key=lambda w: abs(differences[w][measure.name].mean))
            amount = _amount(differences[largest][measure.name], measure)
            at = f", most at w={largest}" if len(weights) > 1 else ""
            parts.append(f"{_side(verdict, measure)} at {listed(weights)} (by {amount}{at})")
    if undecided := _with_verdict(differences, measure, "undecided"):
        parts.append(f"not shown to differ at {listed(undecided)}")
    # "Responses are not shown to differ" would say more than was measured.
    decided = measure.comparatives and len(undecided) < len(differences)
    subject = "responses are" if decided else f"{measure.title} is"
    return f"Against SFT, {subject} {'; '.join(parts)}."


def _better(measure: Measure, difference: Difference) -> bool | None:
    """Whether the policy is shown to be better, or worse (False), than SFT; None where neither is shown."""
    return None if difference.verdict == "undecided" else difference.verdict == measure.better


def _both(differences: Differences, one: Measure, other: Measure) -> str:
    axes = f"both {one.title} and {other.title}"
    better = [w for w, own in differences.items() if _better(one, own[one.name]) and _better(other, own[other.name])]
    if better:
        return f"Shown to be better than SFT in {axes}: {listed(better)}."
    return f"No weight is shown to be better than SFT in {axes}."


def _best(differences: Differences, kept: Measure, gained: Measure) -> str:
    """The weight with the best estimate of `gained` among those that are not shown to be worse in `kept`.

    Where SFT's own estimate is the better one, that is said.
    """
    candidates = [w for w, own in differences.items() if _better(kept, own[kept.name]) is not False]
    if not candidates:
        return f"At every weight {kept.title} is shown to be worse than SFT's."
    sign, most = (1, "highest") if gained.better == "higher" else (-1, "lowest")
    best = max(candidates, key=lambda w: sign * differences[w][gained.name].mean)
    own = differences[best]
    if len(candidates) == 1:
        start = f"Only at w={best} is {kept.title} not shown to be worse than SFT's"
    else:
        start = (
            f"Of the weights whose {kept.title} is not shown to be worse than SFT's ({listed(candidates)}), w={best} "
            f"has the {most} mean {gained.title}"
        )
        if sign * own[gained.name].mean < 0:
            start += f", but SFT's own is {gained.better}"
    return f"{start}. There, {_phrase(own[gained.name], gained)}; {_phrase(own[kept.name], kept)}."


def _phrase(difference: Difference, measure: Measure) -> str:
    if difference.verdict == "undecided":
        return f"{measure.title}: {_undecided(difference, measure)}"
    return f"{measure.title} is {difference.verdict} than SFT's by {_amount(difference, measure)}"


def _front(front: FrontUncertainty, labels: Sequence[str]) -> str:
    shares = zip(labels, front.on_front, front.probability, strict=True)
    named = [(f"{label} ({percent(float(share))})", is_on) for label, is_on, share in shares]
    on, off = (", ".join(name for name, is_on in named if is_on == wanted) for wanted in (True, False))
    beside = f"; off it: {off}" if off else ""
    return f"On the front of the means, with the share of resamples in which each is: {on}{beside}."


def percent(share: float, below: str = "below ", above: str = "above ") -> str:
    """A share in percent, 0% and 100% only where it is exactly that."""
    if 0 < share < 0.01:
        return f"{below}1%"
    return f"{above}99%" if 0.99 < share < 1 else f"{share:.0%}"


def _area(front: FrontUncertainty, preference: Measure, margin: Measure) -> str:
    area = front.hypervolume
    numbers = f"{area.mean:.3g} [{area.low:.3g}, {area.high:.3g}]"
    shown = "some policy is" if area.low > 0 else "it is not shown that any policy is"
    return (
        f"Area above SFT (hypervolume of {preference.title} and {margin.title}): {numbers}; {shown} better than SFT in "
        "both."
    )

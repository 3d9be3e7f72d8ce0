"""Scores of the policies on the same prompts, and their summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.bootstrap import (
    Floats,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    column_means,
    percentile_interval,
)


@dataclass(frozen=True)
class PolicyScores:
    """The scores of one policy: `measures[name][i]` belongs to `prompt_ids[i]`.

    `policy` is `sft` or `modpo`; `w` is the weight as its canonical string, None for the SFT model.
    """

    policy: str
    w: str | None
    prompt_ids: list[str]
    measures: dict[str, Floats]

    @property
    def title(self) -> str:
        """The policy's name in messages."""
        return self.policy if self.w is None else f"{self.policy} w={self.w}"

    @property
    def label(self) -> str:
        """The policy's name in plots, tables and sentences."""
        return policy_label(self.w)


def policy_label(w: str | None) -> str:
    """The name of the policy of weight `w` (None for the SFT model) in plots, tables and sentences."""
    return "SFT" if w is None else f"w={w}"


def _ordered(scores: PolicyScores) -> dict[str, Floats]:
    """The measures in the order of the sorted prompt ids, so that no result depends on the order of rows."""
    for name, values in scores.measures.items():
        if np.shape(values) != (len(scores.prompt_ids),):
            raise ValueError(
                f"{scores.title}: {name} has shape {list(np.shape(values))} for {len(scores.prompt_ids)} prompts"
            )
    order = np.argsort(np.array(scores.prompt_ids))
    return {name: np.asarray(values, dtype=np.float64)[order] for name, values in scores.measures.items()}


def reference_and_weights(policies: Sequence[PolicyScores]) -> tuple[PolicyScores, list[PolicyScores]]:
    """The SFT model's scores, and those of the weights, ascending. Raises HelpsteerError without the SFT model."""
    reference = next((scores for scores in policies if scores.w is None), None)
    if reference is None:
        raise HelpsteerError("there are no scores of the SFT model to compare with; materialize sft_scores")
    return reference, sorted((s for s in policies if s.w is not None), key=lambda scores: float(scores.w or 0))


def score_table(policies: Sequence[PolicyScores], measures: Sequence[str]) -> Floats:
    """The `measures` of all `policies`: [prompts, policies, measures], prompts in the order of their sorted ids.

    Raises HelpsteerError where the prompts differ or are none, or where a measure is missing or not finite.
    """
    for scores in policies:
        _require_same_prompts(scores, policies[0])
        _require_measures(scores, measures)
    if not policies[0].prompt_ids:
        raise HelpsteerError(
            f"scores of {policies[0].title}: no prompts; materialize evaluation_prompts and what follows again"
        )
    ordered = [_ordered(scores) for scores in policies]
    return np.stack([np.stack([own[name] for name in measures], axis=1) for own in ordered], axis=1)


def _require_same_prompts(scores: PolicyScores, reference: PolicyScores) -> None:
    own, wanted = set(scores.prompt_ids), set(reference.prompt_ids)
    for policy, ids in ((scores, own), (reference, wanted)):
        if len(ids) != len(policy.prompt_ids):
            raise HelpsteerError(
                f"scores of {policy.title}: {len(policy.prompt_ids) - len(ids)} prompts occur more than once; "
                "materialize its scores again"
            )
    if own != wanted:
        raise HelpsteerError(
            f"scores of {scores.title} and {reference.title} are for different prompts, so their difference cannot be "
            f"paired: {scores.title} lacks {len(wanted - own)} of the {len(wanted)} prompts of {reference.title} and "
            f"has {len(own - wanted)} others; materialize generations and scores of both again"
        )


def _require_measures(scores: PolicyScores, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in scores.measures]
    if missing:
        raise HelpsteerError(
            f"scores of {scores.title} lack {', '.join(missing)}, which other policies have; materialize its scores "
            "again"
        )
    for name in names:
        values = np.asarray(scores.measures[name], dtype=np.float64)
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise HelpsteerError(
                f"scores of {scores.title}: {name} is missing or not finite for {bad} of {len(values)} prompts; a mean "
                "over the others would compare different prompts"
            )


def summarize(policies: Sequence[PolicyScores], samples: int, seed: int) -> list[dict[str, Any]]:
    """The rows of `score_summary`: every measure of every policy with its interval and its difference to SFT.

    Row: policy, w, measure, n (prompts), mean, sd (ddof 1, null for one prompt), ci_low, ci_high (95%, resampling
    prompts), delta (mean minus the SFT model's on the same prompts), delta_low, delta_high (null for the SFT model).
    Raises HelpsteerError where the SFT model is missing, where policies were scored on different prompts or by
    different measures, and where a measure is not finite.
    """
    reference, _ = reference_and_weights(policies)
    if not reference.prompt_ids:
        raise HelpsteerError("scores of sft: no prompts; materialize evaluation_prompts and what follows again")
    measures = list(reference.measures)
    for scores in policies:
        _require_same_prompts(scores, reference)
        _require_measures(scores, measures)
        _require_measures(reference, list(scores.measures))
    sft = _ordered(reference)
    columns: list[Floats] = []
    for scores in policies:
        own = _ordered(scores)
        columns += [own[name] for name in measures]
        columns += [own[name] - sft[name] for name in measures]
    table = np.stack(columns, axis=1)
    low, high = percentile_interval(bootstrap_means(table, samples, seed))
    mean = column_means(table)
    prompts = len(table)
    sd = table.std(axis=0, ddof=1) if prompts > 1 else None
    rows = []
    for position, scores in enumerate(policies):
        for offset, measure in enumerate(measures):
            value = 2 * position * len(measures) + offset
            delta = value + len(measures)
            compared = scores is not reference
            rows.append(
                {
                    "policy": scores.policy,
                    "w": scores.w,
                    "measure": measure,
                    "n": prompts,
                    "mean": float(mean[value]),
                    "sd": None if sd is None else float(sd[value]),
                    "ci_low": float(low[value]),
                    "ci_high": float(high[value]),
                    "delta": float(mean[delta]) if compared else None,
                    "delta_low": float(low[delta]) if compared else None,
                    "delta_high": float(high[delta]) if compared else None,
                }
            )
    return rows


def paired_difference(a: PolicyScores, b: PolicyScores, measure: str, samples: int, seed: int) -> Interval:
    """Mean of `measure` under `a` minus under `b` on the same prompts, with its 95% interval (resampling prompts).

    Raises HelpsteerError where the prompts differ, or where the measure is missing or not finite.
    """
    _require_same_prompts(a, b)
    _require_measures(a, [measure])
    _require_measures(b, [measure])
    if not a.prompt_ids:
        raise HelpsteerError(f"{a.title} and {b.title} have no scores to compare; materialize their scores")
    return bootstrap_interval(_ordered(a)[measure] - _ordered(b)[measure], samples, seed)

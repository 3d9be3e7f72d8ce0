"""Scores of the policies on the same prompts, and their summary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.comparison.bootstrap import Floats, bootstrap_means, column_means, percentile_interval


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
    def label(self) -> str:
        """See `policy_label`."""
        return policy_label(self.w)


def policy_label(w: str | None) -> str:
    """The name of the policy of weight `w` (None for the SFT model) in plots, tables and sentences."""
    return "SFT" if w is None else f"w={w}"


def score_table(policies: Sequence[PolicyScores], measures: Sequence[str]) -> Floats:
    """The `measures` of all `policies`: [prompts, policies, measures], prompts in the order of their sorted ids.

    Raises HelpsteerError where the prompts differ or are none, or where a measure is missing or not finite.
    """
    prompts = sorted(set(policies[0].prompt_ids))
    if not prompts:
        raise HelpsteerError("there are no scored prompts; materialize evaluation_prompts and what follows again")
    columns = []
    for scores in policies:
        if sorted(scores.prompt_ids) != prompts:
            raise HelpsteerError(
                f"scores of {scores.label} and {policies[0].label} are for different prompts, so their difference "
                "cannot be paired; materialize generations and scores of both again"
            )
        order = np.argsort(np.array(scores.prompt_ids))
        for name in measures:
            values = np.asarray(scores.measures.get(name, math.nan), dtype=np.float64)
            if not np.isfinite(values).all():
                raise HelpsteerError(
                    f"scores of {scores.label}: {name} is missing or not finite for a prompt; a mean over the others "
                    "would compare different prompts"
                )
            columns.append(values[order])
    return np.stack(columns, axis=1).reshape(len(prompts), len(policies), len(measures))


_STATISTICS = ("mean", "sd", "ci_low", "ci_high", "delta", "delta_low", "delta_high")


def summarize(policies: Sequence[PolicyScores], samples: int, seed: int) -> list[dict[str, Any]]:
    """The rows of `score_summary`: every measure of every policy with its interval and its difference to SFT.

    `policies` are the SFT model's scores and those of the weights. Row: policy, w, measure, n (prompts), mean, sd (ddof
    1, null for one prompt), ci_low, ci_high (95%, resampling prompts), delta (mean minus the SFT model's on the same
    prompts), delta_low, delta_high (null for the SFT model). Raises as `score_table`.
    """
    measures = list(policies[0].measures)
    scored = score_table(policies, measures)
    prompts = len(scored)
    table = np.concatenate([scored, scored - scored[:, :1]], axis=2).reshape(prompts, -1)
    low, high = percentile_interval(bootstrap_means(table, samples, seed))
    sd = table.std(axis=0, ddof=1).tolist() if prompts > 1 else [None] * table.shape[1]
    statistics = list(zip(column_means(table).tolist(), low.tolist(), high.tolist(), sd, strict=True))
    rows = []
    for position, scores in enumerate(policies):
        for offset, measure in enumerate(measures):
            column = 2 * position * len(measures) + offset
            mean, ci_low, ci_high, spread = statistics[column]
            delta = statistics[column + len(measures)][:3] if position else (None, None, None)
            numbers = dict(zip(_STATISTICS, (mean, spread, ci_low, ci_high, *delta), strict=True))
            rows.append({"policy": scores.policy, "w": scores.w, "measure": measure, "n": prompts} | numbers)
    return rows

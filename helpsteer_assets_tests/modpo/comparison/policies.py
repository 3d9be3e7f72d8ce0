"""Made-up scores of policies."""

from typing import Any

import numpy as np

from helpsteer_assets.modpo.comparison.scores import PolicyScores


def policy(w: str | None, **measures: Any) -> PolicyScores:
    """Scores of the policy of weight `w` on the prompts p0000, p0001, ..."""
    arrays = {name: np.array(values, dtype=float) for name, values in measures.items()}
    ids = [f"p{i:04d}" for i in range(len(next(iter(arrays.values()))))]
    return PolicyScores("sft" if w is None else "modpo", w, ids, arrays)


def shuffled(scores: PolicyScores, seed: int) -> PolicyScores:
    """The same scores in another order of prompts."""
    order = np.random.default_rng(seed).permutation(len(scores.prompt_ids))
    measures = {name: values[order] for name, values in scores.measures.items()}
    return PolicyScores(scores.policy, scores.w, [scores.prompt_ids[i] for i in order], measures)

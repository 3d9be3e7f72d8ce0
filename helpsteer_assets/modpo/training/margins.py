"""The margin m of a response, which the policy trades against its preference reward."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from helpsteer_assets.experiment.settings import ObjectiveSettings

Floats = NDArray[np.float64]


def margin_reward(objective: "ObjectiveSettings", log_ratios: Floats, response_tokens: Floats) -> Floats:
    """r_m of responses, before the role's sign: the more the margin adapter prefers a response, the higher it is.

    Args:
        objective: kind of margin and its scale.
        log_ratios: [n] log p_adapter(y|x) - log p_sft(y|x), nats; not used under a length penalty.
        response_tokens: [n] tokens of the uncut responses; not used with an implicit reward.

    Returns:
        [n] reward units: margin_beta * log-ratio, or -penalty * tokens.
    """
    if objective.margin == "length_penalty":
        assert objective.penalty is not None  # validated with the experiment
        return -objective.penalty * np.asarray(response_tokens, dtype=np.float64)
    assert objective.margin_beta is not None
    return objective.margin_beta * np.asarray(log_ratios, dtype=np.float64)


def margin(objective: "ObjectiveSettings", log_ratios: Floats, response_tokens: Floats) -> Floats:
    """m of responses, [n] reward units: -r_m under the role `cost`, +r_m otherwise. MODPO encourages m."""
    return objective.margin_sign * margin_reward(objective, log_ratios, response_tokens)


def margins_by_response(objective: "ObjectiveSettings", margin_rewards: pa.Table) -> dict[str, float]:
    """m by response_id, from the table of unscaled margin rewards (response_id, log_ratio, response_tokens)."""
    values = margin(
        objective,
        margin_rewards["log_ratio"].to_numpy(zero_copy_only=False),
        margin_rewards["response_tokens"].to_numpy(zero_copy_only=False),
    )
    return dict(zip(margin_rewards["response_id"].to_pylist(), values.tolist(), strict=True))

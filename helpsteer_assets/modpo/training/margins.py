"""The margin m of a response: what the policy trades its preference reward against."""

from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def margin_reward(
    log_ratios: Floats, response_tokens: Floats, *, margin_beta: float | None, penalty: float | None
) -> Floats:
    """r_m of responses, before the role's sign: higher is more of what the margin adapter prefers.

    Args:
        log_ratios: [n] log p_adapter(y|x) - log p_sft(y|x), nats; not read under a length penalty.
        response_tokens: [n] tokens of the uncut responses; not read with a margin adapter.
        margin_beta: scale of the margin adapter's log-ratio; None under a length penalty.
        penalty: reward lost per token under a length penalty; None with a margin adapter.

    Returns:
        [n] reward units: margin_beta * log-ratio, or -penalty * tokens.
    """
    if penalty is not None:
        return -penalty * np.asarray(response_tokens, dtype=np.float64)
    assert margin_beta is not None
    return margin_beta * np.asarray(log_ratios, dtype=np.float64)


def margins_by_response(
    margin_rewards: pa.Table, *, margin_beta: float | None, penalty: float | None, sign: Literal[-1, 1]
) -> dict[str, float]:
    """m = sign * r_m by response_id, reward units: -r_m under the role `cost`, else +r_m. MODPO encourages m.

    `margin_rewards` holds the unscaled margin rewards: response_id, log_ratio, response_tokens.
    """
    rewards = margin_reward(
        margin_rewards["log_ratio"].to_numpy(zero_copy_only=False),
        margin_rewards["response_tokens"].to_numpy(zero_copy_only=False),
        margin_beta=margin_beta,
        penalty=penalty,
    )
    return dict(zip(margin_rewards["response_id"].to_pylist(), (sign * rewards).tolist(), strict=True))

import math

import numpy as np
import pyarrow as pa
import pytest

from helpsteer_assets.modpo.training.margins import margin_reward, margins_by_response


def test_the_margin_reward_of_an_adapter_is_its_scaled_log_ratio() -> None:
    rewards = margin_reward(np.array([2.0, -1.0]), np.array([10.0, 30.0]), margin_beta=0.2, penalty=None)
    assert rewards.tolist() == pytest.approx([0.4, -0.2])


@pytest.mark.parametrize(("sign", "margins"), [(-1, {"a": -1.0, "b": 0.5}), (1, {"a": 1.0, "b": -0.5})])
def test_the_role_turns_the_sign_of_the_margin(sign: int, margins: dict[str, float]) -> None:
    table = pa.table({"response_id": ["a", "b"], "log_ratio": [2.0, -1.0], "response_tokens": [10, 30]})
    assert margins_by_response(table, margin_beta=0.5, penalty=None, sign=sign) == margins


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_length_penalty_encourages_short_responses_and_reads_no_log_ratios(missing: float | None) -> None:
    table = pa.table(
        {
            "response_id": ["a", "b"],
            "log_ratio": pa.array([missing, missing], pa.float64()),
            "response_tokens": pa.array([10, 30], pa.int32()),
        }
    )
    assert margins_by_response(table, margin_beta=None, penalty=0.5, sign=1) == {"a": -5.0, "b": -15.0}

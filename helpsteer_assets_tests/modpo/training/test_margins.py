import math

import numpy as np
import pyarrow as pa
import pytest

from helpsteer_assets.experiment.settings import ObjectiveSettings
from helpsteer_assets.modpo.comparison.margin_adapter import WORST_FAILURES, judge_pairs
from helpsteer_assets.modpo.training.margins import margin, margin_reward, margins_by_response

LOG_RATIOS, TOKENS = np.array([2.0, -1.0]), np.array([10.0, 30.0])


def objective(**changes: object) -> ObjectiveSettings:
    return ObjectiveSettings(weights=[0.5], **changes)


def test_margin_reward_of_an_adapter_is_its_scaled_log_ratio_whatever_the_role():
    for role in ("cost", "reward"):
        found = margin_reward(objective(margin_role=role, margin_beta=0.2), LOG_RATIOS, TOKENS)
        np.testing.assert_allclose(found, [0.4, -0.2])


def test_role_cost_turns_the_sign_and_role_reward_does_not():
    np.testing.assert_allclose(margin(objective(margin_role="cost", margin_beta=0.2), LOG_RATIOS, TOKENS), [-0.4, 0.2])
    np.testing.assert_allclose(
        margin(objective(margin_role="reward", margin_beta=0.2), LOG_RATIOS, TOKENS), [0.4, -0.2]
    )


def test_a_length_penalty_encourages_short_responses_and_reads_no_log_ratios():
    penalty = objective(margin="length_penalty", penalty=0.01)
    np.testing.assert_allclose(margin(penalty, np.array([math.nan, math.nan]), TOKENS), [-0.1, -0.3])


def test_margins_by_response_of_a_table_without_log_ratios():
    table = pa.table(
        {
            "response_id": ["a", "b"],
            "log_ratio": pa.array([None, None], pa.float64()),
            "response_tokens": pa.array([10, 30], pa.int32()),
        }
    )
    assert margins_by_response(objective(margin="length_penalty", penalty=0.5), table) == {"a": -5.0, "b": -15.0}


def test_margins_by_response_of_an_adapter():
    table = pa.table({"response_id": ["a", "b"], "log_ratio": [2.0, -1.0], "response_tokens": [10, 30]})
    assert margins_by_response(objective(margin_role="cost", margin_beta=0.5), table) == {"a": -1.0, "b": 0.5}


class TestJudgePairs:
    def pairs(self, count: int) -> pa.Table:
        return pa.table(
            {
                "prompt_id": [f"p{i}" for i in range(count)],
                "prompt": [f"prompt {i}" for i in range(count)],
                "chosen_id": [f"c{i}" for i in range(count)],
                "rejected_id": [f"r{i}" for i in range(count)],
                "chosen": [f"chosen {i}" for i in range(count)],
                "rejected": [f"rejected {i}" for i in range(count)],
            }
        )

    def judge(self, differences: list[float]):
        ratios = {f"c{i}": 7.0 + d for i, d in enumerate(differences)} | {f"r{i}": 7.0 for i in range(len(differences))}
        return judge_pairs(self.pairs(len(differences)), ratios, beta=0.5, samples=200, seed=0)

    def test_measures_accuracy_and_the_margin_in_units_of_the_adapters_own_reward(self):
        metrics, _ = self.judge([4.0, 2.0, -2.0, 8.0])
        assert metrics["accuracy"] == 0.75
        assert metrics["mean_margin"] == pytest.approx(0.5 * 3.0)

    def test_shows_the_worst_failures_first_and_no_success(self):
        _, failures = self.judge([4.0, -2.0, -6.0, 0.0])
        assert [(row["prompt"], row["margin"]) for row in failures] == [("prompt 2", -3.0), ("prompt 1", -1.0)]
        assert failures[0].keys() == {"margin", "prompt", "chosen", "rejected"}

    def test_shows_no_more_than_ten(self):
        _, failures = self.judge([-float(i + 1) for i in range(15)])
        assert len(failures) == WORST_FAILURES
        assert failures[0]["margin"] == -7.5

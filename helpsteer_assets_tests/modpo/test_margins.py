import pyarrow as pa
import pytest

from helpsteer_assets.modpo.margins import Margin, implicit_reward, length_penalty, margins_by_response


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (implicit_reward(0.5, "cost", "verbosity"), {"a": -1.0, "b": 0.5}),
        (implicit_reward(0.5, "reward", "verbosity"), {"a": 1.0, "b": -0.5}),
        (length_penalty(0.5), {"a": -5.0, "b": -15.0}),
    ],
)
def test_the_role_turns_the_margin_and_a_penalty_encourages_short_responses(
    margin: Margin, expected: dict[str, float]
) -> None:
    table = pa.table({"response_id": ["a", "b"], "log_ratio": [2.0, -1.0], "response_tokens": [10, 30]})
    assert margins_by_response(table, margin) == expected


@pytest.mark.parametrize(("role", "share"), [("cost", 0.6), ("reward", 0.3)])
def test_the_conflict_is_where_the_preferred_response_has_the_lower_margin(role: str, share: float) -> None:
    pairs = {"other": {"agrees": 0.6, "opposes": 0.3, "ties": 0.1}, "chosen_longer": 0.8}
    assert implicit_reward(0.1, role, "verbosity").conflict("helpfulness", pairs)[0] == share
    assert length_penalty(0.1).conflict("helpfulness", pairs)[0] == 0.8

"""The direction of the margin, and of w, measured on policies trained as in the demo."""

from pathlib import Path

import pytest

from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float | None], dict[str, float]]:
    """Mean measures by role and weight (None: SFT), of trainings as in the demo at the ends of its grid."""
    folder: Path = tmp_path_factory.mktemp("direction")
    found = {}
    for role, weights in (("cost", [0.1, 0.9]), ("reward", [0.1])):
        path = folder / f"{role}.yaml"
        path.write_text(
            f"extends: demo\nname: {role}\nobjective: {{margin_role: {role}, weights: {weights}}}\n"
            "evaluation: {prompts: 60, kl_samples: 0}\n",
            encoding="utf-8",
        )
        run = Finished(load_experiment(str(path)), folder / "home")
        assert run.run(), run.announced
        _, rows = Warehouse(run.home).query(f"SELECT w, measure, mean FROM score_summary WHERE experiment = '{role}'")
        for w, measure, mean in rows:
            found.setdefault((role, w), {})[measure] = mean
    return found


def test_at_equal_w_reward_gives_more_of_the_attribute_than_cost(means: dict) -> None:
    assert means["reward", 0.1]["verbosity"] > means["cost", 0.1]["verbosity"] + 0.3
    assert means["reward", 0.1]["margin_reward"] > means["cost", 0.1]["margin_reward"] + 0.3


def test_under_cost_a_small_w_is_shorter_and_less_helpful_than_a_large_one(means: dict) -> None:
    low, high = means["cost", 0.1], means["cost", 0.9]
    assert low["verbosity"] < high["verbosity"] - 0.3
    assert low["response_words"] < high["response_words"] - 3
    assert low["helpfulness"] < high["helpfulness"] - 0.2
    assert low["margin"] > high["margin"]

"""A margin adapter that fails its check stops every weight, whichever way the weights are started."""

from collections.abc import Callable

import dagster as dg
import pytest

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import Finished


@pytest.fixture
def failing(copied: Callable[..., Finished]) -> Finished:
    """A finished home whose adapter no longer passes: no adapter prefers chosen in more than all of the pairs.

    A threshold determines no result, so nothing else is out of date. The weight 0.5 was never trained.
    """
    return copied(checks={"margin_adapter_min_accuracy": 1.0}, objective={"weights": [0.1, 0.5]})


def trained(run: Finished) -> bool:
    """Whether the policy of w=0.5 was begun, let alone finished."""
    return (run.home / "artifacts" / "modpo_models" / "0.5").exists()


def test_a_run_stops_at_the_check_before_any_weight(failing: Finished) -> None:
    assert not failing.run()
    assert any(line.startswith("check margin_adapter_prefers_chosen FAILED") for line in failing.announced)
    assert not trained(failing)


@pytest.mark.parametrize("weight", ["0.5", "0.1"])
def test_a_single_weight_is_refused_with_the_reason_and_not_retried_even_where_it_is_finished(
    failing: Finished, weight: str
) -> None:
    """As a backfill starts weights: in runs of their own, which the blocking check of another run does not stop."""
    with dg.DagsterInstance.from_config(str(dagster_home(Home(failing.home), "quick"))) as instance:
        result = dg.materialize(
            [*build_assets(failing.experiment), *build_checks(failing.experiment)],
            selection=["modpo_models"],
            partition_key=weight,
            instance=instance,
            resources={"lab": Lab(failing.experiment, Home(failing.home))},
            raise_on_error=False,
        )
    (failure,) = [e.step_failure_data.user_failure_data for e in result.all_events if e.is_step_failure]
    assert "the margin adapter does not prefer chosen over rejected well enough" in failure.description
    assert not [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert not trained(failing)

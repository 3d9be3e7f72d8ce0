"""The check `up_to_date`: what its sensor reports after a change of the experiment's file, and what a step reports."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.defs.up_to_date import UP_TO_DATE, build_up_to_date
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import Finished, write_experiment

BETA = "objective.beta 0.2 -> 0.3"
AFTER_BETA = {
    "modpo_models": f"w=0.1, 0.9: {BETA}",
    "generations": f"w=0.1, 0.9: modpo_models: {BETA}",
    "scores": f"w=0.1, 0.9: modpo_models: {BETA}",
    "kl_to_sft": f"w=0.1, 0.9: modpo_models: {BETA}",
    "score_summary": f"modpo_models: {BETA}",
    "tradeoff": f"modpo_models: {BETA}",
    "tradeoff_report": BETA,
}


class Watched:
    """A finished home whose sensor is asked by ticks, as the daemon does it; the experiment was loaded before."""

    def __init__(self, run: Finished, instance: dg.DagsterInstance) -> None:
        self.run, self.instance = run, instance
        self._sensor = build_up_to_date(run.experiment)

    def change(self, **changes: Any) -> None:
        """Write the experiment's file anew."""
        write_experiment(self.run.file.parent, **changes)

    def tick(self) -> dict[str, tuple[bool, str | None]]:
        """What is reported, which is then on record."""
        result = self._sensor(dg.build_sensor_context(instance=self.instance))
        assert isinstance(result, dg.SensorResult), result
        for event in result.asset_events:
            assert isinstance(event, dg.AssetCheckEvaluation) and event.severity == dg.AssetCheckSeverity.WARN
            self.instance.report_runless_asset_event(event)
        return {event.asset_key.to_user_string(): (event.passed, event.description) for event in result.asset_events}

    def on_record(self, asset: str) -> tuple[bool, str | None]:
        """The check's latest result."""
        key = dg.AssetCheckKey(dg.AssetKey(asset), UP_TO_DATE)
        record = self.instance.get_latest_asset_check_evaluation_record(key)
        assert record is not None and record.evaluation is not None
        return record.evaluation.passed, record.evaluation.description

    def materialize(self, asset: str, w: str | None = None) -> dg.ExecuteInProcessResult:
        """One run, with the experiment's file as it stands."""
        run = Finished(load_experiment(str(self.run.file)), self.run.home)
        return dg.materialize(
            build_assets(run.experiment),
            selection=[asset],
            partition_key=w,
            instance=self.instance,
            resources={"lab": Lab(run.experiment, Home(run.home))},
            raise_on_error=False,
        )


@pytest.fixture
def watched(copied: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    run = copied()
    monkeypatch.setenv("HELPSTEER_HOME", str(run.home))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", str(run.file))
    with dg.DagsterInstance.from_config(str(dagster_home(Home(run.home), run.experiment.name))) as instance:
        yield Watched(run, instance)


def test_a_changed_setting_is_reported_once_with_all_weights_and_goes_as_they_are_made(watched: Watched) -> None:
    assert watched.on_record("scores") == (True, "w=0.1, 0.9: up to date"), "the steps have reported it"
    assert watched.tick() == {}
    watched.change(objective={"beta": 0.3})
    assert watched.tick() == {asset: (False, description) for asset, description in AFTER_BETA.items()}
    assert watched.tick() == {}

    (failure,) = watched.materialize("score_summary").get_step_failure_events()
    data = failure.step_failure_data.user_failure_data
    assert data is not None and data.description == (
        f"score_summary needs generations w=0.1, 0.9 and scores w=0.1, 0.9 and kl_to_sft w=0.1, 0.9 (out of date: "
        f"modpo_models: {BETA}); materialize these first, in the UI or by `helpsteer run`"
    )

    assert watched.materialize("modpo_models", "0.1").success
    assert watched.on_record("modpo_models") == (False, f"w=0.1: up to date; w=0.9: {BETA}")
    # The run that failed has left no result.
    assert watched.tick() == {"score_summary": (False, AFTER_BETA["score_summary"])}

    watched.change()
    reported = watched.tick()
    assert reported.keys() == AFTER_BETA.keys()
    assert reported["scores"] == (True, "w=0.1, 0.9: up to date")
    back = "made with other settings; with the present ones it is in the store: materialize it to take it up"
    assert reported["modpo_models"] == (False, f"w=0.1: {back}; w=0.9: up to date")


def test_while_a_run_is_to_report_the_sensor_does_not_and_after_its_death_it_does(watched: Watched) -> None:
    watched.change(objective={"beta": 0.3})
    defs = dg.Definitions(build_assets(watched.run.experiment), resources={"lab": watched.run.home})
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={dg.AssetKey("tradeoff")})
    run = watched.instance.create_run_for_job(job)
    assert watched.tick().keys() == AFTER_BETA.keys() - {"tradeoff"}
    watched.instance.report_run_failed(run)
    assert watched.tick() == {"tradeoff": (False, AFTER_BETA["tradeoff"])}

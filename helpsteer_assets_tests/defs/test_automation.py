"""Automation: what follows a training by itself, and what never does; conditions are evaluated and obeyed for real."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from helpsteer_assets.assets.graph import stages
from helpsteer_assets.assets.status import status
from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.automation import GROUP, build_automation
from helpsteer_assets.defs.jobs import phases
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import Finished, quick_experiment


class Automated:
    """A home whose automation is looked at by ticks, as the daemon does it."""

    def __init__(self, run: Finished) -> None:
        self.run = run
        lab = Lab(run.experiment, Home(run.home))
        self.defs = dg.Definitions(assets=build_assets(run.experiment), resources={"lab": lab})
        self.instance = dg.DagsterInstance.from_config(str(dagster_home(Home(run.home), run.experiment.name)))
        self._cursor: Any = None

    def materialize(self, *assets: str, w: str | None = None) -> None:
        """One run of some assets, as launched by hand."""
        result = self.defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(name) for name in assets],
            partition_key=w,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        assert result.success

    def tick(self) -> dict[str | None, set[str]]:
        """Evaluate all conditions once: the assets that are requested, by weight."""
        result = dg.evaluate_automation_conditions(self.defs, self.instance, cursor=self._cursor)
        self._cursor = result.cursor
        requested: dict[str | None, set[str]] = {}
        for name in stages(self.run.experiment):
            for weight in result.get_requested_partitions(dg.AssetKey(name)):
                requested.setdefault(weight, set()).add(name)
        return requested

    def obey(self) -> list[dict[str | None, set[str]]]:
        """Tick and materialize until nothing is requested; what was, tick by tick."""
        ticks = []
        while requested := self.tick():
            ticks.append(requested)
            for weight, assets in requested.items():
                self.materialize(*assets, w=weight)
        return ticks


def test_after_a_changed_setting_each_trained_weight_is_evaluated_and_the_summary_waits_for_the_last(
    copied: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Automated(copied(run={"automation": True}, modpo={"steps": 4}))
    monkeypatch.setenv("HELPSTEER_HOME", str(home.run.home))
    assert home.tick() == {}, "the first evaluation starts nothing"
    home.materialize("sft_model")
    assert home.tick() == {}, "nor does what is reused"
    by_phase = phases(home.run.experiment)
    grid, evaluate = set(by_phase["tradeoff_grid"]), set(by_phase["evaluate"])
    home.materialize("modpo_models", w="0.1")
    assert home.obey() == [{"0.1": grid - {"modpo_models"}}]
    home.materialize(*grid, w="0.9")
    assert home.obey() == [{None: evaluate}], "what a run has evaluated itself does not come again"
    assert {item.state for item in status(home.run.experiment, Home(home.run.home))} == {"complete"}


def test_the_evaluation_has_a_condition_and_no_training_and_no_data_and_without_automation_nothing(
    tmp_path: Path,
) -> None:
    def followers(experiment: Experiment) -> set[str]:
        specs = [asset.get_asset_spec() for asset in build_assets(experiment)]
        return {spec.key.to_user_string() for spec in specs if spec.automation_condition is not None}

    experiment = quick_experiment(tmp_path, run={"automation": True})
    assert followers(experiment) == {name for name, stage in stages(experiment).items() if stage.group == GROUP}
    assert not followers(experiment) & {"helpsteer_ratings", "sft_model", "margin_adapter", "modpo_models"}
    (sensor,) = build_automation(experiment)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    for name in SHIPPED:
        assert build_automation(load_experiment(name)) == [] and followers(load_experiment(name)) == set()

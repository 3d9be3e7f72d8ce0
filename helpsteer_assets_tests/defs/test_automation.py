"""Automation: what follows a training by itself, and what never does; conditions are evaluated and obeyed for real."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from helpsteer_assets.assets import build_assets
from helpsteer_assets.assets.graph import stages
from helpsteer_assets.assets.status import status
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.defs.automation import GROUP, build_sensors
from helpsteer_assets.defs.jobs import phases
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.execution.dagster_home import make_dagster_home
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets_tests.finished import quick_experiment

TRAININGS = {"sft_model", "margin_adapter", "modpo_models"}


class Automated:
    """A home whose automation is looked at by ticks, as the daemon does it."""

    def __init__(self, home: Path, folder: Path, **changes: Any) -> None:
        self.home = home
        self.experiment = quick_experiment(folder, run={"automation": True}, **changes)
        self.defs = dg.Definitions(assets=build_assets(self.experiment), resources={"lab": Lab(self.experiment, home)})
        self.instance = dg.DagsterInstance.from_config(str(make_dagster_home(home, self.experiment.name)))
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
        for name in stages(self.experiment):
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

    def unfinished(self) -> set[tuple[str, str]]:
        return {(s.asset, s.partition) for s in status(self.experiment, self.home) if s.state != "complete"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with everything that comes before the weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    experiment = quick_experiment(folder)
    select = " or ".join(f"key:{name}" for name in phases(experiment)["prepare"])
    announced: list[str] = []
    assert run_experiment(experiment, folder / "home", select=select, announce=announced.append), announced
    return folder / "home"


@pytest.fixture
def automated(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Automated:
    home = tmp_path / "home"
    shutil.copytree(prepared, home)
    monkeypatch.setenv("HELPSTEER_HOME", str(home))
    return Automated(home, tmp_path)


def test_the_first_evaluation_starts_nothing(automated: Automated) -> None:
    assert automated.tick() == {}


def test_a_trained_weight_is_evaluated_and_the_summary_waits_for_the_others(automated: Automated) -> None:
    automated.tick()
    automated.materialize("modpo_models", w="0.1")
    evaluated = set(phases(automated.experiment)["tradeoff_grid"]) - {"modpo_models"}
    assert automated.obey() == [{"0.1": evaluated}]
    automated.materialize("modpo_models", w="0.9")
    assert automated.obey() == [{"0.9": evaluated}, {None: set(phases(automated.experiment)["evaluate"])}]
    assert automated.unfinished() == set()
    assert automated.tick() == {}


def test_what_is_reused_starts_nothing(automated: Automated) -> None:
    automated.tick()
    automated.materialize("modpo_models", w="0.1")
    automated.obey()
    automated.materialize("modpo_models", w="0.1")
    automated.materialize("sft_model")
    assert automated.tick() == {}


def test_a_run_that_evaluates_its_weight_itself_starts_nothing_more(automated: Automated) -> None:
    automated.tick()
    automated.materialize(*phases(automated.experiment)["tradeoff_grid"], w="0.1")
    assert automated.tick() == {}


def test_after_a_changed_setting_only_what_was_trained_again_is_evaluated(automated: Automated, tmp_path: Path) -> None:
    automated.tick()
    for weight in automated.experiment.objective.weights:
        automated.materialize("modpo_models", w=weight)
    automated.obey()
    changed = Automated(automated.home, tmp_path, modpo={"steps": 4})
    assert changed.tick() == {}
    changed.materialize("modpo_models", w="0.9")
    assert all(set(tick) == {"0.9"} for tick in changed.obey())
    assert ("scores", "0.9") not in changed.unfinished()
    assert ("scores", "0.1") in changed.unfinished()


def test_no_training_and_no_data_has_a_condition(tmp_path: Path) -> None:
    experiment = quick_experiment(tmp_path, run={"automation": True})
    specs = {asset.key.to_user_string(): asset.get_asset_spec() for asset in build_assets(experiment)}
    followers = {name for name, spec in specs.items() if spec.automation_condition is not None}
    assert followers == {name for name, spec in specs.items() if spec.group_name == GROUP}
    assert not followers & TRAININGS
    (sensor,) = build_sensors(experiment)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING


@pytest.mark.parametrize("name", ["demo", "smollm2", "helpsteer"])
def test_it_is_off_in_the_shipped_experiments_and_then_leaves_no_trace(name: str) -> None:
    experiment = load_experiment(name)
    assert build_sensors(experiment) == []
    assert all(asset.get_asset_spec().automation_condition is None for asset in build_assets(experiment))

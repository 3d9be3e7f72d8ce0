"""Which executor the code location has, and what it says where it cannot have it. What Ray does with it: ray/."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.executor import chosen_executor, step_executor
from helpsteer_assets.execution.ray_cluster import HOME_TOKEN, require_shared_home
from helpsteer_assets.execution.recovery import PROCESS_TAG, alive
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import quick_experiment

ROOT = Path(__file__).parents[2]
RAY_TAG = "dagster-ray/config"


def loaded(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HELPSTEER_EXPERIMENT": "demo", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [None, ""])
def test_steps_run_on_this_machine_unless_asked_otherwise(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELPSTEER_EXECUTOR", raising=False)
    if name is not None:
        monkeypatch.setenv("HELPSTEER_EXECUTOR", name)
    assert chosen_executor() is step_executor


def test_an_executor_that_there_is_not_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELPSTEER_EXECUTOR", "slurm")
    with pytest.raises(HelpsteerError, match=r"HELPSTEER_EXECUTOR is 'slurm'; set it to `ray` .* or leave it unset"):
        chosen_executor()


LOAD = "from helpsteer_assets.definitions import defs; defs()"


def test_local_runs_import_no_ray() -> None:
    done = loaded(f"import sys; {LOAD}; print({{'ray', 'dagster_ray'}} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_without_the_extra_the_cluster_is_refused_with_the_command_that_installs_it() -> None:
    hidden = "import sys; sys.modules['ray'] = sys.modules['dagster_ray'] = None"
    done = loaded(f"{hidden}; {LOAD}", HELPSTEER_EXECUTOR="ray")
    last = done.stderr.strip().splitlines()[-1]
    assert "HELPSTEER_EXECUTOR=ray needs ray and dagster_ray, not installed here: pip install" in last


def test_steps_that_load_a_model_ask_for_gpus_and_the_others_for_a_cpu(tmp_path: Path) -> None:
    experiment = quick_experiment(tmp_path, run={"gpus": 0.5, "threads": 2})
    assets = build_assets(experiment)
    asked = {asset.op.tags[RAY_TAG] for asset in assets if asset.op.pool == "gpu"}
    assert asked == {'{"num_cpus": 2, "num_gpus": 0.5}'}
    others = [asset.op for asset in assets if asset.op.pool is None]
    checks = [check.node_def for check in build_checks(experiment)]
    assert {op.tags[RAY_TAG] for op in [*others, *checks]} == {'{"num_cpus": 1}'}


def test_shares_of_several_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HelpsteerError, match=r"run\.gpus: must be a whole number, or below 1 .* got 1\.5"):
        quick_experiment(tmp_path, run={"gpus": 1.5})


def test_a_step_finds_the_home_of_its_run_or_refuses_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alive(Home(tmp_path / "home")) as tags:
        monkeypatch.setenv(HOME_TOKEN, tags[PROCESS_TAG])
        require_shared_home(Home(tmp_path / "home"))
        with pytest.raises(HelpsteerError, match=f"does not see the home of this run at {tmp_path}/other: no lock"):
            require_shared_home(Home(tmp_path / "other"))
    assert not (tmp_path / "other").exists()

"""Which executor the code location has, and what it says where it cannot have it. What Ray does with it: ray/."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.ray_cluster import HOME_TOKEN, require_shared_home
from helpsteer_assets.execution.recovery import PROCESS_TAG, alive
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import quick_experiment

ROOT = Path(__file__).parents[2]
RAY_TAG = "dagster-ray/config"


@pytest.mark.parametrize(
    ("executor", "words"),
    [("", "loaded without ray"), ("ray", "HELPSTEER_EXECUTOR=ray needs ray and dagster_ray, not installed here: pip")],
)
def test_local_runs_import_no_ray_and_a_cluster_without_it_is_refused(executor: str, words: str) -> None:
    code = "import sys; sys.modules['ray'] = sys.modules['dagster_ray'] = None\n"
    code += "from helpsteer_assets.definitions import defs; defs(); print('loaded without ray')"
    environment = {"PYTHONPATH": str(ROOT), "HELPSTEER_EXPERIMENT": "demo", "HELPSTEER_EXECUTOR": executor}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert words in (done.stdout + done.stderr).strip().splitlines()[-1]


def test_steps_that_load_a_model_ask_for_gpus_and_the_others_for_a_cpu(tmp_path: Path) -> None:
    experiment = quick_experiment(tmp_path, run={"gpus": 0.5, "threads": 2})
    assets = build_assets(experiment)
    asked = {asset.op.tags[RAY_TAG] for asset in assets if asset.op.pool == "gpu"}
    assert asked == {'{"num_cpus": 2, "num_gpus": 0.5}'}
    others = [asset.op for asset in assets if asset.op.pool is None]
    checks = [check.node_def for check in build_checks(experiment)]
    assert {op.tags[RAY_TAG] for op in [*others, *checks]} == {'{"num_cpus": 1}'}


def test_a_step_finds_the_home_of_its_run_or_refuses_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alive(Home(tmp_path / "home")) as tags:
        monkeypatch.setenv(HOME_TOKEN, tags[PROCESS_TAG])
        require_shared_home(Home(tmp_path / "home"))
        with pytest.raises(HelpsteerError, match=f"does not see the home of this run at {tmp_path}/other: no lock"):
            require_shared_home(Home(tmp_path / "other"))
    assert not (tmp_path / "other").exists()

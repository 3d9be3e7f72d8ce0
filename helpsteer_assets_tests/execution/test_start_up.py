"""How steps start: forked from a process that has imported what they need, and as able to die as any process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from helpsteer_assets.execution.executor import GPU_POOL, MODEL_MODULES, STEP_MODULES, step_executor

ROOT = Path(__file__).parents[2]
REPORTS = "REPORTS"
"""Environment variable that tells the steps below where to write."""


# A run's steps. Dagster loads this module in each of them.


def _report(name: str) -> None:
    found = {"forked_from": os.getppid(), "modules": [m for m in MODEL_MODULES if m in sys.modules]}
    Path(os.environ[REPORTS], name).write_text(json.dumps(found), encoding="utf-8")


@dg.asset(pool=GPU_POOL)
def trained() -> None:
    _report("trained")


@dg.asset(deps=[trained])
def described() -> None:
    _report("described")


@dg.asset(pool=GPU_POOL, retry_policy=dg.RetryPolicy(max_retries=1))
def killed_once() -> None:
    begun = Path(os.environ[REPORTS], "begun")
    if not begun.exists():
        begun.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    _report("killed_once")


@dg.asset
def endless() -> None:
    try:
        _report("endless")
        time.sleep(600)
    finally:
        Path(os.environ[REPORTS], "cleaned_up").write_text("")


defs = dg.Definitions(
    assets=[trained, described, killed_once, endless],
    jobs=[
        dg.define_asset_job(name, selection=selection)
        for name, selection in {
            "with_model": ["trained", "described", "killed_once"],
            "waiting": ["endless"],
        }.items()
    ],
    executor=step_executor,
)


# The tests


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that steps report to; runs started in the test have a Dagster home of their own."""
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
    for name, value in {REPORTS: tmp_path, "DAGSTER_HOME": tmp_path, "HELPSTEER_HOME": tmp_path / "home"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def start(job: str, reports: Path) -> subprocess.Popen[bytes]:
    """A run of a job in a process of its own, as Dagster's run launcher starts it."""
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", __name__, "-j", job]
    with (reports / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def test_steps_are_forked_from_one_process_with_the_model_libraries_and_tried_again_when_killed(reports: Path) -> None:
    assert start("with_model", reports).wait() == 0, (reports / "log").read_text()[-3000:]
    found = {name: json.loads((reports / name).read_text()) for name in ("trained", "described", "killed_once")}
    assert found["trained"]["modules"] == list(MODEL_MODULES)
    assert {step["forked_from"] for step in found.values()} == {found["trained"]["forked_from"]}


def test_a_run_that_is_terminated_ends_its_steps(reports: Path) -> None:
    run = start("waiting", reports)
    while not (reports / "endless").exists():
        assert run.poll() is None, (reports / "log").read_text()[-3000:]
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait() != 0
    assert (reports / "cleaned_up").exists(), "the step was interrupted, and could put things in order"


def test_what_is_imported_before_the_fork_is_all_that_steps_need_and_starts_no_thread_and_touches_no_gpu() -> None:
    library = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "helpsteer_assets/modpo").rglob("[a-z]*.py")
    ]
    # numpy's and pyarrow's own threads are there after the first import; both libraries handle a fork.
    code = f"""
import importlib, json, os, sys

def import_all(modules):
    for module in modules:
        importlib.import_module(module)
    return len(os.listdir("/proc/self/task"))

def touched(*args, **kwargs):
    raise AssertionError("touches the GPU when it is imported")

threads = import_all({STEP_MODULES})
assert "torch" not in sys.modules
import torch
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
assert import_all({MODEL_MODULES}) == threads
before = set(sys.modules)
import_all({library})
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"helpsteer_assets"}})))
"""
    # The threads of a BLAS are none of ours, and it makes them anew after a fork; numpy and scipy bring one each.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []

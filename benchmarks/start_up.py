"""Start-up: what the commands that only read cost, and what a step of a run costs before it does anything.

The steps measured here import what a training imports and do nothing with it. They are started as the code location
starts its own, and as Dagster starts steps by default (`spawn`: each imports everything anew).
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.setting import Setting
from benchmarks.timing import ratio
from helpsteer_assets.execution.executor import GPU_POOL, MODEL_MODULES, step_executor
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.warehouse import Warehouse

COMMANDS = {"--help": ["--help"], "status": ["status"], "query": ["query", "SELECT count(*) FROM materializations"]}
STEPS = 2
START_METHODS: dict[str, dict[str, Any]] = {
    "forkserver": {},
    "spawn": {"execution": {"config": {"start_method": {"spawn": {}}}}},
}
"""Run configuration of each; a fork server is what the code location's executor starts by itself."""


def _step(number: int) -> dg.AssetsDefinition:
    @dg.asset(name=f"step_{number}", deps=[f"step_{number - 1}"] if number else [], pool=GPU_POOL)
    def step() -> dg.MaterializeResult:
        for module in MODEL_MODULES:
            importlib.import_module(module)
        return dg.MaterializeResult(metadata={"cpu_s": time.process_time()})

    return step


defs = dg.Definitions(
    assets=[_step(number) for number in range(STEPS)],
    jobs=[
        dg.define_asset_job(method, selection=dg.AssetSelection.all(), config=config)
        for method, config in START_METHODS.items()
    ],
    executor=step_executor,
)
"""Dagster loads this in each step; there is a job for each start method."""


def run(setting: Setting) -> dict[str, Any]:
    """Measure commands and steps; the long form takes more rounds.

    Returns
        commands: of each, the lowest `wall_s` and `cpu_s` of the rounds;
        steps: of each start method the means of `first_step_wall_s` (for a fork server its imports are in it),
            `further_step_wall_s` (from the end of one step to the end of the next) and `further_step_cpu_s` (of the
            step's process);
        spawn_over_forkserver_wall: how many times dearer a further step is when spawned.
    """
    rounds = 3 if setting.long else 1
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        commands = _commands(home, 5 * rounds)
        steps = {method: [_steps(home / f"{method}_{r}", method) for r in range(rounds)] for method in START_METHODS}
    return {
        "commands": commands,
        "steps": [
            {"start_method": method, **{name: sum(run[name] for run in runs) / rounds for name in runs[0]}}
            for method, runs in steps.items()
        ],
        "spawn_over_forkserver_wall": ratio(
            *([run["further_step_wall_s"] for run in steps[method]] for method in ("spawn", "forkserver"))
        ),
    }


def _commands(home: Path, rounds: int) -> list[dict[str, Any]]:
    """The reading commands on a home in which something has been materialized."""
    Warehouse(home).record(
        experiment="demo",
        asset="tradeoff",
        partition=ALL,
        fingerprint="f",
        path=home,
        run_id="run",
        reused=False,
        table=None,
        parquet=None,
    )
    measured = []
    for name, arguments in COMMANDS.items():
        code = "from helpsteer_assets.cli import entry; entry()"
        command = [sys.executable, "-c", code, "--home", str(home), *arguments]
        times = [_seconds(command) for _ in range(rounds)]
        measured.append(
            {"command": name, "wall_s": min(wall for wall, _ in times), "cpu_s": min(cpu for _, cpu in times)}
        )
    return measured


def _seconds(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process, which must succeed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return wall, usage.ru_utime + usage.ru_stime


def _steps(dagster_home: Path, start_method: str) -> dict[str, float]:
    """Seconds of the first and of the second step of a run."""
    dagster_home.mkdir()
    (dagster_home / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", __name__, "-j", start_method]
    environment = os.environ | {"DAGSTER_HOME": str(dagster_home), "HELPSTEER_EXPERIMENT": "demo"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        (run,) = instance.get_runs()
        events = instance.all_logs(run.run_id)

    def times(kind: dg.DagsterEventType) -> list[float]:
        return [e.timestamp for e in events if e.dagster_event and e.dagster_event.event_type == kind]

    started = times(dg.DagsterEventType.STEP_WORKER_STARTING)
    ended = times(dg.DagsterEventType.STEP_SUCCESS)
    cpu = [e.asset_materialization.metadata["cpu_s"].value for e in events if e.asset_materialization]
    return {
        "first_step_wall_s": ended[0] - started[0],
        "further_step_wall_s": ended[1] - ended[0],
        "further_step_cpu_s": cpu[1],
    }

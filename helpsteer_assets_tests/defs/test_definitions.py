"""The code location: what it holds, and that loading it stays cheap."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from helpsteer_assets.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.defs.jobs import phases
from helpsteer_assets.experiment.reading import load_experiment

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("asset_specs.json")


def specs() -> dict[str, Any]:
    """What is fixed about each asset of the demo's graph."""
    experiment = load_experiment("demo")
    found = {}
    for asset in build_assets(experiment):
        spec = asset.get_asset_spec()
        partitions = spec.partitions_def
        found[spec.key.to_user_string()] = {
            "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
            "group": spec.group_name,
            "kinds": sorted(spec.kinds),
            "partitions": None if partitions is None else partitions.get_partition_keys(),
            "pool": asset.op.pool,
            "owners": list(spec.owners),
            "described": bool(spec.description),
        }
    return found


def test_the_graph_is_the_one_in_the_snapshot() -> None:
    # After a wanted change: python -m helpsteer_assets_tests.defs.test_definitions
    assert specs() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_checks_are_there_and_the_adapters_is_blocking() -> None:
    found = {spec.name: spec for check in build_checks(load_experiment("demo")) for spec in check.check_specs}
    warnings = {"margin_adapter_measures_more_than_length", "margin_follows_weight"}
    assert set(found) == {"margin_adapter_prefers_chosen", *warnings}
    assert {name for name, spec in found.items() if spec.blocking} == {"margin_adapter_prefers_chosen"}


def test_jobs_cover_the_graph_once_in_three_phases() -> None:
    experiment = load_experiment("demo")
    by_phase = phases(experiment)
    assert by_phase["tradeoff_grid"] == ["modpo_models", "generations", "scores", "kl_to_sft"]
    assert by_phase["evaluate"] == ["score_summary", "tradeoff", "tradeoff_report"]
    assert sorted(name for names in by_phase.values() for name in names) == sorted(specs())


@pytest.mark.parametrize("name", ["demo", "smollm2", "helpsteer"])
def test_importing_the_definitions_imports_no_heavy_library(name: str) -> None:
    heavy = ["torch", "transformers", "peft", "trl", "datasets", "matplotlib", "pandas"]
    code = f"import sys, helpsteer_assets.definitions as d; d.defs; print([m for m in {heavy} if m in sys.modules])"
    environment = os.environ | {"HELPSTEER_EXPERIMENT": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_modpo_and_resources_import_no_dagster() -> None:
    modules = [
        f"helpsteer_assets.{folder}.{path.stem}"
        for folder in ("modpo", "resources")
        for path in (ROOT / "helpsteer_assets" / folder).glob("*.py")
    ]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print('dagster' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_dg_finds_the_project_and_its_definitions_sound() -> None:
    dg_command = Path(sys.executable).with_name("dg")
    done = subprocess.run([str(dg_command), "check", "defs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All definitions loaded successfully" in done.stdout + done.stderr


def test_a_definitions_object_resolves_every_job() -> None:
    from helpsteer_assets.definitions import defs

    assert {job.name for job in defs.resolve_all_job_defs()} >= {"prepare", "tradeoff_grid", "evaluate"}
    assert isinstance(defs, dg.Definitions)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(specs(), indent=2) + "\n", encoding="utf-8")

"""The code location: what it holds, and that loading it stays cheap."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.experiment.reading import load_experiment

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("asset_specs.json")


def specs() -> dict[str, Any]:
    """Each asset of the demo's graph as Dagster sees it; of the checks, whether they block."""
    experiment = load_experiment("demo")
    found = {}
    checks = [spec for check in build_checks(experiment) for spec in check.check_specs]
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
            "checks": {c.name: c.blocking for c in [*asset.check_specs, *checks] if c.asset_key == spec.key},
        }
    return found


def run(*command: str, **variables: str) -> str:
    """Standard output of a program in the project's folder, which must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HELPSTEER_EXPERIMENT": "demo", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_graph_is_the_one_in_the_snapshot() -> None:
    # After a wanted change: python -m helpsteer_assets_tests.defs.test_definitions
    assert specs() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_importing_the_definitions_reads_no_experiment_and_loading_them_imports_no_heavy_library() -> None:
    code = """if True:
        import os, sys, helpsteer_assets.definitions as location
        for name in ("demo", "smollm2", "helpsteer"):
            os.environ["HELPSTEER_EXPERIMENT"] = name
            jobs = {job.name for job in location.defs().resolve_all_job_defs()}
            assert jobs >= {"prepare", "tradeoff_grid", "evaluate"}, jobs
        heavy = {"torch", "transformers", "peft", "trl", "datasets", "matplotlib", "pandas"}
        print(sorted(heavy & set(sys.modules)))"""
    assert run(sys.executable, "-c", code, HELPSTEER_EXPERIMENT="missing.yaml") == "[]\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(specs(), indent=2) + "\n", encoding="utf-8")

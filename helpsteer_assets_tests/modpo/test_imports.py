"""modpo/ knows neither Dagster nor the experiment, and runs on a machine with torch, transformers and peft alone."""

import subprocess
import sys

import pytest

# None in sys.modules hides a package: importing it fails, and find_spec, which transformers asks, does not find it.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(sys.argv[1:])
import benchmarks.gpu
import helpsteer_assets.modpo as modpo
for module in pkgutil.walk_packages(modpo.__path__, modpo.__name__ + "."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(["dagster", "trl", "duckdb", "datasets"], id="packages that a GPU machine lacks"),
        pytest.param(["helpsteer_assets.experiment"], id="the experiment"),
    ],
)
def test_every_module_can_be_imported_without(hidden: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING, *hidden], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

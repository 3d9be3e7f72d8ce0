"""The graph with trainings in several processes: the same artifacts, but for rounding."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from helpsteer_assets.store.artifacts import ALL, Artifact
from helpsteer_assets_tests.finished import Finished

TRAININGS = (("sft_model", ALL), ("modpo_models", "0.1"))
"""SFT, and a training on preference pairs."""


def test_trainings_in_two_processes_make_what_one_makes(
    finished_home: Finished, copied: Callable[..., Finished]
) -> None:
    together = copied(run={"train_processes": 2})
    for training in TRAININGS:
        shutil.rmtree(together.artifact(*training).path)
    assert together.run(select='key:"sft_model" or key:"modpo_models"', weights=["0.1"]), together.announced
    for training in TRAININGS:
        several, one = together.artifact(*training), finished_home.artifact(*training)
        assert several.manifest["run"]["train_processes"] == 2
        assert several.manifest["files"].keys() == one.manifest["files"].keys()
        assert losses(several) == pytest.approx(losses(one), abs=1e-3), training
    assert sum("2 processes train together, each on cpu" in line for line in together.announced) == len(TRAININGS)


def losses(artifact: Artifact) -> dict[str, Any]:
    return {
        f"{name} {row['step']}": row[name]
        for row in artifact.manifest["metrics"]["history"]
        for name in row
        if "loss" in name
    }

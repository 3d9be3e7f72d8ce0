"""The graph with trainings in several processes: the same artifacts, but for rounding."""

from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactStore
from helpsteer_assets_tests.finished import Finished, write_experiment


def trainings(finished: Finished) -> dict[str, Artifact]:
    present = fingerprints(finished.experiment)
    places = {"sft_model": ALL, "margin_adapter": ALL, "modpo_models": "0.1"}
    store = ArtifactStore(finished.home)
    found = {asset: store.get(asset, place, present[asset, place].value) for asset, place in places.items()}
    assert None not in found.values(), found
    return found


def test_trainings_in_two_processes_make_what_one_makes(finished_home: Finished, tmp_path: Path) -> None:
    together = Finished(write_experiment(tmp_path, run={"train_processes": 2}), tmp_path / "home")
    assert together.run(select='+key:"modpo_models"', weights=["0.1"]), together.announced
    several, one = trainings(together), trainings(finished_home)
    for asset, artifact in several.items():
        assert artifact.manifest["run"]["train_processes"] == 2
        assert artifact.manifest["files"].keys() == one[asset].manifest["files"].keys()
        theirs, ours = (measured(found[asset]) for found in (several, one))
        assert theirs == pytest.approx(ours, abs=1e-3), asset
    assert sum("2 processes train together, each on cpu" in line for line in together.announced) == 3


def measured(artifact: Artifact) -> dict[str, Any]:
    """Losses of a training, and the margins that its adapter gives, where it is looked at."""
    metrics = artifact.manifest["metrics"]
    losses = {f"{name} {row['step']}": row[name] for row in metrics["history"] for name in row if "loss" in name}
    return losses | {name: value for name, value in metrics.get("sanity", {}).items() if value is not None}

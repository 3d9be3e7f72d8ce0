"""Finished runs of the real graph on the embedded model, shared by the tests that look at them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactStore

QUICK: dict[str, Any] = {
    "extends": "demo",
    "name": "quick",
    "objective": {"weights": [0.1, 0.9]},
    "sft": {"steps": 6},
    "margin_adapter": {"steps": 12},
    "modpo": {"steps": 6, "evaluate_every": 2},
    "evaluation": {"prompts": 8, "kl_samples": 1, "bootstrap_samples": 200},
}
"""The demo, cut down: the whole graph in a few seconds, too short to show a trade-off."""


def write_experiment(folder: Path, **changes: Any) -> Path:
    """QUICK as a file, with some sections' keys changed."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in QUICK.items()}
    for key, value in changes.items():
        data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def quick_experiment(folder: Path, **changes: Any) -> Experiment:
    """QUICK with some sections' keys changed."""
    return load_experiment(str(write_experiment(folder, **changes)))


class Finished:
    """An experiment, the home it was run in, and what the run announced."""

    def __init__(self, experiment: Experiment, home: Path) -> None:
        self.experiment = experiment
        self.home = home
        self.announced: list[str] = []

    def run(self, **options: Any) -> bool:
        return run_experiment(self.experiment, self.home, announce=self.announced.append, **options)

    def artifact(self, asset: str, partition: str = ALL) -> Artifact:
        """The finished artifact that the experiment's present settings determine."""
        fingerprint = fingerprints(self.experiment)[asset, partition].value
        artifact = ArtifactStore(self.home).find(asset, partition, fingerprint)
        assert artifact is not None
        return artifact


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The cut-down graph, run once. Its home is not to be changed."""
    folder = tmp_path_factory.mktemp("quick")
    finished = Finished(quick_experiment(folder), folder / "home")
    assert finished.run(), finished.announced
    return finished


@pytest.fixture
def copied(quick: Finished, tmp_path: Path) -> Callable[..., Finished]:
    """A copy of the finished home, with an experiment that differs as the arguments say."""
    import shutil

    def copy(**changes: Any) -> Finished:
        home = tmp_path / "home"
        if not home.exists():
            shutil.copytree(quick.home, home)
        return Finished(quick_experiment(tmp_path, **changes), home)

    return copy

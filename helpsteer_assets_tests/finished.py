"""A small experiment, and a home in which the graph was run on it: the fixtures `finished_home` and `copied`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactStore
from helpsteer_assets.store.home import Home

QUICK: dict[str, Any] = {
    "extends": "demo",
    "name": "quick",
    "data": {"max_train_prompts": 120, "max_validation_prompts": 24},
    "objective": {"weights": [0.1, 0.9]},
    "sft": {"steps": 6},
    "margin_adapter": {"steps": 12},
    "modpo": {"steps": 6, "evaluate_every": 2, "learning_rate": 0.01},
    "evaluation": {"prompts": 8, "kl_samples": 1, "bootstrap_samples": 200},
    "generation": {"max_new_tokens": 32},
    "checks": {"margin_adapter_min_accuracy": 0.0},
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

    def __init__(self, experiment: Experiment, home: Path, announced: list[str] | None = None) -> None:
        self.experiment = experiment
        self.home = home
        self.announced = announced or []

    @property
    def file(self) -> Path:
        """The experiment's file, beside the home."""
        return self.home.parent / f"{self.experiment.name}.yaml"

    def run(self, announce: Callable[[str], None] | None = None, **options: Any) -> bool:
        from helpsteer_assets.commands.run import run_experiment

        return run_experiment(self.experiment, Home(self.home), announce=announce or self.announced.append, **options)

    def artifact(self, asset: str, partition: str = ALL) -> Artifact:
        """The finished artifact that the experiment's present settings determine."""
        fingerprint = fingerprints(self.experiment)[asset, partition].value
        artifact = ArtifactStore(self.home).find(asset, partition, fingerprint)
        assert artifact is not None
        return artifact


def run_once(folder: Path) -> Finished:
    """QUICK's home in `folder`, made by the first process that asks for it; others wait."""
    from filelock import FileLock

    folder.mkdir(exist_ok=True)
    announced = folder / "announced.json"
    with FileLock(folder / ".lock"):
        if announced.exists():
            said = json.loads(announced.read_text(encoding="utf-8"))
            return Finished(load_experiment(str(folder / "quick.yaml")), folder / "home", said)
        finished = Finished(quick_experiment(folder), folder / "home")
        assert finished.run(), finished.announced
        announced.write_text(json.dumps(finished.announced), encoding="utf-8")
        return finished

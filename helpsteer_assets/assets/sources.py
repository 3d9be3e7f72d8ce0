"""Where the source, the base model and the rater lie: embedded, a local path, or the hub's cache."""

import os
from importlib import resources
from pathlib import Path
from typing import Literal

from helpsteer_assets.assets.hub import download
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, is_hub_id


def local_path(key: str, source: str) -> Path:
    """The path that a local source or model names; `embedded` is the tiny model that is shipped with the package.

    Raises HelpsteerError, naming the setting `key`, where nothing is there.
    """
    if source == "embedded":
        return Path(str(resources.files("helpsteer_assets") / "embedded" / "model"))
    path = Path(os.path.expanduser(source))  # noqa: PTH111  Path's raises for a user that does not exist
    if not os.path.exists(path):  # noqa: PTH110  Path's raises for a name that is too long
        raise HelpsteerError(
            f"{key}: {source} does not exist; correct the path in the experiment (the model and the experiment of "
            "`smollm2` are made by `make smollm2 DATA=path/to/your/folder`)"
        )
    return path


def fetch(experiment: Experiment, section: Literal["data", "model", "rater"]) -> Path:
    """The folder or file of the source, the base model or the rater, downloaded where it lives on the hub."""
    return _located(experiment, section, None if section == "data" else [*_WITHOUT_WEIGHTS, "*.safetensors"])


def described_model(experiment: Experiment, section: Literal["model", "rater"]) -> Path:
    """Folder with a model's configuration and tokenizer; from the hub they are fetched without the weights."""
    return _located(experiment, section, _WITHOUT_WEIGHTS)


_WITHOUT_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def _located(experiment: Experiment, section: str, patterns: list[str] | None) -> Path:
    key, source, revision = experiment.hub_references()[section]
    if not is_hub_id(source):
        return local_path(key, source)
    assert revision is not None  # validated with the experiment
    return download(source, revision, "dataset" if section == "data" else "model", patterns)

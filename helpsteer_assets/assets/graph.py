"""The graph of an experiment, derived from the declarations in data.py, training.py, evaluation.py and tradeoff.py.

A fingerprint is a hash of a stage's name and version, the settings that it depends on and the fingerprints of its
inputs; at the roots stand the revision or content digest of the source, of the base model and of the rater. It needs no
database: two machines with the same experiment and sources compute the same fingerprints.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.assets import data, evaluation, tradeoff, training
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.stage import Stage
from helpsteer_assets.experiment.settings import Experiment, is_hub_id
from helpsteer_assets.files.digests import content_digest
from helpsteer_assets.store.artifacts import ALL

STAGES = tuple(
    item
    for module in (data, training, evaluation, tradeoff)
    for item in vars(module).values()
    if isinstance(item, Stage) and item.compute.__module__ == module.__name__
)
"""Every declared stage, as they stand in the files: an input before what reads it."""


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint with all that went into it."""

    asset: str
    partition: str
    value: str
    version: int
    settings: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    """Fingerprints by input asset and partition."""


def stages(experiment: Experiment) -> dict[str, Stage]:
    """The graph of an experiment, an input before what reads it."""
    graph: dict[str, Stage] = {}
    for declared in STAGES:
        if declared.exists_if(experiment):
            graph[declared.name] = declared.for_experiment(experiment, graph)
    return graph


def partitions_of(stage: Stage, experiment: Experiment) -> list[str]:
    """The partitions of a stage's asset."""
    return list(experiment.objective.weights) if stage.partitioned else [ALL]


def fingerprints(experiment: Experiment, digest_cache: Path | None = None) -> dict[tuple[str, str], Fingerprint]:
    """The fingerprint of every asset and partition of an experiment, in topological order.

    Args:
        experiment: the experiment.
        digest_cache: a file that remembers digests of local sources by path, size and modification time.

    Raises:
        HelpsteerError: a local source, model or rater is not there.
    """
    flat = _flatten(experiment.model_dump(mode="json")) | _roots(experiment, digest_cache)
    made: dict[tuple[str, str], Fingerprint] = {}
    graph = stages(experiment)
    for stage in graph.values():
        for partition in partitions_of(stage, experiment):
            settings = _settings_of(stage, flat) | ({"w": partition} if stage.partitioned else {})
            inputs: dict[str, dict[str, str]] = {}
            for name in stage.inputs:
                same = stage.partitioned and graph[name].partitioned
                read = [partition] if same else partitions_of(graph[name], experiment)
                inputs[name] = {p: made[name, p].value for p in read}
            value = fingerprint_value(stage.name, stage.version, settings, inputs)
            made[stage.name, partition] = Fingerprint(stage.name, partition, value, stage.version, settings, inputs)
    return made


def fingerprint_value(stage: str, version: int, settings: dict[str, Any], inputs: dict[str, dict[str, str]]) -> str:
    """The fingerprint that stands for a stage's version, settings and inputs; also of those in a manifest."""
    return _hash({"stage": stage, "version": version, "settings": settings, "inputs": inputs})


def code_version(stage: Stage, experiment: Experiment) -> str:
    """The part of a stage's fingerprint that depends neither on its inputs nor on w: Dagster's `code_version`.

    A local source counts by its path here, not by its content: every step process loads the definitions, and reading
    gigabytes of weights each time would cost more than many a step. `helpsteer status` looks at the content.
    """
    flat = _flatten(experiment.model_dump(mode="json"))
    flat |= {key: f"{source}@{revision}" for key, source, revision in experiment.hub_references().values() if revision}
    return _hash({"stage": stage.name, "version": stage.version, "settings": _settings_of(stage, flat)})


def _settings_of(stage: Stage, flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if any(key == wanted or key.startswith(f"{wanted}.") for wanted in stage.settings)
    }


def _roots(experiment: Experiment, digest_cache: Path | None) -> dict[str, str]:
    """The name of a source in fingerprints: its pinned revision, or a digest of its content wherever it lies."""
    roots = {}
    for section, (key, source, revision) in experiment.hub_references().items():
        if is_hub_id(source):
            roots[key] = f"{source}@{revision}"
        elif section != "data" or source != "embedded":
            roots[key] = f"sha256:{content_digest(local_path(key, source), digest_cache)}"
    return roots


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

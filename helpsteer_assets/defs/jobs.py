"""The jobs: three parts of the graph, in the order in which people run them."""

from typing import Any

import dagster as dg

from helpsteer_assets.assets.graph import stages
from helpsteer_assets.assets.stage import Stage
from helpsteer_assets.defs.partitions import weight_partitions
from helpsteer_assets.experiment.settings import Experiment


def phases(experiment: Experiment) -> dict[str, list[str]]:
    """Assets by phase: `prepare` before the weights, `tradeoff_grid` once per weight, `evaluate` after all of them."""
    graph = stages(experiment)
    grouped: dict[str, list[str]] = {"prepare": [], "tradeoff_grid": [], "evaluate": []}
    for stage in graph.values():
        after = _reads_partitioned(stage, graph)
        grouped["tradeoff_grid" if stage.partitioned else "evaluate" if after else "prepare"].append(stage.name)
    return grouped


def build_jobs(experiment: Experiment) -> list[Any]:
    """One job per phase; `tradeoff_grid` is partitioned by weight."""
    descriptions = {
        "prepare": "Everything that does not depend on w: data, SFT, margin adapter, what is computed once for all w.",
        "tradeoff_grid": "One weight: train its policy, let it answer, score the answers, estimate its KL to SFT.",
        "evaluate": "The summary over all weights, and the trade-off.",
    }
    return [
        dg.define_asset_job(
            name,
            selection=dg.AssetSelection.assets(*names),
            description=descriptions[name],
            partitions_def=weight_partitions(experiment) if name == "tradeoff_grid" else None,
        )
        for name, names in phases(experiment).items()
    ]


def _reads_partitioned(stage: Stage, graph: dict[str, Stage]) -> bool:
    return any(graph[name].partitioned or _reads_partitioned(graph[name], graph) for name in stage.inputs)

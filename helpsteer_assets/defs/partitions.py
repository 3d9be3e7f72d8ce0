"""Weights as partition keys."""

import dagster as dg

from helpsteer_assets.experiment.settings import Experiment


def weight_partitions(experiment: Experiment) -> dg.StaticPartitionsDefinition:
    """One partition per weight, in the order of the experiment's grid."""
    return dg.StaticPartitionsDefinition(experiment.objective.weights)

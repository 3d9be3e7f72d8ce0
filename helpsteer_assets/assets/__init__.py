"""The graph as Dagster assets: what is there, made by calling the library in `modpo/`."""

import dagster as dg

from helpsteer_assets.assets.data import DATA_ASSETS
from helpsteer_assets.assets.evaluation import EVALUATION_ASSETS
from helpsteer_assets.assets.materialization import build_asset
from helpsteer_assets.assets.tradeoff import TRADEOFF_ASSETS
from helpsteer_assets.assets.training import TRAINING_ASSETS
from helpsteer_assets.experiment import Experiment
from helpsteer_assets.stages import stages


def build_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of an experiment's graph, in topological order."""
    assets = (*DATA_ASSETS, *TRAINING_ASSETS, *EVALUATION_ASSETS, *TRADEOFF_ASSETS)
    declared = {declaration.compute.__name__: declaration for declaration in assets}
    return [build_asset(declared[name], experiment) for name in stages(experiment)]

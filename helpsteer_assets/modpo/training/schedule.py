"""The number of optimizer steps of a training, and when it evaluates.

Imports no torch: `helpsteer check` uses it for estimates.
"""

import math

from helpsteer_assets.modpo.settings import Training

EVALUATIONS = 10
"""Evaluations, each with a checkpoint, in a training whose settings name no interval."""


def count_steps(settings: Training, items: int) -> int:
    """Optimizer steps of a training on `items` sequences or pairs."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold exactly one of the two
    micro_batches = math.ceil(items / settings.batch_size)
    return max(1, math.ceil(settings.epochs * math.ceil(micro_batches / settings.accumulation)))


def evaluation_interval(settings: Training, steps: int) -> int:
    """Optimizer steps between two evaluations of a training of `steps`; each evaluation writes a checkpoint."""
    return min(settings.evaluate_every or math.ceil(steps / EVALUATIONS), steps)

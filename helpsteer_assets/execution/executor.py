"""How the steps of a run start: as forks of one process that has imported what they need.

A step process of its own would spend seconds on importing dagster, torch and transformers before it does anything, and
another second on tearing them down. Here a run pays once. Steps stay processes: one that is killed, or runs out of
memory, is tried again by its run.
"""

import os

import dagster as dg

from helpsteer_assets.execution.ray_cluster import on_ray, require_ray
from helpsteer_assets.execution.recovery import MarkedRuns

GPU_POOL = "gpu"
"""Pool of the steps that load a model; its limit (dagster.yaml) is how many of them run at once."""

STEP_MODULES = ("alembic.command", "sqlalchemy.dialects.sqlite", "helpsteer_assets.definitions")
"""Modules that every step imports: the code location, and the largest libraries behind Dagster's storage."""

MODEL_MODULES = (
    "helpsteer_assets.modpo.generation.responses",
    "helpsteer_assets.modpo.models.loading",
    "helpsteer_assets.modpo.training.preference",
    "helpsteer_assets.modpo.scoring.raters",
    "helpsteer_assets.modpo.training.sft",
    "trl.trainer.sft_trainer",
    "matplotlib.figure",
)
"""Modules that steps with a model import. Importing these starts no thread and touches no GPU, neither of which would
survive the fork; a test holds them to it."""


def chosen_executor() -> dg.ExecutorDefinition:
    """The executor of the code location: `step_executor`, or the one that HELPSTEER_EXECUTOR names.

    Raises HelpsteerError for a name that there is not, and where Ray is not installed.
    """
    if not on_ray():
        return step_executor
    require_ray()
    from helpsteer_assets.execution.ray_executor import ray_step_executor

    return ray_step_executor


@dg.executor(
    name="multiprocess",
    config_schema=dg.multiprocess_executor.config_schema.as_field(),
    requirements=dg.multiple_process_executor_requirements(),
)
def step_executor(context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's multiprocess executor, on a fork server that imports the model libraries where the run needs them."""
    # CUDA that was asked for a device before the fork works in no fork. None of these modules asks, and torch's answer
    # to other libraries that may be installed beside them comes without CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    loads_model = GPU_POOL in context.job.get_definition().graph.pools
    preloaded = [*STEP_MODULES, *(MODEL_MODULES if loads_model else ())]
    config = {"start_method": {"forkserver": {"preload_modules": preloaded}}, **context.executor_config}
    create = dg.multiprocess_executor.executor_creation_fn
    assert create is not None
    return MarkedRuns(create(context._replace(executor_config=config)))

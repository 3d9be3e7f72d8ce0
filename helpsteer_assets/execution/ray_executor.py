"""Steps as Ray jobs, by dagster-ray; imported only where HELPSTEER_EXECUTOR asks for it."""

import os
from typing import Any

import dagster as dg
from dagster_ray import ray_executor

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.ray_cluster import HOME_TOKEN, forwarded_variables
from helpsteer_assets.execution.recovery import PROCESS_TAG, MarkedRuns
from helpsteer_assets.store.home import Home


@dg.executor(
    name="ray",
    config_schema=ray_executor.config_schema.as_field(),
    requirements=dg.multiple_process_executor_requirements(),
)
def ray_step_executor(context: dg.InitExecutorContext) -> dg.Executor:
    """dagster-ray's executor, which gives steps our part of the environment and lets them find the home.

    Raises HelpsteerError for resources in the run's configuration: dagster-ray prefers them to those of each asset.
    """
    config: Any = context.executor_config["ray"]
    if stated := [name for name in ("num_cpus", "num_gpus", "memory") if config.get(name) is not None]:
        raise HelpsteerError(
            f"{' and '.join(stated)} of the executor would take the place of what each asset asks for; leave it out, "
            "and set run.gpus in the experiment"
        )
    os.environ["HELPSTEER_HOME"] = str(Home.from_environment())  # absolute, for processes that start elsewhere
    config = {**config, "env_vars": [*(config.get("env_vars") or []), *forwarded_variables()]}
    create = ray_executor.executor_creation_fn
    assert create is not None
    executor = create(context._replace(executor_config={**context.executor_config, "ray": config}))
    return _OnSharedHome(executor)


class _OnSharedHome(MarkedRuns):
    """Steps on other nodes look for the lock of this process in the home, and refuse to work without it."""

    def _tag(self, instance: dg.DagsterInstance, run_id: str, tags: dict[str, str]) -> None:
        os.environ[HOME_TOKEN] = tags[PROCESS_TAG]
        # Where Dagster resumes runs whose process died, nobody else is to end them.
        if not instance.run_will_resume(run_id):
            super()._tag(instance, run_id, tags)

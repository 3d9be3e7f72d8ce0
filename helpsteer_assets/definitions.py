"""The code location: the assets, checks, jobs and sensors of the experiment that HELPSTEER_EXPERIMENT names."""

import dagster as dg

from helpsteer_assets.defs.assets import build_assets
from helpsteer_assets.defs.automation import build_automation
from helpsteer_assets.defs.checks import build_checks
from helpsteer_assets.defs.jobs import build_jobs
from helpsteer_assets.defs.lab import Lab
from helpsteer_assets.defs.up_to_date import build_up_to_date
from helpsteer_assets.execution.executor import chosen_executor
from helpsteer_assets.execution.ray_cluster import require_shared_home
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.home import Home


@dg.definitions
def defs() -> dg.Definitions:
    """Dagster calls this when it loads the code location; importing the module reads no file."""
    home = Home.from_environment()
    require_shared_home(home)
    experiment = load_experiment()
    return dg.Definitions(
        assets=build_assets(experiment),
        asset_checks=build_checks(experiment),
        jobs=build_jobs(experiment),
        sensors=[*build_automation(experiment), build_up_to_date(experiment)],
        resources={"lab": Lab(experiment, home)},
        executor=chosen_executor(),
    )

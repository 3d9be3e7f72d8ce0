"""The code location: the assets, checks, jobs and sensors of the experiment that HELPSTEER_EXPERIMENT names."""

import dagster as dg

from helpsteer_assets.assets import build_assets
from helpsteer_assets.assets.checks import build_checks
from helpsteer_assets.assets.materialization import Lab
from helpsteer_assets.automation import build_sensors
from helpsteer_assets.executor import chosen_executor
from helpsteer_assets.experiment import load_experiment
from helpsteer_assets.home import home_path
from helpsteer_assets.jobs import build_jobs
from helpsteer_assets.ray_cluster import require_shared_home

require_shared_home(home_path())
experiment = load_experiment()

defs = dg.Definitions(
    assets=build_assets(experiment),
    asset_checks=build_checks(experiment),
    jobs=build_jobs(experiment),
    sensors=build_sensors(experiment),
    resources={"lab": Lab(experiment, home_path())},
    executor=chosen_executor(),
)

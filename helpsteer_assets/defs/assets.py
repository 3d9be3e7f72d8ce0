"""The graph as Dagster assets: one `AssetsDefinition` for each stage."""

from typing import Any

import dagster as dg

from helpsteer_assets.assets.graph import code_version, stages
from helpsteer_assets.assets.stage import Stage
from helpsteer_assets.defs.automation import GROUP, follows_inputs
from helpsteer_assets.defs.lab import RETRIES, Lab
from helpsteer_assets.defs.partitions import weight_partitions
from helpsteer_assets.defs.up_to_date import up_to_date_spec
from helpsteer_assets.execution.executor import GPU_POOL
from helpsteer_assets.execution.ray_cluster import CPU_STEP, model_step
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.tables import TABLES


def build_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of an experiment's graph, in topological order."""
    return [_asset(stage, experiment) for stage in stages(experiment).values()]


def _asset(stage: Stage, experiment: Experiment) -> dg.AssetsDefinition:
    automated = experiment.run.automation and stage.group == GROUP

    @dg.asset(
        name=stage.name,
        deps=list(stage.inputs),
        group_name=stage.group,
        kinds=stage.kinds,
        description=stage.description,
        owners=["team:helpsteer_assets"],
        tags={"experiment": experiment.name},
        code_version=code_version(stage, experiment),
        partitions_def=weight_partitions(experiment) if stage.partitioned else None,
        metadata=_table_metadata(stage),
        automation_condition=follows_inputs(experiment, stage) if automated else None,
        op_tags=model_step(experiment.run) if stage.loads_model else CPU_STEP,
        pool=GPU_POOL if stage.loads_model else None,
        retry_policy=RETRIES if stage.loads_model else None,
        check_specs=[up_to_date_spec(stage.name)],
    )
    def materialize(context: dg.AssetExecutionContext, lab: dg.ResourceParam[Lab]) -> dg.MaterializeResult:
        return lab.materialize(stage, context)

    return materialize


def _table_metadata(stage: Stage) -> dict[str, Any]:
    if stage.table is None:
        return {}
    columns = [dg.TableColumn(c.name, c.type, description=c.comment) for c in TABLES[stage.table].columns]
    return {"dagster/column_schema": dg.TableSchema(columns=columns), "dagster/table_name": stage.table}

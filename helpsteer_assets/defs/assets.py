"""The graph as Dagster assets."""

import warnings
from collections.abc import Sequence
from typing import Any

import dagster as dg

from helpsteer_assets.assets.graph import Stage, code_version, stages
from helpsteer_assets.defs.automation import GROUP, follows_inputs
from helpsteer_assets.defs.lab import _RETRIES, GPU_POOL, AssetDeclaration, Lab
from helpsteer_assets.defs.partitions import weight_partitions
from helpsteer_assets.execution.ray_cluster import CPU_STEP, model_step
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.tables import TABLES


def build_asset(declaration: AssetDeclaration, experiment: Experiment) -> dg.AssetsDefinition:
    """The Dagster asset of a declaration."""
    name = declaration.compute.__name__
    stage: Stage = stages(experiment)[name]
    automated = experiment.run.automation and declaration.group == GROUP
    runs: dict[str, Any] = {"pool": GPU_POOL, "retry_policy": _RETRIES} if declaration.loads_model else {}
    needs = model_step(experiment.run) if declaration.loads_model else CPU_STEP
    shown: dict[str, Any] = {
        "name": name,
        "group_name": declaration.group,
        "kinds": declaration.kinds,
        "description": declaration.compute.__doc__,
        "owners": ["team:helpsteer_assets"],
        "tags": {"experiment": experiment.name},
        "code_version": code_version(stage, experiment),
        "partitions_def": weight_partitions(experiment) if stage.partitioned else None,
        "metadata": _definition_metadata(declaration),
        "automation_condition": follows_inputs(experiment, stage) if automated else None,
    }
    if declaration.shard is not None and experiment.evaluation.shards > 1:
        return _sharded_asset(declaration, experiment.evaluation.shards, stage.inputs, shown, runs | {"tags": needs})

    @dg.asset(deps=list(stage.inputs), op_tags=needs, **shown, **runs)
    def _asset(context: dg.AssetExecutionContext, lab: dg.ResourceParam[Lab]) -> dg.MaterializeResult:
        return lab.materialize(declaration, context)

    return _asset


def _sharded_asset(
    declaration: AssetDeclaration, shards: int, inputs: Sequence[str], shown: dict[str, Any], runs: dict[str, Any]
) -> dg.AssetsDefinition:
    """An asset of several steps: one for each shard, which may run at the same time, and one that puts them together.

    The last one makes what a shard left undone, so that it needs a place in the pool as well.
    """

    def step(number: int) -> dg.OpDefinition:
        @dg.op(
            name=f"{shown['name']}_shard_{number + 1}_of_{shards}",
            ins={name: dg.In(dg.Nothing) for name in inputs},
            out=dg.Out(dg.Nothing),
            **runs,
        )
        def _shard(context: dg.OpExecutionContext, lab: dg.ResourceParam[Lab]) -> None:
            lab.make_shard(declaration, context, number)

        return _shard

    steps = {f"shard_{number}": step(number) for number in range(shards)}

    @dg.op(
        name=f"{shown['name']}_from_shards",
        ins={name: dg.In(dg.Nothing) for name in steps},
        out=dg.Out(dg.Nothing),
        code_version=shown["code_version"],
        **runs,
    )
    def _whole(context: dg.OpExecutionContext, lab: dg.ResourceParam[Lab]) -> dg.Output[None]:
        made = lab.materialize(declaration, context)
        with warnings.catch_warnings():
            # Else every run says that an op's data version is beta. Versions of Dagster are pinned.
            warnings.simplefilter("ignore", dg.BetaWarning)
            return dg.Output(None, data_version=made.data_version, metadata=made.metadata)

    def compose(**read: Any) -> Any:
        return _whole(**{name: shard(**read) for name, shard in steps.items()})

    return dg.graph_asset(ins={name: dg.AssetIn(dagster_type=dg.Nothing) for name in inputs}, **shown)(compose)


def _definition_metadata(declaration: AssetDeclaration) -> dict[str, Any]:
    if declaration.table is None:
        return {}
    columns = [
        dg.TableColumn(column.name, column.type, description=column.comment)
        for column in TABLES[declaration.table].columns
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=columns), "dagster/table_name": declaration.table}


def build_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of an experiment's graph, in topological order."""
    assets = (*DATA_ASSETS, *TRAINING_ASSETS, *EVALUATION_ASSETS, *TRADEOFF_ASSETS)
    declared = {declaration.compute.__name__: declaration for declaration in assets}
    return [build_asset(declared[name], experiment) for name in stages(experiment)]

"""How every asset is made: its inputs are looked up, a finished artifact is reused, else it is computed and recorded.

The assets in data.py, training.py and evaluation.py are plain functions of a `StageRun`: they write files into a
folder and return metrics. Here they become Dagster assets. The order in one materialization: the gate, the inputs, the
store (reuse, wait, resume or compute), the warehouse, Dagster's record.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.display import rounded
from helpsteer_assets.assets.loading import LoadedModels, release_memory
from helpsteer_assets.assets.progress import ProgressReporter
from helpsteer_assets.automation import GROUP, follows_inputs
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment import Experiment
from helpsteer_assets.partitions import weight_partitions
from helpsteer_assets.resources.artifacts import ALL, CHECKPOINTS, Artifact, ArtifactStore
from helpsteer_assets.resources.uses import using
from helpsteer_assets.resources.warehouse import TABLES, Warehouse
from helpsteer_assets.stages import Fingerprint, Stage, code_version, fingerprints, stages
from helpsteer_assets.status import partial_progress

Inputs = Mapping[str, Mapping[str, Artifact]]
"""Finished artifacts that an asset reads, by asset and partition."""

Metrics = dict[str, Any]
"""What a computation measured, JSON-able; kept in the artifact's manifest."""

GPU_POOL = "gpu"
"""Pool of the assets that load a model; its limit (dagster.yaml) is how many of them run at once."""


@dataclass(frozen=True)
class StageRun:
    """What an asset's computation gets."""

    experiment: Experiment
    asset: str
    partition: str
    """The weight, or `ALL`."""
    fingerprint: str
    folder: Path
    """Where the results go. What is in its `checkpoints` survives a killed attempt; nothing else does."""
    inputs: Inputs
    progress: ProgressReporter
    log: Callable[[str], None]
    models: LoadedModels
    """What earlier stages of this process loaded."""

    def input(self, asset: str) -> Artifact:
        """The one artifact that is read of an asset."""
        (artifact,) = self.inputs[asset].values()
        return artifact

    def table(self, asset: str, name: str) -> pa.Table:
        """A Parquet file of an input, as an Arrow table."""
        return pq.read_table(self.input(asset).file(name))

    def write(self, table: pa.Table, name: str) -> None:
        """Write a result table as Parquet."""
        pq.write_table(table, self.folder / name, compression="zstd")

    @property
    def checkpoints(self) -> Path:
        """Folder of what a later attempt goes on from."""
        return self.folder / CHECKPOINTS


@dataclass(frozen=True)
class AssetDeclaration:
    """An asset of the graph: a computation, and what Dagster shows of it."""

    compute: Callable[[StageRun], Metrics]
    """Its name is the asset's; its docstring is what the UI shows."""
    group: str
    kinds: set[str]
    describe: Callable[[Artifact, Inputs, Experiment], Mapping[str, Any]] = lambda artifact, inputs, experiment: {}
    """Dagster metadata of a finished artifact, the same whether it was computed or reused."""
    gate: Callable[[Experiment, Inputs], None] | None = None
    """Raises HelpsteerError where the asset must not be made or reused, whatever lies in the store."""
    table: str | None = None
    """Table of the warehouse that holds the asset's rows."""
    file: str | None = None
    """Parquet file of those rows."""
    loads_model: bool = False


class Lab:
    """The resource that the assets share: the experiment, the store and the warehouse of a home."""

    def __init__(
        self,
        experiment: Experiment,
        home: Path,
        announce: Callable[[str], None] | None = None,
        terminal: TextIO | None = None,
        publish_reused: bool = True,
    ) -> None:
        """
        Args:
            experiment: the experiment whose assets are made.
            home: where results are kept.
            announce: gets what a person at a terminal wants to read; Dagster's log gets it in any case.
            terminal: where progress bars are drawn; None: nowhere.
            publish_reused: whether a reused asset publishes the warehouse at once. A caller that materializes many
                assets passes False and publishes in the end: reuse takes a moment, publishing takes more.
        """
        self.experiment = experiment
        self._publish_reused = publish_reused
        self.store = ArtifactStore(home)
        self.warehouse = Warehouse(home)
        self.digest_cache = home / "cache" / "digests.json"
        self.models = LoadedModels()
        self._announce = announce
        self._terminal = terminal

    def fingerprints(self) -> dict[tuple[str, str], Fingerprint]:
        """The fingerprint of every asset and partition, sources digested anew where they changed."""
        return fingerprints(self.experiment, self.digest_cache)

    def materialize(self, declaration: AssetDeclaration, context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Reuse or compute one asset (of one weight), and record it in warehouse and Dagster."""
        name = declaration.compute.__name__
        partition = context.partition_key if context.has_partition_key else ALL
        label = name if partition == ALL else f"{name} w={partition}"

        def log(message: str) -> None:
            context.log.info(message)
            if self._announce is not None:
                self._announce(message)

        try:
            with _warnings_to(log):
                present = self.fingerprints()
                fingerprint = present[name, partition]
                with using(self.store.home, _used(fingerprint)):
                    inputs = self._inputs(fingerprint, label)
                    if declaration.gate is not None:
                        declaration.gate(self.experiment, inputs)
                    artifact, reused = self._make(declaration, fingerprint, inputs, label, log)
                    log(f"{label}: {'reused' if reused else 'finished'} ({artifact.path})")
                    self.warehouse.forget_others(self.experiment.name, set(present))
                    self.warehouse.record(
                        experiment=self.experiment.name,
                        asset=name,
                        partition=partition,
                        fingerprint=fingerprint.value,
                        path=artifact.path,
                        run_id=context.run_id,
                        reused=reused,
                        table=declaration.table,
                        parquet=artifact.file(declaration.file) if declaration.file else None,
                        constants=self._constants(declaration.table, partition),
                        publish=self._publish_reused or not reused,
                    )
        except HelpsteerError as error:
            # The user has to change something first: trying again would end the same way.
            raise dg.Failure(description=str(error), allow_retries=False) from error
        return dg.MaterializeResult(
            data_version=dg.DataVersion(fingerprint.value),
            metadata={
                **rounded(declaration.describe(artifact, inputs, self.experiment)),
                **self._table_metadata(declaration, artifact),
                "fingerprint": fingerprint.value,
                "reused": reused,
                "duration_s": artifact.manifest["duration_s"],
                "path": dg.MetadataValue.path(str(artifact.path)),
            },
        )

    def _make(
        self,
        declaration: AssetDeclaration,
        fingerprint: Fingerprint,
        inputs: Inputs,
        label: str,
        log: Callable[[str], None],
    ) -> tuple[Artifact, bool]:
        def compute(folder: Path) -> Metrics:
            begun = partial_progress(folder / CHECKPOINTS)
            log(f"{label}: computing" + (f", going on from {begun}" if begun else ""))
            with ProgressReporter(label, log, self._terminal) as progress:
                run = StageRun(
                    self.experiment,
                    fingerprint.asset,
                    fingerprint.partition,
                    fingerprint.value,
                    folder,
                    inputs,
                    progress,
                    log,
                    self.models,
                )
                try:
                    return declaration.compute(run)
                finally:
                    release_memory()

        return self.store.build(
            fingerprint.asset,
            fingerprint.partition,
            fingerprint.value,
            manifest={
                "experiment": self.experiment.name,
                "settings": fingerprint.settings,
                "code": fingerprint.code,
                "inputs": fingerprint.inputs,
                "seed": self.experiment.seed,
                "run": self.experiment.run.model_dump(mode="json"),
            },
            compute=compute,
            on_wait=lambda message: log(f"{label}: {message}"),
        )

    def _inputs(self, fingerprint: Fingerprint, label: str) -> dict[str, dict[str, Artifact]]:
        found: dict[str, dict[str, Artifact]] = {}
        for asset, partitions in fingerprint.inputs.items():
            found[asset] = {}
            for partition, value in partitions.items():
                artifact = self.store.get(asset, partition, value)
                if artifact is None:
                    needed = asset if partition == ALL else f"{asset} for w={partition}"
                    raise HelpsteerError(
                        f"{label} needs {needed}, which is not there: not materialized with the present settings, or "
                        "damaged and set aside, as a warning above says; materialize it (in the UI, or by "
                        "`helpsteer run`)"
                    )
                found[asset][partition] = artifact
        return found

    def _constants(self, table: str | None, partition: str) -> dict[str, Any]:
        """What a table's rows need and their Parquet file does not say."""
        if table == "generations":
            return {"policy": "sft" if partition == ALL else "modpo", "w": None if partition == ALL else partition}
        if table == "scores":
            objective = self.experiment.objective
            if objective.margin == "length_penalty":
                return {"penalty": objective.penalty}
            return {"margin_beta": objective.margin_beta}
        return {}

    def _table_metadata(self, declaration: AssetDeclaration, artifact: Artifact) -> dict[str, Any]:
        if declaration.table is None or declaration.file is None:
            return {}
        rows = pq.read_metadata(artifact.file(declaration.file)).num_rows
        partitioned = artifact.partition != ALL
        return {
            "dagster/partition_row_count" if partitioned else "dagster/row_count": rows,
            "dagster/table_name": declaration.table,
            "dagster/uri": str(self.warehouse.path),
        }


def _used(fingerprint: Fingerprint) -> list[tuple[str, str, str]]:
    """The artifact and its inputs, for nobody to clean up meanwhile."""
    inputs = [
        (asset, partition, value) for asset, found in fingerprint.inputs.items() for partition, value in found.items()
    ]
    return [(fingerprint.asset, fingerprint.partition, fingerprint.value), *inputs]


@contextmanager
def _warnings_to(log: Callable[[str], None]) -> Iterator[None]:
    """What the library warns of (a damaged file, say) is said in the run's log too, where people look."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log(f"warning: {record.getMessage()}")

    handler, library = Handler(logging.WARNING), logging.getLogger("helpsteer_assets")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)


def build_asset(declaration: AssetDeclaration, experiment: Experiment) -> dg.AssetsDefinition:
    """The Dagster asset of a declaration."""
    name = declaration.compute.__name__
    stage: Stage = stages(experiment)[name]
    automated = experiment.run.automation and declaration.group == GROUP

    @dg.asset(
        name=name,
        deps=list(stage.inputs),
        group_name=declaration.group,
        kinds=declaration.kinds,
        description=declaration.compute.__doc__,
        owners=["team:helpsteer_assets"],
        tags={"experiment": experiment.name},
        code_version=code_version(stage, experiment),
        partitions_def=weight_partitions(experiment) if stage.partitioned else None,
        metadata=_definition_metadata(declaration),
        pool=GPU_POOL if declaration.loads_model else None,
        # A killed or crashed step goes on from its last checkpoint; a user's mistake is not tried again.
        retry_policy=dg.RetryPolicy(max_retries=1, delay=5) if declaration.loads_model else None,
        automation_condition=follows_inputs(experiment, stage) if automated else None,
    )
    def _asset(context: dg.AssetExecutionContext, lab: dg.ResourceParam[Lab]) -> dg.MaterializeResult:
        return lab.materialize(declaration, context)

    return _asset


def _definition_metadata(declaration: AssetDeclaration) -> dict[str, Any]:
    if declaration.table is None:
        return {}
    columns = [
        dg.TableColumn(column.name, column.type, description=column.comment)
        for column in TABLES[declaration.table].columns
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=columns), "dagster/table_name": declaration.table}

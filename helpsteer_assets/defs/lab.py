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
import pyarrow.parquet as pq

from helpsteer_assets.assets.graph import Fingerprint, fingerprints
from helpsteer_assets.assets.loaded import LoadedModels, release_memory
from helpsteer_assets.assets.run import Inputs, Metrics, StageRun
from helpsteer_assets.assets.status import partial_progress
from helpsteer_assets.defs.metadata import rounded
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, Artifact, ArtifactStore
from helpsteer_assets.store.uses import using
from helpsteer_assets.store.warehouse import Warehouse

GPU_POOL = "gpu"
"""Pool of the assets that load a model; its limit (dagster.yaml) is how many of them run at once."""

_RETRIES = dg.RetryPolicy(max_retries=1, delay=5)
"""Of those assets: a killed or crashed step goes on from its last checkpoint. A user's mistake is not tried again."""


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
    shard: Callable[[StageRun, int], object] | None = None
    """Does the work of one of `evaluation.shards` parts ahead, and keeps it in the checkpoints of the whole."""


@dataclass(frozen=True)
class _Step:
    """What a step of an asset works with."""

    present: Mapping[tuple[str, str], Fingerprint]
    """Of every asset and partition."""
    fingerprint: Fingerprint
    inputs: Inputs
    label: str
    """Asset, weight and shard, for people."""
    log: Callable[[str], None]

    def say(self, message: str) -> None:
        """Log what happens to it."""
        self.log(f"{self.label}: {message}")


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
        with self._step(declaration, context) as step:
            fingerprint, inputs = step.fingerprint, step.inputs
            artifact, reused = self._make(declaration, step)
            step.say(f"{'reused' if reused else 'finished'} ({artifact.path})")
            self.warehouse.forget_others(self.experiment.name, set(step.present))
            self.warehouse.record(
                experiment=self.experiment.name,
                asset=fingerprint.asset,
                partition=fingerprint.partition,
                fingerprint=fingerprint.value,
                path=artifact.path,
                run_id=context.run_id,
                reused=reused,
                table=declaration.table,
                parquet=artifact.file(declaration.file) if declaration.file else None,
                constants=self._constants(declaration.table, fingerprint.partition),
                publish=self._publish_reused or not reused,
            )
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

    def make_shard(self, declaration: AssetDeclaration, context: dg.OpExecutionContext, number: int) -> None:
        """Do one shard's part of an asset (of one weight), unless the asset is finished."""
        shard = declaration.shard
        assert shard is not None  # the asset would have no such step
        with self._step(declaration, context, f" shard {number + 1} of {self.experiment.evaluation.shards}") as step:
            fingerprint = step.fingerprint
            was_needed = self.store.contribute(
                fingerprint.asset,
                fingerprint.partition,
                fingerprint.value,
                f"shard-{number + 1}",
                compute=lambda folder: self._compute(lambda run: shard(run, number), step, folder),
                on_wait=step.say,
            )
            step.say("done" if was_needed else "the whole is finished already")

    @contextmanager
    def _step(self, declaration: AssetDeclaration, context: dg.OpExecutionContext, suffix: str = "") -> Iterator[_Step]:
        """What a step of an asset needs; a user's mistake within ends it without another try."""
        name = declaration.compute.__name__
        partition = context.partition_key if context.has_partition_key else ALL
        label = (name if partition == ALL else f"{name} w={partition}") + suffix

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
                    yield _Step(present, fingerprint, inputs, label, log)
        except HelpsteerError as error:
            # The user has to change something first: trying again would end the same way.
            raise dg.Failure(description=str(error), allow_retries=False) from error
        except Exception as error:
            if declaration.loads_model and context.retry_number < _RETRIES.max_retries:
                # Else it would seem to begin anew by itself, and nobody would hear of it if it then went well.
                log(f"{label}: failed by {type(error).__name__}: {error}; it is tried once more, from where it was")
            raise

    def _make(self, declaration: AssetDeclaration, step: _Step) -> tuple[Artifact, bool]:
        fingerprint = step.fingerprint
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
            compute=lambda folder: self._compute(declaration.compute, step, folder),
            on_wait=step.say,
        )

    def _compute(self, compute: Callable[[StageRun], Any], step: _Step, folder: Path) -> Any:
        """What `compute` returns of a partial folder."""
        begun = partial_progress(folder / CHECKPOINTS)
        step.say("computing" + (f", going on from {begun}" if begun else ""))
        with ProgressReporter(step.label, step.log, self._terminal) as progress:
            run = StageRun(
                self.experiment,
                step.fingerprint.asset,
                step.fingerprint.partition,
                step.fingerprint.value,
                folder,
                step.inputs,
                progress,
                step.log,
                self.models,
            )
            try:
                return compute(run)
            finally:
                release_memory()

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

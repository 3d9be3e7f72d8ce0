"""How every asset is made: its inputs are looked up, a finished artifact is reused, else it is computed and recorded.

The order in one materialization: the inputs, the gate, the store (reuse, wait, resume or compute), the warehouse,
Dagster's record.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import dagster as dg
import pyarrow.parquet as pq

from helpsteer_assets.assets.graph import Fingerprint, fingerprints, stages
from helpsteer_assets.assets.loaded import LoadedModels, release_memory
from helpsteer_assets.assets.run import StageRun
from helpsteer_assets.assets.stage import Inputs, Metrics, Stage
from helpsteer_assets.assets.status import Status, label, labels, partial_progress, status
from helpsteer_assets.defs.metadata import describe, rounded
from helpsteer_assets.defs.up_to_date import up_to_date_result
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.os_errors import readable_errors
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, Artifact
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_in_use

RETRIES = dg.RetryPolicy(max_retries=1, delay=5)
"""A killed or crashed step that loads a model goes on from its last checkpoint. A user's mistake is not tried again."""


@dataclass(frozen=True)
class _Step:
    """What a step of an asset works with."""

    present: Mapping[tuple[str, str], Fingerprint]
    """Of every asset and partition."""
    fingerprint: Fingerprint
    inputs: Inputs
    label: str
    """Asset and weight, for people."""
    log: Callable[[str], None]

    def say(self, message: str) -> None:
        """Log what happens to it."""
        self.log(f"{self.label}: {message}")


class Lab:
    """The resource that the assets share: the experiment, the store and the warehouse of a home."""

    def __init__(
        self,
        experiment: Experiment,
        home: Home,
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
        self.graph = stages(experiment)
        self._publish_reused = publish_reused
        self.home = home
        self.models = LoadedModels()
        self._announce = announce
        self._terminal = terminal

    def fingerprints(self) -> dict[tuple[str, str], Fingerprint]:
        """The fingerprint of every asset and partition, sources digested anew where they changed."""
        return fingerprints(self.experiment, self.home.digest_cache)

    def materialize(self, stage: Stage, context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Reuse or compute one asset (of one weight), and record it in warehouse and Dagster."""
        with self._step(stage, context) as step:
            fingerprint = step.fingerprint
            artifact, reused = self._make(stage, step)
            step.say(f"{'reused' if reused else 'finished'} ({artifact.path})")
            self.home.warehouse.forget_others(self.experiment.name, set(step.present))
            self.home.warehouse.record(
                experiment=self.experiment.name,
                asset=fingerprint.asset,
                partition=fingerprint.partition,
                fingerprint=fingerprint.value,
                path=artifact.path,
                run_id=context.run_id,
                reused=reused,
                table=stage.table,
                parquet=artifact.file(stage.file) if stage.file else None,
                publish=self._publish_reused or not reused,
            )
            up_to_date = up_to_date_result(self.experiment, self.home, stage.name)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(fingerprint.value),
            check_results=[up_to_date],
            metadata={
                **rounded(describe(stage.name, artifact, step.inputs, self.experiment)),
                **self._table_metadata(stage, artifact),
                "fingerprint": fingerprint.value,
                "reused": reused,
                "duration_s": artifact.manifest["duration_s"],
                "path": dg.MetadataValue.path(str(artifact.path)),
            },
        )

    @contextmanager
    def _step(self, stage: Stage, context: dg.AssetExecutionContext) -> Iterator[_Step]:
        """What a step of an asset needs; a user's mistake within ends it without another try."""
        partition = context.partition_key if context.has_partition_key else ALL
        name = label(stage.name, partition)

        def log(message: str) -> None:
            context.log.info(message)
            if self._announce is not None:
                self._announce(message)

        try:
            with _warnings_to(log), readable_errors(self.home.path):
                present = self.fingerprints()
                fingerprint = present[stage.name, partition]
                with home_in_use(self.home.path, name, lambda message: log(f"{name}: {message}")):
                    inputs = self._inputs(stage, fingerprint)
                    if stage.gate is not None:
                        stage.gate(self.experiment, inputs)
                    yield _Step(present, fingerprint, inputs, name, log)
        except HelpsteerError as error:
            # The user has to change something first: trying again would end the same way.
            raise dg.Failure(description=str(error), allow_retries=False) from error
        except Exception as error:
            if stage.loads_model and context.retry_number < RETRIES.max_retries:
                # Else it would seem to begin anew by itself, and nobody would hear of it if it then went well.
                log(f"{name}: failed by {type(error).__name__}: {error}; it is tried once more, from where it was")
            raise

    def _make(self, stage: Stage, step: _Step) -> tuple[Artifact, bool]:
        fingerprint = step.fingerprint
        return self.home.store.build(
            fingerprint.asset,
            fingerprint.partition,
            fingerprint.value,
            manifest={
                "experiment": self.experiment.name,
                "version": fingerprint.version,
                "settings": fingerprint.settings,
                "inputs": fingerprint.inputs,
                "seed": self.experiment.seed,
                "run": self.experiment.run.model_dump(mode="json"),
            },
            compute=lambda folder: self._compute(stage, step, folder),
            on_wait=step.say,
        )

    def _compute(self, stage: Stage, step: _Step, folder: Path) -> Metrics:
        """Compute the stage's results in a partial folder; returns what it measured."""
        begun = partial_progress(folder / CHECKPOINTS)
        step.say("computing" + (f", going on from {begun}" if begun else ""))
        with ProgressReporter(step.label, step.log, self._terminal) as progress:
            run = StageRun(
                experiment=self.experiment,
                asset=stage.name,
                partition=step.fingerprint.partition,
                fingerprint=step.fingerprint.value,
                folder=folder,
                progress=progress,
                log=step.log,
                models=self.models,
            )
            try:
                return stage.compute(run, **step.inputs)
            finally:
                release_memory()

    def _inputs(self, stage: Stage, fingerprint: Fingerprint) -> Inputs:
        found: dict[str, dict[str, Artifact]] = {}
        for look_up in (self.home.store.find, self.home.store.get):  # the second hashes what may be gigabytes
            found = {
                asset: {w: artifact for w, value in wanted.items() if (artifact := look_up(asset, w, value))}
                for asset, wanted in fingerprint.inputs.items()
            }
            missing = {(asset, w) for asset, wanted in fingerprint.inputs.items() for w in wanted.keys() - found[asset]}
            if missing:
                raise HelpsteerError(self._what_is_missing(label(stage.name, fingerprint.partition), missing))
        return {
            asset: artifacts if self.graph[asset].partitioned and not stage.partitioned else artifacts.popitem()[1]
            for asset, artifacts in found.items()
        }

    def _what_is_missing(self, reader: str, missing: set[tuple[str, str]]) -> str:
        reasons: dict[str, list[Status]] = {}
        for item in status(self.experiment, self.home, {asset for asset, _ in missing}):
            if (item.asset, item.partition) in missing:
                reason = f"{item.state}: {item.detail}" if item.detail else item.state
                reasons.setdefault(reason, []).append(item)
        needed = "; ".join(f"{' and '.join(labels(items))} ({reason})" for reason, items in reasons.items())
        return f"{reader} needs {needed}; materialize these first, in the UI or by `helpsteer run`"

    def _table_metadata(self, stage: Stage, artifact: Artifact) -> dict[str, Any]:
        if stage.table is None or stage.file is None:
            return {}
        rows = pq.read_metadata(artifact.file(stage.file)).num_rows
        partitioned = artifact.partition != ALL
        return {
            "dagster/partition_row_count" if partitioned else "dagster/row_count": rows,
            "dagster/table_name": stage.table,
            "dagster/uri": str(self.home.warehouse.path),
        }


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

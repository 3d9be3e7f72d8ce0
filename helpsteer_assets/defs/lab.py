"""How every asset is made: its inputs are looked up, a finished artifact is reused, else it is computed and recorded.

The order in one materialization: the inputs, the gate, the store (reuse, wait, resume or compute), the warehouse,
Dagster's record.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        partition = context.partition_key if context.has_partition_key else ALL
        name = label(stage.name, partition)

        def log(message: str) -> None:
            context.log.info(message)
            if self._announce is not None:
                self._announce(message)

        def say(message: str) -> None:
            log(f"{name}: {message}")

        try:
            with _warnings_to(log), readable_errors(self.home.path), home_in_use(self.home.path, name, say):
                present = self.fingerprints()
                fingerprint = present[stage.name, partition]
                inputs = self._inputs(stage, fingerprint)
                if stage.gate is not None:
                    stage.gate(self.experiment, inputs)
                artifact, reused = self.home.store.build(
                    stage.name,
                    partition,
                    fingerprint.value,
                    manifest={
                        "experiment": self.experiment.name,
                        "version": fingerprint.version,
                        "settings": fingerprint.settings,
                        "inputs": fingerprint.inputs,
                        "seed": self.experiment.seed,
                        "run": self.experiment.run.model_dump(mode="json"),
                    },
                    compute=lambda folder: self._compute(stage, fingerprint, inputs, folder, log),
                    on_wait=say,
                )
                say(f"{'reused' if reused else 'finished'} ({artifact.path})")
                self._record(stage, artifact, reused, context.run_id, set(present))
                up_to_date = up_to_date_result(self.experiment, self.home, stage.name)
        except HelpsteerError as error:
            # The user has to change something first: trying again would end the same way.
            raise dg.Failure(description=str(error), allow_retries=False) from error
        except Exception as error:
            if stage.loads_model and context.retry_number < RETRIES.max_retries:
                # Else it would seem to begin anew by itself, and nobody would hear of it if it then went well.
                say(f"failed by {type(error).__name__}: {error}; it is tried once more, from where it was")
            raise
        return dg.MaterializeResult(
            data_version=dg.DataVersion(fingerprint.value),
            check_results=[up_to_date],
            metadata={
                **rounded(describe(stage.name, artifact, inputs, self.experiment)),
                **self._table_metadata(stage, artifact),
                "fingerprint": fingerprint.value,
                "reused": reused,
                "duration_s": artifact.manifest["duration_s"],
                "path": dg.MetadataValue.path(str(artifact.path)),
            },
        )

    def _record(
        self, stage: Stage, artifact: Artifact, reused: bool, run_id: str, present: set[tuple[str, str]]
    ) -> None:
        warehouse = self.home.warehouse
        warehouse.forget_others(self.experiment.name, present)
        warehouse.record(
            experiment=self.experiment.name,
            asset=artifact.asset,
            partition=artifact.partition,
            fingerprint=artifact.fingerprint,
            path=artifact.path,
            run_id=run_id,
            reused=reused,
            table=stage.table,
            parquet=artifact.file(stage.file) if stage.file else None,
            publish=self._publish_reused or not reused,
        )

    def _compute(
        self, stage: Stage, fingerprint: Fingerprint, inputs: Inputs, folder: Path, log: Callable[[str], None]
    ) -> Metrics:
        """Compute the stage's results in a partial folder; returns what it measured."""
        name, begun = label(stage.name, fingerprint.partition), partial_progress(folder / CHECKPOINTS)
        log(f"{name}: computing" + (f", going on from {begun}" if begun else ""))
        with ProgressReporter(name, log, self._terminal) as progress:
            run = StageRun(
                experiment=self.experiment,
                asset=stage.name,
                partition=fingerprint.partition,
                fingerprint=fingerprint.value,
                folder=folder,
                progress=progress,
                log=log,
                models=self.models,
            )
            try:
                return stage.compute(run, **inputs)
            finally:
                release_memory()

    def _inputs(self, stage: Stage, fingerprint: Fingerprint) -> Inputs:
        artifacts: dict[str, dict[str, Artifact]] = {}
        wanted = [(asset, w, value) for asset, values in fingerprint.inputs.items() for w, value in values.items()]
        for look_up in (self.home.store.find, self.home.store.get):  # the second hashes what may be gigabytes
            missing = set()
            for asset, w, value in wanted:
                artifact = look_up(asset, w, value)
                if artifact is None:
                    missing.add((asset, w))
                else:
                    artifacts.setdefault(asset, {})[w] = artifact
            if missing:
                raise HelpsteerError(self._what_is_missing(label(stage.name, fingerprint.partition), missing))
        return {
            asset: by_weight if self.graph[asset].partitioned and not stage.partitioned else by_weight.popitem()[1]
            for asset, by_weight in artifacts.items()
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
        return {
            "dagster/row_count" if artifact.partition == ALL else "dagster/partition_row_count": rows,
            "dagster/table_name": stage.table,
            "dagster/uri": str(self.home.warehouse.path),
        }


@contextmanager
def _warnings_to(log: Callable[[str], None]) -> Iterator[None]:
    """Warnings of the library (of a damaged file, say) go to the run's log too, where people look."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log(f"warning: {record.getMessage()}")

    handler, library = Handler(logging.WARNING), logging.getLogger("helpsteer_assets")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)

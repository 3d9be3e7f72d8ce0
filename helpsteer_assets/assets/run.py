"""What an asset's function gets: its experiment, its inputs, and a folder for its results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.loaded import LoadedModels
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.store.artifacts import CHECKPOINTS, Artifact

Inputs = Mapping[str, Mapping[str, Artifact]]
"""Finished artifacts that an asset reads, by asset and partition."""


Metrics = dict[str, Any]
"""What a computation measured, JSON-able; kept in the artifact's manifest."""


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


@contextmanager
def sft_model_on_loan(run: "StageRun") -> "Iterator[PreTrainedModel]":
    """The SFT model on the device of the run, in the stated precision; whatever is attached to it goes in the end."""
    from helpsteer_assets.modpo.models.loading import choose_device

    settings = run.experiment.model
    with run.models.lend(
        run.input("sft_model").path / "model",
        precision=settings.precision,
        device=choose_device(run.experiment.run, settings.precision),
        trust_remote_code=settings.trust_remote_code,
    ) as model:
        yield model


def load_sft_tokenizer(run: "StageRun") -> "PreTrainedTokenizerBase":
    """Its tokenizer."""
    from helpsteer_assets.modpo.models.loading import load_tokenizer

    path = run.input("sft_model").path / "model"
    return load_tokenizer(path, trust_remote_code=run.experiment.model.trust_remote_code)

"""The tools of a stage's function: the experiment, a folder for its results, and the SFT model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.loaded import LoadedModels
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.modpo.settings import Compute
from helpsteer_assets.store.artifacts import CHECKPOINTS, Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StageRun:
    """The surroundings of one computation of a stage."""

    experiment: Experiment
    asset: str
    partition: str
    """The weight, or `ALL`."""
    fingerprint: str
    folder: Path
    """Where the results go. Its `checkpoints` survive a killed attempt; nothing else does."""
    progress: ProgressReporter
    log: Callable[[str], None]
    models: LoadedModels
    """Models that earlier stages of this process loaded."""

    def write(self, table: pa.Table, name: str) -> None:
        """Write a result table as Parquet."""
        pq.write_table(table, self.folder / name, compression="zstd")

    @property
    def compute(self) -> Compute:
        """Device, threads and processes."""
        return self.experiment.run.plain(Compute)

    @property
    def checkpoints(self) -> Path:
        """Folder of what a later attempt goes on from."""
        return self.folder / CHECKPOINTS


@contextmanager
def sft_model_on_loan(run: StageRun, sft_model: Artifact) -> "Iterator[PreTrainedModel]":
    """The SFT model on the device of the run, in the stated precision; whatever is attached to it goes in the end."""
    from helpsteer_assets.modpo.models.loading import choose_device

    settings = run.experiment.model
    with run.models.lend(
        sft_model.path / "model",
        precision=settings.precision,
        device=choose_device(run.compute, settings.precision),
        trust_remote_code=settings.trust_remote_code,
    ) as model:
        yield model


def load_sft_tokenizer(run: StageRun, sft_model: Artifact) -> "PreTrainedTokenizerBase":
    """The SFT model's tokenizer."""
    from helpsteer_assets.modpo.models.loading import load_tokenizer

    return load_tokenizer(sft_model.path / "model", trust_remote_code=run.experiment.model.trust_remote_code)

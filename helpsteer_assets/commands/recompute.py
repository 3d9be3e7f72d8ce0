"""A random sample of stored results, computed again by the very functions of the assets.

An asset's computation reads the rows it works on from its inputs. So a sample of its results is computed by giving it
a sample of those rows: an input artifact whose Parquet file holds only them.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpsteer_assets.assets import evaluation, tradeoff, training
from helpsteer_assets.assets.graph import Fingerprint
from helpsteer_assets.assets.loaded import LoadedModels
from helpsteer_assets.assets.run import Inputs, Metrics, StageRun, load_sft_tokenizer
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.assets.status import label
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.models.loading import choose_device
from helpsteer_assets.modpo.models.tokenization import end_of_text_id
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.store.artifacts import Artifact, environment, versions

NATS = {"fp32": (1e-4, 1e-5), "bf16": (5e-2, 5e-2)}
"""By how many nats a log-probability may differ when it is computed in another batch: so many, and so many per token
of the response."""
RATINGS = 1e-3
"""By how much a rating may differ, relative to 1 + its size, that a reward model gives in fp32."""
RATINGS_16_BITS = 5e-2
"""As `RATINGS`, on a device other than a CPU, where the model runs in the precision of its checkpoint."""
STATISTICS = 1e-6
"""As `RATINGS`, of a summary."""
_IN_NATS = {
    "log_prob": "response_tokens",
    "log_ratio": "response_tokens",
    "margin_log_ratio": "response_tokens",
    "log_ratio_to_sft": "response_tokens",
    "chosen_log_ratio": "chosen_tokens",
    "rejected_log_ratio": "rejected_tokens",
}
"""Columns in nats, and the column with the tokens that each sums over."""
_SHOWN = 3
"""Differences of one asset that are told one by one."""


@dataclass(frozen=True)
class Recomputed:
    """A sample of an asset's rows, computed again."""

    subject: str
    rows: int
    """Rows that were compared."""
    largest: float | None
    """Largest difference of a log-probability or log-ratio, in nats; None where the asset has none."""
    differences: list[str]
    note: str = ""
    """Why differences may be there, or why nothing was compared."""


Whole = dict[tuple[str, str, str], Artifact]
"""Artifacts that match their manifests, by asset, partition and fingerprint."""


@dataclass(frozen=True)
class _Results:
    """The rows of an asset that can be computed from some rows of its inputs."""

    compute: Callable[[StageRun], Metrics]
    file: str
    """The Parquet file of the results."""
    key: tuple[str, ...]
    """Columns that tell its rows apart; a sample is one of the last one's values."""
    sampled: dict[str, str]
    """The inputs that hold the rows it works on, and their Parquet files; the asset itself may be among them."""
    by: tuple[str, ...]
    """Columns of those that hold values of the key; a row is needed if one of them does."""


def _samples_scored_again(run: StageRun) -> Metrics:
    """The stored samples' texts and log-ratios from their tokens: in 16 bits, what is drawn depends on the batch."""
    tokenizer = load_sft_tokenizer(run)
    end_id = end_of_text_id(tokenizer)
    rows = [
        row
        | {
            "response": tokenizer.decode(row["token_ids"], skip_special_tokens=True),
            "finish_reason": "eos" if row["token_ids"][-1] == end_id else "length",
        }
        for row in run.table("kl_to_sft", "kl.parquet").to_pylist()
    ]
    return evaluation.score_samples(run, rows)


_PAIRS = {"preference_pairs": "pairs.parquet", "margin_pairs": "pairs.parquet"}
_OF_PAIRS = ("prompt_id", "response_id"), _PAIRS, ("chosen_id", "rejected_id")
_PROMPTS = ("prompt_id",), {"evaluation_prompts": "prompts.parquet"}, ("prompt_id",)
_RESULTS = {
    "reference_log_probs": _Results(training.reference_log_probs, "log_probs.parquet", *_OF_PAIRS),
    "margin_rewards": _Results(training.margin_rewards, "margin_rewards.parquet", *_OF_PAIRS),
    "margin_adapter_quality": _Results(
        training.margin_adapter_quality,
        "margin_validation.parquet",
        ("pair_id",),
        {"margin_pairs": "pairs.parquet"},
        ("pair_id",),
    ),
    "sft_generations": _Results(evaluation.sft_generations, "generations.parquet", *_PROMPTS),
    "generations": _Results(evaluation.generations, "generations.parquet", *_PROMPTS),
    "sft_scores": _Results(
        evaluation.sft_scores,
        "scores.parquet",
        ("prompt_id",),
        {"sft_generations": "generations.parquet"},
        ("prompt_id",),
    ),
    "scores": _Results(
        evaluation.scores, "scores.parquet", ("prompt_id",), {"generations": "generations.parquet"}, ("prompt_id",)
    ),
    "kl_to_sft": _Results(
        _samples_scored_again, "kl.parquet", ("sample", "prompt_id"), {"kl_to_sft": "kl.parquet"}, ("prompt_id",)
    ),
    "score_summary": _Results(tradeoff.score_summary, "score_summary.parquet", ("policy", "w", "measure"), {}, ()),
}


def recompute(
    experiment: Experiment,
    present: dict[tuple[str, str], Fingerprint],
    whole: Whole,
    samples: int,
    seed: int,
    log: Callable[[str], None],
    terminal: TextIO | None,
) -> Iterator[Recomputed]:
    """Compute rows of the experiment's finished artifacts again, and compare: one at a time, as they are done.

    The summary is computed whole, since that takes a moment. Trained weights are not trained again: they speak through
    the log-probabilities and responses that are.

    Args:
        experiment: the experiment.
        present: its fingerprints.
        whole: the artifacts that may be read.
        samples: rows per artifact.
        seed: chooses them.
        log: gets lines about the progress.
        terminal: where a bar is drawn; None: nowhere.

    Raises:
        HelpsteerError: the device or the rater that the experiment asks for is not there.
    """
    choose_device(experiment.run, experiment.model.precision)
    if isinstance(experiment.evaluation.rater, RewardModelSettings):
        fetch(experiment, "rater")
    models = LoadedModels()
    try:
        for fingerprint in present.values():
            artifact = _of(whole, fingerprint.asset, fingerprint.partition, fingerprint.value)
            if fingerprint.asset in _RESULTS and artifact is not None:
                yield _again(experiment, fingerprint, artifact, whole, samples, seed, log, terminal, models)
    finally:
        models.release()


def _again(
    experiment: Experiment,
    fingerprint: Fingerprint,
    artifact: Artifact,
    whole: Whole,
    samples: int,
    seed: int,
    log: Callable[[str], None],
    terminal: TextIO | None,
    models: LoadedModels,
) -> Recomputed:
    results, subject = _RESULTS[fingerprint.asset], label(fingerprint.asset, fingerprint.partition)
    inputs = {
        asset: {partition: _of(whole, asset, partition, value) for partition, value in partitions.items()}
        for asset, partitions in fingerprint.inputs.items()
    }
    inputs[fingerprint.asset] = {fingerprint.partition: artifact}
    lost = [asset for asset, partitions in inputs.items() if None in partitions.values()]
    if lost:
        return Recomputed(subject, 0, None, [], f"not possible: {', '.join(lost)} is missing or damaged")
    generates = results.file == "generations.parquet"
    if generates and (experiment.generation.engine != "transformers" or experiment.model.precision != "fp32"):
        return Recomputed(subject, 0, None, [], "not possible: responses depend on those generated beside them")
    with (
        tempfile.TemporaryDirectory(prefix="helpsteer-verify-") as name,
        ProgressReporter(f"verify {subject}", log, terminal) as progress,
    ):
        folder = Path(name)
        # A response is drawn by the place of its prompt: the first ones keep theirs.
        first = generates and experiment.generation.do_sample
        chosen = _chosen(artifact.file(results.file), results, samples, None if first else seed)
        sample = _sample(inputs, results, chosen, folder)
        asset, partition, value = fingerprint.asset, fingerprint.partition, fingerprint.value
        run = StageRun(experiment, asset, partition, value, folder, sample, progress, log, models)
        try:
            results.compute(run)
        except Exception as error:  # whatever values that were changed lead to
            return Recomputed(subject, 0, None, [f"it cannot be computed again: {type(error).__name__}: {error}"])
        return _compared(experiment, artifact, results, subject, folder / results.file)


def _of(whole: Whole, asset: str, partition: str, fingerprint: str) -> Artifact | None:
    return whole.get((asset, partition, fingerprint))


def _chosen(file: Path, results: _Results, samples: int, seed: int | None) -> list[Any]:
    """Values of the key: the first ones, or random ones."""
    values = pc.unique(pq.read_table(file, columns=[results.key[-1]])[results.key[-1]]).to_pylist()
    return values[:samples] if seed is None else random.Random(seed).sample(values, min(samples, len(values)))


def _sample(inputs: Any, results: _Results, chosen: list[Any], folder: Path) -> Inputs:
    """The inputs, of which some hold only the rows that the chosen results come from."""
    sample = dict(inputs)
    for asset, file in results.sampled.items():
        if asset in inputs:
            ((partition, artifact),) = inputs[asset].items()
            needed = pc.scalar(False)
            for column in results.by:
                needed |= pc.field(column).isin(chosen)
            (folder / asset).mkdir()
            pq.write_table(pq.read_table(artifact.file(file), filters=needed), folder / asset / file)
            sample[asset] = {partition: replace(artifact, path=folder / asset)}
    return sample


def _compared(experiment: Experiment, artifact: Artifact, results: _Results, subject: str, made: Path) -> Recomputed:
    again = {_key(row, results): row for row in pq.read_table(made).to_pylist()}
    table = pq.read_table(artifact.file(results.file))
    needed = pc.is_in(
        table[results.key[-1]], pa.array([key[-1] for key in again], table.schema.field(results.key[-1]).type)
    )
    differences = _not_finite(table)
    largest = None
    stored = {_key(row, results): row for row in table.filter(needed).to_pylist()}
    for key, row in again.items():
        told = " ".join(f"{name} {value}" for name, value in zip(results.key, key, strict=True))
        if key not in stored:
            differences.append(f"it has no row of {told}")
            continue
        for name, value in stored[key].items():
            difference, allowed = _difference(value, row[name]), _tolerance(experiment, name, stored[key])
            if name in _IN_NATS and value is not None:
                largest = max(largest or 0.0, difference)
            if not difference <= allowed:
                differences.append(
                    f"{name} of {told} is {_shown(value)}, and {_shown(row[name])} when computed again"
                    + (f" (up to {allowed:.2g} may be rounding)" if allowed else "")
                )
    note = ""
    if differences and results.file == "generations.parquet" and _made_elsewhere(artifact):
        # Where two tokens are as good as equally likely, another machine's rounding decides otherwise.
        note = f"{len(differences)} values differ, which another machine or version may cause: {differences[0]}"
        differences = []
    if len(differences) > _SHOWN:
        differences = [*differences[:_SHOWN], f"{len(differences) - _SHOWN} more values differ"]
    return Recomputed(subject, len(again), largest, differences, note)


def _key(row: dict[str, Any], results: _Results) -> tuple[Any, ...]:
    return tuple(row[name] for name in results.key)


def _not_finite(table: pa.Table) -> list[str]:
    """Columns of a whole table with values that no result may have."""
    counts = {
        name: pc.sum(pc.invert(pc.is_finite(table[name]))).as_py()
        for name in table.column_names
        if pa.types.is_floating(table.schema.field(name).type)
    }
    return [f"{count} values of {name} are not finite" for name, count in counts.items() if count]


def _difference(stored: Any, again: Any) -> float:
    """Of two numbers; of anything else 0 where they are equal, and infinite where not."""
    if isinstance(stored, float) and isinstance(again, float):
        return abs(stored - again)
    return 0.0 if stored == again else np.inf


def _tolerance(experiment: Experiment, column: str, row: dict[str, Any]) -> float:
    if column in _IN_NATS:
        base, per_token = NATS[experiment.model.precision]
        return base + per_token * row[_IN_NATS[column]]
    size = 1 + abs(row[column]) if isinstance(row[column], float) else 0.0
    rater = experiment.evaluation.rater
    if column in ATTRIBUTES and isinstance(rater, RewardModelSettings):
        return size * (RATINGS if environment()["device"] == "cpu" else RATINGS_16_BITS)
    return size * STATISTICS if "measure" in row else 0.0


def _made_elsewhere(artifact: Artifact) -> bool:
    """Whether it was made by other versions, or on a machine that may round differently."""
    manifest = artifact.manifest
    return manifest.get("versions") != versions() or manifest.get("environment") != environment()


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The disk space that a run still needs, estimated from file sizes and the model's size without reading any data."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.execution.dagster_home import pool_limit
from helpsteer_assets.experiment.settings import Experiment, is_hub_id
from helpsteer_assets.files.durable import free_space, size_in_words
from helpsteer_assets.store.home import Home

if TYPE_CHECKING:
    from helpsteer_assets.modpo.models.loading import ModelSize

NEARLY_ALL = 0.8
"""Share of the free space or memory from which a warning is due."""
BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a number, by precision."""
_ADAPTER_BYTES = 4
"""LoRA weights are kept in fp32 whatever the model's precision."""
_CHECKPOINT_BYTES = 12
"""Per trained number: the weight and AdamW's two moments."""
_CHECKPOINTS = 5
"""The newest two and the best one at the time of each are kept, while another is written."""
_TEXTS = {"helpsteer_ratings": 1, "preference_pairs": 3, "margin_pairs": 3}
"""How often the source's text is written: a response is in several pairs, and the warehouse holds pairs too."""
_COMPRESSED = {".gz": 4, ".parquet": 4}
"""Bytes of text in a byte of a compressed file, about."""
_EMBEDDED_TEXT = 500_000
"""Bytes of text in the embedded source, about."""
_ANSWER_BYTES = 6
"""Bytes of a generated token: its text and its id."""


@dataclass(frozen=True)
class DiskNeed:
    """The bytes that a run will write."""

    parts: dict[str, int]
    """Bytes by purpose."""
    unknown: str | None
    """A part that is not counted, since it has to be downloaded first."""

    @property
    def bytes(self) -> int:
        """The sum of the known parts."""
        return sum(self.parts.values())


def needs_model(to_make: Collection[tuple[str, str]]) -> bool:
    """Whether the size of these assets depends on the size of the model."""
    return not {asset for asset, _ in to_make}.isdisjoint({"sft_model", "margin_adapter", "modpo_models"})


def disk_need(
    experiment: Experiment,
    to_make: Collection[tuple[str, str]],
    made: Mapping[str, Path],
    home: Home,
    model: "ModelSize | None",
) -> DiskNeed:
    """Estimate how many bytes a home needs at most while assets are made.

    `to_make` are the assets and partitions that are not finished, `made` the folders of finished unpartitioned
    artifacts by asset, `model` the base model's size; None leaves out the parts that depend on it.
    """
    assets = [asset for asset, _ in to_make]
    parts: dict[str, int] = {}
    unknown = None
    if texts := sum(_TEXTS.get(asset, 0) for asset in assets):
        text = _text_bytes(experiment, made.get("helpsteer_ratings"))
        if text is None:
            unknown = f"the data ({experiment.data.source} has to be downloaded first)"
        else:
            parts["data"] = texts * text
    if model is not None and needs_model(to_make):
        if "sft_model" in assets:
            parts["SFT model"] = model.parameters * BYTES[experiment.model.precision]
        policies = assets.count("modpo_models")
        if adapters := policies + assets.count("margin_adapter"):
            name = "1 adapter" if adapters == 1 else f"{adapters} adapters"
            parts[name] = adapters * model.adapter_parameters * _ADAPTER_BYTES
        if adapters or experiment.sft.enabled:
            at_once = max(1, min(pool_limit(), policies))
            checkpoints = at_once * _CHECKPOINTS * model.adapter_parameters * _CHECKPOINT_BYTES
            parts["checkpoints while training"] = checkpoints
    rounds = assets.count("generations") + assets.count("sft_generations")
    rounds += assets.count("kl_to_sft") * experiment.evaluation.kl_samples
    if rounds:
        tokens = experiment.evaluation.prompts * experiment.generation.max_new_tokens
        parts["answers"] = rounds * tokens * _ANSWER_BYTES
    published = home / "warehouse" / "helpsteer.duckdb"
    if to_make and published.exists():
        parts["the warehouse again"] = published.stat().st_size
    return DiskNeed(parts, unknown)


def in_words(need: DiskNeed, home: Home) -> str:
    """`disk: about 310 MB will be written (data 3 MB, ...); 40 GB free in /data`."""
    where, free = free_space(home.path)
    parts = ", ".join(f"{what} {size_in_words(count)}" for what, count in need.parts.items())
    needed = f"{size_in_words(need.bytes)} will be written" + (f" ({parts})" if parts else "")
    beside = f", beside {need.unknown}" if need.unknown else ""
    return f"disk: about {needed}{beside}; {size_in_words(free)} free in {where}"


def shortage(need: DiskNeed, home: Home) -> str | None:
    """Why a run cannot start, and what to do; None if the disk has room."""
    where, free = free_space(home.path)
    if need.bytes <= free:
        return None
    return (
        f"about {size_in_words(need.bytes)} will be written and {where} has {size_in_words(free)} free; free some, or "
        "set HELPSTEER_HOME to a folder on a larger disk"
    )


def _text_bytes(experiment: Experiment, ratings: Path | None) -> int | None:
    """Bytes of the source's text, about; None for a source on the hub that is not in the cache."""
    settings = experiment.data
    if ratings is not None:
        return _uncompressed(ratings)
    if settings.source == "embedded":
        return _EMBEDDED_TEXT
    if is_hub_id(settings.source):
        from huggingface_hub import errors, snapshot_download

        wanted: dict[str, Any] = {"repo_type": "dataset", "revision": settings.revision, "local_files_only": True}
        try:
            return _uncompressed(Path(snapshot_download(settings.source, **wanted)))
        except errors.LocalEntryNotFoundError:
            return None
    return _uncompressed(local_path("data.source", settings.source))


def _uncompressed(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size * _COMPRESSED.get(file.suffix, 1) for file in files)

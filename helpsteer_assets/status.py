"""What is there, what is missing, and what is out of date because of which setting.

Dagster cannot say this: its staleness is not transitive, does not see deleted files, and never shows a partitioned
asset as out of date. Here the present fingerprints are compared with the store and with each asset's latest
materialization. Imports neither Dagster nor torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.experiment import Experiment
from helpsteer_assets.resources.artifacts import ALL, CHECKPOINTS, ArtifactStore
from helpsteer_assets.resources.warehouse import Warehouse
from helpsteer_assets.stages import Fingerprint, fingerprints


@dataclass(frozen=True)
class Status:
    """One asset, or one of its weights."""

    asset: str
    partition: str
    state: str
    """`complete`: materialized with the present settings. `reusable`: the artifact is there, from another run or
    experiment or from earlier settings, and materializing takes it up at once. `partial`: begun; materializing goes on
    from its checkpoint. `out of date`: materialized with other settings. `missing`: never materialized."""
    detail: str
    """How far a partial one is; what changed since an out-of-date one."""
    fingerprint: str
    path: str | None
    """Folder of the finished or partial artifact."""


def status(experiment: Experiment, home: Path) -> list[Status]:
    """The state of every asset and weight, in topological order."""
    store, warehouse = ArtifactStore(home), Warehouse(home)
    present = fingerprints(experiment, home / "cache" / "digests.json")
    return [_status(fingerprint, present, experiment, store, warehouse) for fingerprint in present.values()]


def _status(
    fingerprint: Fingerprint,
    present: dict[tuple[str, str], Fingerprint],
    experiment: Experiment,
    store: ArtifactStore,
    warehouse: Warehouse,
) -> Status:
    asset, partition = fingerprint.asset, fingerprint.partition

    def result(state: str, detail: str = "", path: Path | None = None) -> Status:
        return Status(asset, partition, state, detail, fingerprint.value, None if path is None else str(path))

    latest = warehouse.latest(experiment.name, asset, partition)
    artifact = store.find(asset, partition, fingerprint.value)
    if artifact is not None:
        complete = latest is not None and latest["fingerprint"] == fingerprint.value
        return result("complete" if complete else "reusable", path=artifact.path)
    reason = "" if latest is None else _why(fingerprint, latest["fingerprint"], present, experiment, store, warehouse)
    partial = store.partial(asset, partition, fingerprint.value)
    if partial.is_dir():
        return result("partial", _partial_progress(partial / CHECKPOINTS), partial)
    if latest is None:
        return result("missing")
    return result("out of date", reason)


def _partial_progress(checkpoints: Path) -> str:
    from helpsteer_assets.modpo.checkpoints import checkpoint_progress

    found = checkpoint_progress(checkpoints)
    if found is not None:
        return f"step {found[0]} of {found[1]}"
    rows = sum(path.read_bytes().count(b"\n") for path in checkpoints.glob("*.jsonl"))
    return f"{rows} rows done" if rows else "just begun"


def _why(
    fingerprint: Fingerprint,
    then: str,
    present: dict[tuple[str, str], Fingerprint],
    experiment: Experiment,
    store: ArtifactStore,
    warehouse: Warehouse,
) -> str:
    """What differs between an earlier fingerprint and the present one, followed up to where it began."""
    if then == fingerprint.value:
        return "its artifact is gone from the disk, or damaged"
    earlier = store.find(fingerprint.asset, fingerprint.partition, then)
    if earlier is None:
        return "materialized with other settings"
    manifest = earlier.manifest
    changes = _differences(manifest["settings"], fingerprint.settings)
    changes += [
        f"code of {piece}" for piece, version in fingerprint.code.items() if manifest["code"].get(piece) != version
    ]
    if changes:
        return ", ".join(changes)
    for asset, partitions in fingerprint.inputs.items():
        for partition, value in partitions.items():
            before = manifest["inputs"].get(asset, {}).get(partition)
            if before is not None and before != value:
                deeper = _why(present[asset, partition], before, present, experiment, store, warehouse)
                return deeper if ":" in deeper else f"{asset}: {deeper}"
    return "it reads other inputs"


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    absent = object()
    return [
        f"{key} {_shown(before.get(key))} -> {_shown(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key, absent) != now.get(key, absent)
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}…"


def label(asset: str, partition: str) -> str:
    """An asset, with its weight where it has one."""
    return asset if partition == ALL else f"{asset} w={partition}"

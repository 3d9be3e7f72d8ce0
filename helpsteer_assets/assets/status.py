"""The state of each asset: there, missing, or out of date, and because of which setting.

Dagster cannot say this: its staleness is not transitive, does not see deleted files, and never shows a partitioned
asset as out of date. Here the present fingerprints are compared with the store and with each asset's latest
materialization. Imports neither Dagster nor torch.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.assets.graph import Fingerprint, fingerprints
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, CHECKPOINTS, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse


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


def status(experiment: Experiment, home: Home, assets: Collection[str] | None = None) -> list[Status]:
    """The state of every asset and weight, in topological order.

    Args:
        experiment: the experiment.
        home: where its results are kept.
        assets: those to look at; None: all.
    """
    store, warehouse = home.store, home.warehouse
    present = fingerprints(experiment, home.digest_cache)
    return [
        _status(fingerprint, present, experiment.name, store, warehouse)
        for fingerprint in present.values()
        if assets is None or fingerprint.asset in assets
    ]


def _status(
    fingerprint: Fingerprint,
    present: dict[tuple[str, str], Fingerprint],
    experiment: str,
    store: ArtifactStore,
    warehouse: Warehouse,
) -> Status:
    asset, partition = fingerprint.asset, fingerprint.partition

    def result(state: str, detail: str = "", path: Path | None = None) -> Status:
        return Status(asset, partition, state, detail, fingerprint.value, None if path is None else str(path))

    latest = warehouse.latest(experiment, asset, partition)
    artifact = store.find(asset, partition, fingerprint.value)
    if artifact is not None:
        complete = latest is not None and latest["fingerprint"] == fingerprint.value
        return result("complete" if complete else "reusable", path=artifact.path)
    partial = store.partial(asset, partition, fingerprint.value)
    if partial.is_dir():
        return result("partial", partial_progress(partial / CHECKPOINTS) or "just begun", partial)
    if latest is None:
        return result("missing")
    reasons = _why(fingerprint, latest["fingerprint"], present, store)
    told: set[str] = set()
    parts = []
    for origin, changes in reasons.items():
        new = ", ".join(change for change in changes if change not in told)
        told.update(changes)  # a setting that several assets depend on is named once
        if new:
            parts.append(new if origin == asset else f"{origin}: {new}")
    return result("out of date", "; ".join(parts))


def partial_progress(checkpoints: Path) -> str:
    """How far unfinished work is, in words; empty where it has kept nothing yet."""
    from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress

    steps = checkpoint_progress(checkpoints)
    if steps is not None:
        return f"step {steps[0]} of {steps[1]}"
    rows = 0
    with suppress(FileNotFoundError):  # a running process may finish meanwhile
        rows = sum(path.read_bytes().count(b"\n") for path in checkpoints.glob("*.jsonl"))
    return f"{rows} row{'' if rows == 1 else 's'} done" if rows else ""


def _why(
    fingerprint: Fingerprint, then: str, present: dict[tuple[str, str], Fingerprint], store: ArtifactStore
) -> dict[str, list[str]]:
    """Differences between an earlier fingerprint and the present one: reasons by the asset where they began."""
    asset = fingerprint.asset
    if then == fingerprint.value:
        return {asset: ["its artifact is gone from the disk, or damaged"]}
    earlier = store.find(asset, fingerprint.partition, then)
    if earlier is None:
        return {asset: ["other settings (the earlier artifact is gone, so nothing says which)"]}
    manifest = earlier.manifest
    inputs = manifest.get("inputs", {})
    changes = _differences(manifest.get("settings", {}), fingerprint.settings)
    if manifest.get("version") != fingerprint.version:
        changes.append(f"its code, version {manifest.get('version')} -> {fingerprint.version}")
    reasons = {asset: changes} if changes else {}
    for name, partitions in fingerprint.inputs.items():
        for partition, value in partitions.items():
            before = inputs.get(name, {}).get(partition)
            if before is not None and before != value:
                for origin, causes in _why(present[name, partition], before, present, store).items():
                    reasons[origin] = list(dict.fromkeys([*reasons.get(origin, []), *causes]))
    return reasons or {asset: ["it reads other inputs"]}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    absent, changes = object(), []
    for key in sorted({*before, *now}):
        if before.get(key, absent) != now.get(key, absent):
            old, new = _shown(before.get(key)), _shown(now.get(key))
            changes.append(f"the content of {key}" if old == new == _LOCAL else f"{key} {old} -> {new}")
    return changes


_LOCAL = "a local path"


def _shown(value: Any) -> str:
    """A setting's value, short enough for a table; a local source is in the settings by its digest."""
    text = "null" if value is None else str(value)
    if text.startswith("sha256:"):
        return _LOCAL
    return text if len(text) <= 60 else f"{text[:57]}..."


def label(asset: str, partition: str) -> str:
    """An asset, with its weight where it has one."""
    return asset if partition == ALL else f"{asset} w={partition}"


def labels(items: Iterable[Status]) -> list[str]:
    """Assets with all of their weights: `modpo_models w=0.5, 0.8`."""
    weights: dict[str, list[str]] = {}
    for item in items:
        weights.setdefault(item.asset, []).append(item.partition)
    return [label(asset, ", ".join(partitions)) for asset, partitions in weights.items()]


def unfinished(items: Iterable[Status]) -> list[tuple[str, str]]:
    """The assets and partitions that are still to be made or ended."""
    return [(s.asset, s.partition) for s in items if s.state not in ("complete", "reusable")]


def finished_folders(items: Iterable[Status]) -> dict[str, Path]:
    """Folders of the finished artifacts that have no weight, by asset."""
    return {
        s.asset: Path(s.path) for s in items if s.partition == ALL and s.path and s.state in ("complete", "reusable")
    }

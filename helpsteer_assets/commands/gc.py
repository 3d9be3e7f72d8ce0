"""What in a home nothing refers to any more, and its removal. Imports neither Dagster nor torch.

What is kept: the artifacts, finished and begun, that the given experiments' present settings name; each experiment's
latest materializations, which the warehouse's tables are made from; what running processes use; and all that any of
these was made from, as its manifest tells. In doubt something is kept: an experiment whose source cannot be read here
keeps all that was made for it.

A folder is renamed to `.deleted-<id>` before it is removed, which takes a moment: a process killed meanwhile leaves no
half artifact, and the next removal finishes the work. Dagster's own state (`<home>/dagster`) is left alone.
"""

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.os_errors import readable_os_errors
from helpsteer_assets.store.artifacts import CHECKPOINTS, FOLDER, MANIFEST, SCHEMA_VERSION, SCRATCH, ArtifactStore
from helpsteer_assets.store.home import digest_cache
from helpsteer_assets.store.locks import exclusive_lock, lock_if_free
from helpsteer_assets.store.uses import ArtifactName, in_use, is_held, left_behind, registering

UNFINISHED_DAYS = 7
"""How long unfinished work that no experiment names any more is kept by default: somebody may want to go on with it."""

_SETTLED_DAYS = 1
"""A temporary file, or the lock of a run, that is younger may be in the middle of being made."""
_DAY_SECONDS = 86_400
_DELETED = ".deleted-"
_TEMPORARY = re.compile(r"\.publish-.+|\..+\.(json|lease)\..+")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go."""

    path: Path
    bytes: int
    reason: str
    lock: Path | None = None
    """The lock that whoever works on it holds."""


@dataclass(frozen=True)
class Survey:
    """What a home holds."""

    garbage: list[Garbage]
    """What can go, or has gone, the largest first."""
    kept: int
    """Finished artifacts that stay."""
    kept_bytes: int
    notes: list[str]
    """What is kept in doubt, and why."""


def find_garbage(home: Path, experiments: Sequence[Experiment], older_than: int | None = None) -> Survey:
    """What nothing refers to. Changes nothing, and works in a home that cannot be written to.

    Args:
        home: where results are kept.
        experiments: whose present artifacts are kept.
        older_than: days for which nobody wrote to an artifact or to unfinished work, before it counts; None: 0, and
            `UNFINISHED_DAYS`.

    Raises:
        HelpsteerError: a part of the home cannot be read, or was written by a newer version.
    """
    return _survey(home, _named(home, experiments), older_than)


def delete_garbage(
    home: Path,
    experiments: Sequence[Experiment],
    older_than: int | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Survey:
    """Remove what `find_garbage` finds, but for what somebody works on; returns what was removed.

    One process removes at a time; `on_wait` is told which one is waited for.
    """
    named = _named(home, experiments)
    survey = _survey(home, named, older_than)
    if not survey.garbage:
        return survey
    with exclusive_lock(home / "locks" / "gc.lock", on_wait):
        with registering(home):
            survey = _survey(home, named, older_than)
            set_aside = [(item, aside) for item in survey.garbage if (aside := _set_aside(item)) is not None]
        for _, aside in set_aside:
            with readable_os_errors("remove", aside):
                _remove(aside)
    removed = [item for item, _ in set_aside]
    busy = {item.lock for item in survey.garbage if item not in removed}
    notes = [f"{len(busy)} more kept, for another process works on them"] if busy else []
    return Survey(removed, survey.kept, survey.kept_bytes, survey.notes + notes)


@dataclass(frozen=True)
class _Named:
    """What experiments name."""

    artifacts: set[ArtifactName]
    unreadable: dict[str, str]
    """Names of the experiments whose fingerprints cannot be computed here, and why."""


def _named(home: Path, experiments: Iterable[Experiment]) -> _Named:
    named = _Named(set(), {})
    for experiment in experiments:
        try:
            present = fingerprints(experiment, digest_cache(home))
        except HelpsteerError as error:
            named.unreadable[experiment.name] = str(error)
        else:
            named.artifacts.update((f.asset, f.partition, f.value) for f in present.values())
    return named


@dataclass(frozen=True)
class _Found:
    """The folders of a home's artifacts."""

    finished: dict[ArtifactName, Path]
    begun: dict[ArtifactName, Path]
    damaged: list[Path]
    deleted: list[Path]
    manifests: dict[ArtifactName, dict[str, Any]]
    """Of the finished ones, as far as they can be read."""


def _found(home: Path) -> _Found:
    found = _Found({}, {}, [], [], {})
    for asset, partition, folder in _nested(home / "artifacts"):
        if folder.name.startswith(_DELETED):
            found.deleted.append(folder)
        elif match := FOLDER.fullmatch(folder.name):
            name = (asset, partition, match["fingerprint"])
            if not match["state"]:
                found.finished[name] = folder
                found.manifests[name] = _manifest(folder)
            elif match["state"] == ".partial":
                found.begun[name] = folder
            else:
                found.damaged.append(folder)
    return found


def _survey(home: Path, named: _Named, older_than: int | None) -> Survey:
    found = _found(home)
    used = in_use(home)
    doubted = _doubted(home, named, found)
    latest, notes = _latest(home, found)
    notes += [
        f"experiment {name} cannot be read here, so what was made for it is kept, and all that was begun: {reason}"
        for name, reason in doubted.items()
    ]
    made_for_them = {
        name for name, manifest in found.manifests.items() if doubted and manifest.get("experiment") in (None, *doubted)
    }
    kept = _with_inputs(named.artifacts | latest | used | made_for_them, found.manifests)

    garbage = [Garbage(folder, _size(folder), "its removal was interrupted") for folder in found.deleted]
    garbage += [
        Garbage(folder, _size(folder), "set aside as damaged")
        for folder in found.damaged
        if _days(folder) >= (older_than or 0)
    ]
    for name, folder in found.finished.items():
        if name not in kept:
            if _days(folder) >= (older_than or 0):
                garbage.append(Garbage(folder, _size(folder), _origin(found.manifests[name]), _lock(home, name)))
        elif name not in used:
            left = [folder / CHECKPOINTS, folder / SCRATCH]
            garbage += [Garbage(path, _size(path), "left in a finished artifact") for path in left if path.is_dir()]
    least = UNFINISHED_DAYS if older_than is None else older_than
    young = 0
    for name, folder in found.begun.items():
        if name in used or (name not in found.finished and (name in kept or doubted)):
            continue
        days = _days(folder)
        if name in found.finished and days >= (older_than or 0):
            garbage.append(Garbage(folder, _size(folder), "left beside its finished artifact", _lock(home, name)))
        elif days >= least:
            reason = f"begun, last written to {days:.0f} days ago; no experiment names it"
            garbage.append(Garbage(folder, _size(folder), reason, _lock(home, name)))
        else:
            young += 1
    if young:
        notes.append(f"begun, and no experiment names it: {young}, kept for {least} days (--older-than)")
    gone = {item.path for item in garbage}
    staying = {name: folder for name, folder in found.finished.items() if folder not in gone}
    begun = {name for name, folder in found.begun.items() if folder not in gone}
    garbage += _leftovers(home, {*used, *staying, *begun})
    garbage.sort(key=lambda item: (-item.bytes, item.path))
    return Survey(garbage, len(staying), sum(map(_size, staying.values())), notes)


def _doubted(home: Path, named: _Named, found: _Found) -> dict[str, str]:
    """The experiments that cannot be read here and have been run in this home, and why they cannot be read."""
    known = {folder.name for folder in _subfolders(home / "warehouse" / "registry")}
    known |= {str(manifest.get("experiment")) for manifest in found.manifests.values()}
    return {name: reason for name, reason in sorted(named.unreadable.items()) if name in known}


def _latest(home: Path, found: _Found) -> tuple[set[ArtifactName], list[str]]:
    """The artifacts of all latest materializations; where an entry cannot be read, all that it may mean."""
    latest: set[ArtifactName] = set()
    notes = []
    for _, asset, file in _nested(home / "warehouse" / "registry", files=True):
        if file.suffix == ".json" and not file.name.startswith("."):
            fingerprint = _read_json(file).get("fingerprint")
            if isinstance(fingerprint, str):
                latest.add((asset, file.stem, fingerprint))
            elif doubtful := {name for name in found.finished if name[:2] == (asset, file.stem)}:
                latest |= doubtful
                notes.append(f"{file} cannot be read, so all artifacts of {asset} {file.stem} are kept")
    return latest, notes


def _with_inputs(roots: set[ArtifactName], manifests: dict[ArtifactName, dict[str, Any]]) -> set[ArtifactName]:
    """These, and all that they were made from."""
    found: set[ArtifactName] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        inputs = manifests.get(name, {}).get("inputs")
        for asset, partitions in inputs.items() if isinstance(inputs, dict) else ():
            if isinstance(partitions, dict):
                waiting += [(asset, partition, str(value)) for partition, value in partitions.items()]
    return found


def _leftovers(home: Path, remaining: set[ArtifactName]) -> Iterator[Garbage]:
    """Locks of artifacts that are gone, and what processes left that were killed."""
    locks = home / "locks"
    for asset, partition, path in _nested(locks, files=True):
        fingerprint = path.name.partition(".")[0]  # a lock of one of its shards bears more
        is_lock = path.suffix in (".lock", ".lease") and FOLDER.fullmatch(fingerprint)
        if is_lock and (asset, partition, fingerprint) not in remaining:
            yield Garbage(path, _size(path), "lock of an artifact that is gone", path.with_suffix(".lock"))
    for path in left_behind(home):
        yield Garbage(path, _size(path), "left by a process that was killed")
    for path in _children(locks / "runs"):
        lock = path.with_suffix(".lock")
        if path.suffix in (".lock", ".lease") and _days(path) >= _SETTLED_DAYS and not is_held(lock):
            yield Garbage(path, _size(path), "left by a run that was killed", lock)
    for place in (home / "cache", home / "warehouse", locks):
        for folder, folders, files in os.walk(place):
            for path in (Path(folder, name) for name in (*folders, *files) if _TEMPORARY.fullmatch(name)):
                if path.parent != locks / "uses" and _days(path) >= _SETTLED_DAYS:
                    yield Garbage(path, _size(path), "temporary, left by a process that was killed")


def _set_aside(item: Garbage) -> Path | None:
    """Make it disappear at once; returns what is left to remove, None where somebody works on it."""
    locked = lock_if_free(item.lock) if item.lock is not None and item.lock.exists() else nullcontext(True)
    with locked as free, readable_os_errors("remove", item.path):
        if not free:
            return None
        if not item.path.is_dir():
            item.path.unlink(missing_ok=True)
        elif item.lock is not None:
            return item.path.rename(item.path.with_name(f"{_DELETED}{uuid.uuid4().hex}"))
    return item.path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says, even where files are damaged; empty where it cannot be read."""
    manifest = _read_json(folder / MANIFEST)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise HelpsteerError(
            f"{folder / MANIFEST} was written by a newer helpsteer_assets (schema_version {version}, this one reads "
            f"{SCHEMA_VERSION}), which alone can tell what is needed: nothing is removed; upgrade helpsteer_assets"
        )
    return manifest


def _origin(manifest: dict[str, Any]) -> str:
    if not manifest:
        return "its manifest cannot be read, and nothing refers to it"
    made = f"made for {manifest.get('experiment', 'an unknown experiment')} on {str(manifest.get('created_at'))[:10]}"
    return f"{made}; nothing refers to it"


def _lock(home: Path, name: ArtifactName) -> Path:
    return ArtifactStore(home).lock(*name)


def _nested(root: Path, *, files: bool = False) -> Iterator[tuple[str, str, Path]]:
    """The folders (or files) two folders below, with the names of those two. Links lead elsewhere: not followed."""
    for first in _subfolders(root):
        for second in _subfolders(first):
            for path in _children(second):
                if path.is_file() if files else path.is_dir():
                    yield first.name, second.name, path


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _children(folder) if path.is_dir()]


def _children(folder: Path) -> list[Path]:
    with readable_os_errors("read", folder):
        try:
            return [path for path in sorted(folder.iterdir()) if not path.is_symlink()]
        except FileNotFoundError:
            return []


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is none."""
    with readable_os_errors("read", path):
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
    return found if isinstance(found, dict) else {}


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Of a file or folder and all below it; what goes meanwhile is left out."""
    below = (Path(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files))
    for found in (path, *below):
        with suppress(FileNotFoundError):
            yield found.lstat()


def _size(path: Path) -> int:
    """Bytes of all files."""
    return sum(status.st_size for status in _statuses(path) if not stat.S_ISDIR(status.st_mode))


def _days(path: Path) -> float:
    """Since anything in it was last written."""
    return (time.time() - max((status.st_mtime for status in _statuses(path)), default=0)) / _DAY_SECONDS

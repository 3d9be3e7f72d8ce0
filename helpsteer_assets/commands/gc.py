"""Finds what nothing in a home refers to any more, and removes it. Imports neither Dagster nor torch.

These are kept: the artifacts, finished and unfinished, that the present settings of the given experiments name; each
experiment's latest materializations, which the warehouse's tables are made from; and all that any of these was made
from, by its manifest. In doubt something is kept: if an experiment's source cannot be read here, all that was made for
it stays. Dagster's own state (`<home>/dagster`) is left alone.

A folder of an artifact is renamed to `.deleted-<id>` before it is removed: a process that is killed meanwhile leaves no
half artifact, and the next removal finishes the work.
"""

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import CHECKPOINTS, FOLDER, MANIFEST, SCHEMA_VERSION, SCRATCH, ArtifactName
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_alone

UNFINISHED_DAYS = 7
"""Unfinished work that no experiment names is kept for so long by default: somebody may want to go on with it."""

_SETTLED_DAYS = 1
"""A younger temporary file may be in use."""
_DAY_SECONDS = 86_400
_DELETED = ".deleted-"
_TEMPORARY = re.compile(r"\.publish-.+|\..+\.json\..+")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go."""

    path: Path
    bytes: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """Artifacts that can go, and how much stays."""

    garbage: list[Garbage]
    """Those that can go, or have gone, the largest first."""
    kept: int
    """Finished artifacts that stay."""
    kept_bytes: int
    notes: list[str]
    """Those that are kept in doubt, and why."""


def find_garbage(home: Home, experiments: Sequence[Experiment], older_than: int | None = None) -> Survey:
    """List what nothing refers to. Changes nothing, and works in a home that cannot be written to.

    The experiments' present artifacts are kept. `older_than` is the days for which nobody wrote to an artifact or to
    unfinished work, before it counts; None: 0, and `UNFINISHED_DAYS` for unfinished work.

    Raises:
        HelpsteerError: a part of the home was written by a newer version.
        OSError: a part cannot be read.
    """
    return _survey(home, *_named_by(experiments, home), older_than)


def delete_garbage(home: Home, experiments: Sequence[Experiment], older_than: int | None = None) -> Survey:
    """Remove what `find_garbage` finds, and return it.

    Raises:
        HelpsteerError: as `find_garbage`; also if something runs in the home.
        OSError: as `find_garbage`; also if a file cannot be removed.
    """
    named = _named_by(experiments, home)
    if not home.path.is_dir():
        return _survey(home, *named, older_than)
    with home_alone(home.path):
        survey = _survey(home, *named, older_than)
        for item in survey.garbage:
            _remove(item.path)
    return survey


def _named_by(experiments: Iterable[Experiment], home: Home) -> tuple[set[ArtifactName], dict[str, str]]:
    """The artifacts that experiments name; experiments whose fingerprints cannot be computed here, and why."""
    artifacts: set[ArtifactName] = set()
    unreadable: dict[str, str] = {}
    for experiment in experiments:
        try:
            present = fingerprints(experiment, home.digest_cache)
        except HelpsteerError as error:
            unreadable[experiment.name] = str(error)
        else:
            artifacts.update((f.asset, f.partition, f.value) for f in present.values())
    return artifacts, unreadable


@dataclass(frozen=True)
class _Folders:
    """The folders of a home's artifacts, by their state."""

    finished: dict[ArtifactName, Path] = field(default_factory=dict)
    unfinished: dict[ArtifactName, Path] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)
    deleted: list[Path] = field(default_factory=list)
    """Their removal was interrupted."""
    manifests: dict[ArtifactName, dict[str, Any]] = field(default_factory=dict)
    """The manifest of each finished artifact; empty where it cannot be read."""


def _read_folders(home: Home) -> _Folders:
    folders = _Folders()
    for asset, partition, folder in _nested(home / "artifacts"):
        if folder.name.startswith(_DELETED):
            folders.deleted.append(folder)
        elif match := FOLDER.fullmatch(folder.name):
            name = (asset, partition, match["fingerprint"])
            if not match["state"]:
                folders.finished[name] = folder
                folders.manifests[name] = _manifest(folder)
            elif match["state"] == ".partial":
                folders.unfinished[name] = folder
            else:
                folders.damaged.append(folder)
    return folders


def _survey(home: Home, named: set[ArtifactName], unreadable: dict[str, str], older_than: int | None) -> Survey:
    folders = _read_folders(home)
    # An experiment that cannot be read here and was never run in this home has nothing to keep.
    known = {folder.name for folder in _subfolders(home / "warehouse" / "registry")}
    known |= {str(manifest.get("experiment")) for manifest in folders.manifests.values()}
    doubted = {name: reason for name, reason in sorted(unreadable.items()) if name in known}
    latest, notes = _latest(home, folders)
    notes += [
        f"experiment {name} cannot be read here, so what was made for it is kept, and all unfinished work: {reason}"
        for name, reason in doubted.items()
    ]
    made_for_doubted = {
        name
        for name, manifest in folders.manifests.items()
        if doubted and manifest.get("experiment") in (None, *doubted)
    }
    kept = _with_inputs(named | latest | made_for_doubted, folders.manifests)
    days, unfinished_days = (0, UNFINISHED_DAYS) if older_than is None else (older_than, older_than)

    garbage = [_garbage(folder, "its removal was interrupted") for folder in folders.deleted]
    garbage += [_garbage(folder, "set aside as damaged") for folder in folders.damaged if _age(folder) >= days]
    staying = dict(folders.finished)
    for name, folder in folders.finished.items():
        if name in kept:
            left = [folder / CHECKPOINTS, folder / SCRATCH]
            garbage += [_garbage(path, "left in a finished artifact") for path in left if path.is_dir()]
        elif _age(folder) >= days:
            garbage.append(_garbage(staying.pop(name), _origin(folders.manifests[name])))
    begun = dict(folders.unfinished)
    young = 0
    for name, folder in folders.unfinished.items():
        age, superseded = _age(folder), name in folders.finished
        if superseded and age >= days:
            garbage.append(_garbage(begun.pop(name), "left beside its finished artifact"))
        elif superseded or name in kept or doubted:
            continue
        elif age >= unfinished_days:
            reason = f"unfinished, last written to {age:.0f} days ago; no experiment names it"
            garbage.append(_garbage(begun.pop(name), reason))
        else:
            young += 1
    if young:
        notes.append(f"unfinished, and no experiment names it: {young}, kept for {unfinished_days} days (--older-than)")
    garbage += _leftovers(home, {*staying, *begun})
    garbage.sort(key=lambda item: (-item.bytes, item.path))
    return Survey(garbage, len(staying), sum(map(_size, staying.values())), notes)


def _latest(home: Home, folders: _Folders) -> tuple[set[ArtifactName], list[str]]:
    """The artifacts of all latest materializations; where an entry cannot be read, all that it may mean."""
    latest: set[ArtifactName] = set()
    notes = []
    for _, asset, file in _nested(home / "warehouse" / "registry", files=True):
        if file.suffix == ".json" and not file.name.startswith("."):
            fingerprint = _read_json(file).get("fingerprint")
            if isinstance(fingerprint, str):
                latest.add((asset, file.stem, fingerprint))
            elif possible := {name for name in folders.finished if name[:2] == (asset, file.stem)}:
                latest |= possible
                notes.append(f"{file} cannot be read, so all artifacts of {asset} {file.stem} are kept")
    return latest, notes


def _with_inputs(names: set[ArtifactName], manifests: dict[ArtifactName, dict[str, Any]]) -> set[ArtifactName]:
    """These artifacts, and all that they were made from."""
    reached: set[ArtifactName] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        inputs = manifests.get(name, {}).get("inputs")
        for asset, partitions in inputs.items() if isinstance(inputs, dict) else ():
            if isinstance(partitions, dict):
                waiting += [(asset, partition, str(value)) for partition, value in partitions.items()]
    return reached


def _leftovers(home: Home, remaining: set[ArtifactName]) -> Iterator[Garbage]:
    """Locks of artifacts that are gone, and temporary files of processes that were killed."""
    for asset, partition, path in _nested(home / "locks", files=True):
        is_lock = path.suffix == ".lock" and FOLDER.fullmatch(path.stem)
        if is_lock and (asset, partition, path.stem) not in remaining:
            yield _garbage(path, "lock of an artifact that is gone")
    for place in (home / "cache", home / "warehouse"):
        for folder, folders, files in os.walk(place):
            for path in (Path(folder, name) for name in (*folders, *files) if _TEMPORARY.fullmatch(name)):
                if _age(path) >= _SETTLED_DAYS:
                    yield _garbage(path, "temporary, left by a process that was killed")


def _garbage(path: Path, reason: str) -> Garbage:
    return Garbage(path, _size(path), reason)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if FOLDER.fullmatch(path.name):
        path = path.rename(path.with_name(f"{_DELETED}{uuid.uuid4().hex}"))
    shutil.rmtree(path)


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, even where other files are damaged; empty where it cannot be read."""
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
    try:
        return [path for path in sorted(folder.iterdir()) if not path.is_symlink()]
    except FileNotFoundError:
        return []


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """The status of a file or folder and of all below it; files that go meanwhile are left out."""
    below = (Path(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files))
    for each in (path, *below):
        with suppress(FileNotFoundError):
            yield each.lstat()


def _size(path: Path) -> int:
    """Bytes of all files."""
    return sum(status.st_size for status in _statuses(path) if not stat.S_ISDIR(status.st_mode))


def _age(path: Path) -> float:
    """Days since anything in it was last written."""
    return (time.time() - max((status.st_mtime for status in _statuses(path)), default=0)) / _DAY_SECONDS

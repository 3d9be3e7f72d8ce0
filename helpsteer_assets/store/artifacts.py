"""The input-addressed artifact store.

    <home>/artifacts/<asset>/<partition or "all">/<fingerprint>/            finished; never changed
                                                  <fingerprint>.partial/    being made, or left by an interrupted run
                                                  <fingerprint>.damaged-1/  set aside: did not match its manifest
    <home>/locks/<asset>/<partition or "all">/<fingerprint>.lock

A finished artifact holds `manifest.json` (what made it, from what, with which result, and every file's size and
sha256) and the files it lists. Work goes on in the partial folder: results in its root, what a resumed run needs in
`checkpoints/`, scratch in `tmp/`. Finishing writes the manifest, removes the scratch and renames the folder, in this
order. So a process killed at any moment leaves a partial folder without a manifest (the work is taken up from its
checkpoints), a partial folder with one (complete: it only has to be renamed), or the finished artifact.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.digests import file_sha256, is_intact, listing, sealed
from helpsteer_assets.files.durable import checked_name, sync, write_atomically
from helpsteer_assets.store.locks import HeldLock, exclusive_lock, lock_if_free

if TYPE_CHECKING:
    import pyarrow as pa

ALL = "all"
"""The partition folder of an unpartitioned asset."""
FOLDER = re.compile(r"(?P<fingerprint>[0-9a-f]{32})(?P<state>|\.partial|\.damaged-\d+)")
"""Name of an artifact's folder; the state of a finished one is empty."""
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
"""Folder of a partial artifact that survives an interruption; a finished artifact has none."""
SCRATCH = "tmp"
"""Folder of a partial artifact for temporary files, empty before each attempt; a finished artifact has none."""
SCHEMA_VERSION = 2
"""Version 2 added `environment` and the manifest's own digest."""

ArtifactName = tuple[str, str, str]
"""Asset, partition and fingerprint."""

_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "duckdb", "dagster", "helpsteer_assets")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    asset: str
    partition: str
    fingerprint: str
    path: Path
    """Its folder."""
    manifest: dict[str, Any]

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists (`adapter/adapter_config.json`); HelpsteerError for another."""
        if name not in self.manifest["files"]:
            known = ", ".join(sorted(self.manifest["files"]))
            raise HelpsteerError(f"{self.path} has no file {name!r}; its manifest lists: {known}")
        return self.path / name

    def table(self, name: str, columns: list[str] | None = None) -> "pa.Table":
        """A Parquet file of the artifact, or some of its columns, as an Arrow table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.file(name), columns=columns)


Artifacts = dict[ArtifactName, Artifact]


class _DamagedError(Exception):
    """A folder is no artifact; the message says why."""


class ArtifactStore:
    """Artifacts of a home, found by the fingerprint of all that determines them.

    An artifact has one writer at a time, and any number of readers.

    An asset's partition is its weight (`0.1`), or `ALL`. Every method raises HelpsteerError for a name that cannot be
    a folder's and for a manifest of a newer version of this package, and OSError for a file system that refuses.
    """

    def __init__(self, home: Path) -> None:
        self.home = Path(home).absolute()
        self.artifacts = self.home / "artifacts"
        self.locks = self.home / "locks"

    def find(self, asset: str, partition: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, or None. Cheap: its manifest is readable and the sizes agree; nothing is hashed."""
        folder = self._folder(asset, partition, fingerprint)
        try:
            artifact = _read(folder, (asset, partition, fingerprint))
        except _DamagedError:
            return None
        return None if artifact is None or any(_size_problems(artifact)) else artifact

    def verify(self, artifact: Artifact) -> list[str]:
        """The files whose size or sha256 differs from the manifest, a line for each; empty if all are right.

        Files that the manifest does not list are no damage.
        """
        return list(_size_problems(artifact)) or list(_digest_problems(artifact))

    def get(self, asset: str, partition: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, verified, or None. A damaged one is set aside with a warning, and None returned."""
        name = (asset, partition, fingerprint)
        artifact, problems = self.inspect(*name)
        if not problems:
            return artifact
        with lock_if_free(self._lock(*name)) as free:
            # If another process holds the lock, it repairs the artifact, which may be whole again already.
            return self._get_locked(name) if free else None

    def partial(self, asset: str, partition: str, fingerprint: str) -> Path:
        """The folder in which the artifact is being made; it need not exist."""
        folder = self._folder(asset, partition, fingerprint)
        return folder.with_name(f"{folder.name}.partial")

    def build(
        self,
        asset: str,
        partition: str,
        fingerprint: str,
        *,
        manifest: dict[str, Any],
        compute: Callable[[Path], dict[str, Any]],
        on_wait: Callable[[str], None],
    ) -> tuple[Artifact, bool]:
        """Makes the artifact unless it is there; returns it, and whether it was reused.

        One process builds an artifact; a second says so through `on_wait` (once), waits without bound, and reuses the
        first one's work, or takes it up where the first one died.

        `manifest` says what determines the artifact (`settings`, `inputs`, `seed`, ...). `compute` gets the partial
        folder, writes its results there and returns the metrics for the manifest; numbers must be finite. It finds
        what it kept in `checkpoints/` in an interrupted attempt; all else of that attempt has been removed. If it
        raises, the partial folder stays.
        """
        json.dumps(manifest, allow_nan=False)  # to fail before a training, and not after it
        label = f"{asset} {partition}" if partition != ALL else asset
        with exclusive_lock(
            self._lock(asset, partition, fingerprint),
            lambda holder: on_wait(f"{holder}, which is making {label} ({fingerprint})"),
        ) as lock:
            name = (asset, partition, fingerprint)
            if (artifact := self._get_locked(name) or self._adopt(name, lock)) is not None:
                return artifact, True
            partial = self.partial(*name)
            resumed = _prepare(partial)
            started = time.monotonic()
            metrics = compute(partial)
            _require_finite(metrics, label)
            complete = {
                **manifest,
                "schema_version": SCHEMA_VERSION,
                "asset": asset,
                "partition": partition,
                "fingerprint": fingerprint,
                "metrics": metrics,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "duration_s": round(time.monotonic() - started, 3),
                "resumed": resumed,
                "versions": versions(),
                "git_revision": git_revision(),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "environment": environment(),
            }
            complete["files"] = listing(partial, _results(partial))
            lock.check()
            text = json.dumps(sealed(complete), indent=2, allow_nan=False) + "\n"
            write_atomically(partial / MANIFEST, text)
            return self._finish(name, json.loads(text), lock), False

    def _adopt(self, name: ArtifactName, lock: HeldLock) -> Artifact | None:
        """Finishes a partial folder that was complete when its maker died; None if there is none."""
        partial = self.partial(*name)
        artifact, problems = self._inspect(partial, name)
        if problems:
            # Its checkpoints may be half removed, so nothing can be resumed from them.
            logger.warning("%s is damaged and made anew: %s", partial, "; ".join(problems))
            shutil.rmtree(partial)
            return None
        return None if artifact is None else self._finish(name, artifact.manifest, lock)

    def _finish(self, name: ArtifactName, manifest: dict[str, Any], lock: HeldLock) -> Artifact:
        partial, folder = self.partial(*name), self._folder(*name)
        for left in (CHECKPOINTS, SCRATCH):
            _remove(partial / left)
        for path in (partial, *partial.rglob("*")):
            sync(path)
        lock.check()
        partial.rename(folder)
        sync(folder.parent)
        return Artifact(*name, folder, manifest)

    def _get_locked(self, name: ArtifactName) -> Artifact | None:
        artifact, problems = self.inspect(*name)
        if not problems:
            return artifact
        folder = self._folder(*name)
        count = 1
        while (aside := folder.with_name(f"{folder.name}.damaged-{count}")).exists():
            count += 1
        logger.warning("%s is damaged and set aside as %s: %s", folder, aside.name, "; ".join(problems))
        folder.rename(aside)
        return None

    def inspect(self, asset: str, partition: str, fingerprint: str) -> tuple[Artifact | None, list[str]]:
        """The finished artifact by its manifest, and the problems of its files; changes nothing."""
        folder = self._folder(asset, partition, fingerprint)
        artifact, problems = self._inspect(folder, (asset, partition, fingerprint))
        if artifact is None and not problems and folder.exists():
            problems = [f"{MANIFEST} is missing"]
        return artifact, problems

    def _inspect(self, folder: Path, name: ArtifactName) -> tuple[Artifact | None, list[str]]:
        try:
            artifact = _read(folder, name)
        except _DamagedError as error:
            return None, [str(error)]
        return artifact, self.verify(artifact) if artifact is not None else []

    def _folder(self, asset: str, partition: str, fingerprint: str) -> Path:
        return self.artifacts / self._name(asset, partition, fingerprint)

    def _lock(self, asset: str, partition: str, fingerprint: str) -> Path:
        return self.locks / self._name(asset, partition, f"{fingerprint}.lock")

    @staticmethod
    def _name(asset: str, partition: str, fingerprint: str) -> Path:
        return Path(
            checked_name("asset", asset), checked_name("partition", partition), checked_name("fingerprint", fingerprint)
        )


def _read(folder: Path, name: ArtifactName) -> Artifact | None:
    """The artifact by its manifest; None where there is no manifest. Raises _DamagedError."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads(text)
        version, files = manifest["schema_version"], manifest["files"]
        if not isinstance(version, int):
            raise TypeError("its schema_version is no number")
        if version > SCHEMA_VERSION:
            raise HelpsteerError(
                f"{path} was written by a newer helpsteer_assets (schema_version {version}, this one reads "
                f"{SCHEMA_VERSION}): upgrade helpsteer_assets, or set HELPSTEER_HOME to another folder"
            )
        for entry in files.values():
            _ = int(entry["bytes"]), str(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{MANIFEST} is unreadable ({type(error).__name__}: {error})") from error
    stated = tuple(manifest.get(key) for key in ("asset", "partition", "fingerprint"))
    if stated != name:
        raise _DamagedError(f"{MANIFEST} is that of another artifact ({'/'.join(map(str, stated))})")
    if version >= 2 and not is_intact(manifest):
        raise _DamagedError(f"{MANIFEST} does not match its own digest")
    return Artifact(*name, folder, manifest)


def _prepare(partial: Path) -> bool:
    """Readies the partial folder for an attempt; True if it holds checkpoints of an earlier one."""
    checkpoints = partial / CHECKPOINTS
    for place in (partial, checkpoints):
        if place.is_symlink():
            place.unlink()  # what it leads to is somebody else's
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        # An artifact holds only what the attempt that finished it wrote.
        if path.name != CHECKPOINTS:
            _remove(path)
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _results(partial: Path) -> list[str]:
    """The result files in the partial folder, by path relative to it."""
    paths = (path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if path.parts[0] not in (CHECKPOINTS, SCRATCH)]


def _require_finite(metrics: Any, label: str, key: str = "") -> None:
    if isinstance(metrics, float) and not math.isfinite(metrics):
        raise HelpsteerError(
            f"{label}: {key} is {metrics}, which no result may be; look for values that are not finite in what it "
            "reads (`helpsteer verify --deep`), or for a model whose weights are not"
        )
    nested = metrics.items() if isinstance(metrics, dict) else enumerate(metrics) if isinstance(metrics, list) else ()
    for name, value in nested:
        _require_finite(value, label, f"{key}.{name}" if key else str(name))


def _size_problems(artifact: Artifact) -> Iterator[str]:
    for name, entry in artifact.manifest["files"].items():
        path = artifact.path / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            yield f"{name} is missing"
        elif size != entry["bytes"]:
            yield f"{name} has {size} bytes instead of {entry['bytes']}"


def _digest_problems(artifact: Artifact) -> Iterator[str]:
    for name, entry in artifact.manifest["files"].items():
        digest = file_sha256(artifact.path / name)
        if digest != entry["sha256"]:
            yield f"{name} has sha256 {digest[:16]}... instead of {entry['sha256'][:16]}..."


def environment() -> dict[str, Any]:
    """Properties of this machine that can change the last bits of a result: processor, cores, device, threads."""
    described: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "device": "cpu"}
    torch = sys.modules.get("torch")
    if torch is not None:  # an asset that computes with it has imported it
        described |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
        if torch.cuda.is_initialized():
            described |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return described


@cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


@cache
def git_revision() -> str | None:
    """The commit of the project's checkout, `-dirty` if tracked files differ from it; None outside a checkout.

    A package installed inside some other project's checkout (its virtual environment) has no revision.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None

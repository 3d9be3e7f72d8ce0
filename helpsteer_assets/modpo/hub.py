"""Data sets and models from the Hugging Face hub, and the digests by which local files and folders are known.

A download is one commit of one repository, kept in the hub's own cache (`HF_HOME`); a commit that is cached already is
found with no network. Of a model no pickles are fetched, which run code when they are read. A local folder has no
commit, so its content is hashed; since models are large, each file's hash is remembered by path, size and modification
time.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.digests import file_sha256, is_intact, sealed

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
_SETTLED_NS = 2_000_000_000
"""Age from which a modification time identifies a content: file systems count time in steps of up to two seconds."""


def download(
    repo_id: str, revision: str, kind: Literal["dataset", "model"], allow_patterns: list[str] | None = None
) -> Path:
    """The local folder of a repository at a commit, downloaded where it is not cached.

    Args:
        repo_id: such as `nvidia/HelpSteer`.
        revision: the commit hash.
        kind: what the repository holds.
        allow_patterns: download only files whose name matches one of these (`*.safetensors`); None: all. A model's
            pickled weights (`pytorch_model.bin`) are left out in any case.

    Honours HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT. Raises HelpsteerError, naming repository, revision and
    remedy, where the repository is gated, private, disabled, missing, lacks the revision, or cannot be reached.
    """
    from huggingface_hub import constants, errors, snapshot_download

    what = f"{'data set' if kind == 'dataset' else 'model'} {repo_id} at revision {revision}"
    key = "`data.source`" if kind == "dataset" else "`model.base` (or `evaluation.rater.model`)"
    or_local = f"or give the path of a local folder as {key}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    try:
        return Path(
            snapshot_download(
                repo_id,
                repo_type=kind,
                revision=revision,
                allow_patterns=allow_patterns,
                ignore_patterns=_PICKLES if kind == "model" else None,
            )
        )
    except errors.GatedRepoError as error:
        raise HelpsteerError(
            f"the {what} is gated: accept its licence on {page}, then {_LOG_IN} of that account, {or_local}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HelpsteerError(
            f"the {what} was not found on the hub: it does not exist or is private. Check the name; if it is private, "
            f"{_LOG_IN} of an account that may read it, {or_local}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HelpsteerError(
            f"the {what}: the repository is there, the revision is not. Take a commit hash from {page}/commits/main, "
            f"{or_local}"
        ) from error
    except errors.DisabledRepoError as error:
        raise HelpsteerError(f"the {what} was disabled on the hub: choose another, {or_local}") from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise HelpsteerError(
                f"the {what} is not in the hub cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE forbids fetching "
                f"it: unset HF_HUB_OFFLINE, or point HF_HOME at a cache that holds it, {or_local}"
            ) from error
        raise HelpsteerError(
            f"the {what} is not in the hub cache ({constants.HF_HUB_CACHE}) and {constants.ENDPOINT} cannot be reached "
            f"({error.__cause__ or error}): check the network, or point HF_HOME at a cache that holds it, {or_local}"
        ) from error
    except errors.HFValidationError as error:
        raise HelpsteerError(
            f"{key}: {repo_id!r} is no id on the hub ({error}). An id reads `owner/name`; a path starts with `.`, `/` "
            "or `~`"
        ) from error
    except (errors.HTTPError, OSError) as error:  # what the server, the proxy or the disk said
        raise HelpsteerError(
            f"the {what} could not be downloaded: {error}\nIf it says 401 or 403, {_LOG_IN}; else try again, {or_local}"
        ) from error


def content_digest(path: Path, cache: Path | None = None) -> str:
    """SHA-256, 64 hex digits, over the names and contents of a file or of all files under a folder.

    A folder's own name and place do not matter, the names inside it do; a single file's name does. Hidden files and
    folders (`.git`, `.cache`) are left out, and what has no content (pipes, sockets, devices).

    Args:
        path: file or folder.
        cache: JSON file that keeps each file's digest by absolute path, size and modification time, so that an
            unchanged file is not read again. It may be missing or damaged, and several processes may share it.

    Raises HelpsteerError where the path does not exist, holds no file, or cannot be read.
    """
    path = path.absolute()
    remembered = _read_cache(cache) if cache else {}
    learnt: dict[str, list[object]] = {}
    total = hashlib.sha256()
    count = 0
    try:
        for file in _visible_files(path):
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                continue  # reading it might never end
            known = remembered.get(str(file))
            if known and known[:2] == [status.st_size, status.st_mtime_ns]:
                digest = str(known[2])
            else:
                digest = file_sha256(file)
                # A file written just now may be written again within the same tick of its modification time.
                if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
                    learnt[str(file)] = [status.st_size, status.st_mtime_ns, digest]
            name = file.name if file == path else file.relative_to(path).as_posix()
            total.update(os.fsencode(name) + b"\x00" + digest.encode())
            count += 1
    except FileNotFoundError as error:
        raise HelpsteerError(f"{error.filename} does not exist: check the path") from error
    except OSError as error:
        raise HelpsteerError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    if not count:
        raise HelpsteerError(f"{path} holds no files: point at the folder that holds them")
    if cache and learnt:
        _write_cache(cache, learnt)
    return total.hexdigest()


def _visible_files(path: Path) -> Iterator[Path]:
    """The file itself, or a folder's files in a stable order, links followed and hidden names left out."""
    if not path.is_dir():
        yield path
        return
    found: list[Path] = []

    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=stop):
        here = Path(os.path.realpath(folder))
        # A link to a folder above would never end.
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not here.is_relative_to(os.path.realpath(Path(folder, name)))
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    yield from sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _read_cache(cache: Path) -> dict[str, list[object]]:
    """What the cache file remembers; nothing where it is missing or damaged."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or not is_intact(content):
        return {}  # a flipped bit would put everything out of date
    return {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str) and len(entry[2]) == 64
    }


def _write_cache(cache: Path, learnt: dict[str, list[object]]) -> None:
    """Add entries, keeping those that another process wrote meanwhile; a cache that can't be written is only slow."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(sealed(_read_cache(cache) | learnt), file, indent=0, sort_keys=True)
            Path(temporary).replace(cache)
        except BaseException:
            Path(temporary).unlink()
            raise

"""Exports a policy: a folder that transformers, PEFT, vLLM and the hub read without this package.

    <folder>/config.json, model.safetensors               the model, in the experiment's precision
             tokenizer.json, chat_template.jinja, ...     its tokenizer
             generation_config.json                       the experiment's generation settings
             README.md                                    the model card
             provenance.json                              what it was made from, and the digest of every other file

An adapter, for those who serve several weights over one SFT model, has `adapter_config.json` and
`adapter_model.safetensors` in place of the model, and in `base_model/` the SFT model that it sits on.

A folder is written under another name beside its place and then renamed, so that it is whole or not there. It holds no
path and no name of the machine that it was made on. `exported_model` writes the model, `push` sends the folder.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.assets.model_card import BASE_LICENCES, DATA_LICENCES, BaseModel, export_card
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import label, status, unfinished
from helpsteer_assets.commands.exported_model import write_model
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, canonical_weight, is_hub_id
from helpsteer_assets.files.digests import is_intact, listing, sealed
from helpsteer_assets.files.durable import free_space, size_in_words, sync
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactName, versions
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_in_use

PROVENANCE = "provenance.json"

_MAKER = "helpsteer_assets"
_SCHEMA_VERSION = 1
_UPLOADER_FILES = (".cache", "huggingface")
"""Folder in which huggingface_hub keeps its notes of an upload."""


@dataclass(frozen=True)
class Export:
    """An exported folder."""

    folder: Path
    title: str
    """Its content in a few words."""
    files: dict[str, int]
    """Bytes by path relative to the folder."""
    reused: bool
    """Whether it was there already."""


def grid_weight(what: str | float, experiment: Experiment) -> str:
    """The weight that `w=0.4`, `0.40` or 0.4 means, as the experiment's grid spells it.

    Raises HelpsteerError for what is no weight, and for one that the experiment does not have.
    """
    grid = f"the grid of experiment {experiment.name} ({', '.join(experiment.objective.weights)})"
    try:
        weight = canonical_weight(what.removeprefix("w=") if isinstance(what, str) else what)
    except ValueError as error:
        raise HelpsteerError(f"{error}; choose of {grid}") from None
    if weight not in experiment.objective.weights:
        raise HelpsteerError(f"{weight} is not in {grid}; add it to objective.weights and run `helpsteer run`")
    return weight


def chosen_policy(what: str | float, experiment: Experiment) -> str | None:
    """The weight of a policy; None for `sft`, the SFT model. Raises HelpsteerError as `grid_weight` does."""
    return None if what == "sft" else grid_weight(what, experiment)


def policy_artifacts(w: str | None) -> list[tuple[str, str]]:
    """The assets and partitions that a policy consists of: the SFT model, and the adapter of a weight."""
    return [("sft_model", ALL)] + ([] if w is None else [("modpo_models", w)])


def require_finished(
    experiment: Experiment,
    home: Home,
    wanted: Sequence[tuple[str, str]],
    if_there: Sequence[tuple[str, str]] = (),
) -> list[ArtifactName]:
    """The artifacts of some assets and partitions, made with the present settings; others only if they are there.

    Raises HelpsteerError where a wanted one is missing, begun or out of date, with the command that makes it.
    """
    items = {(item.asset, item.partition): item for item in status(experiment, home)}
    lacking = unfinished(items.values())
    for asset, partition in wanted:
        if (asset, partition) in lacking:
            item = items[asset, partition]
            command = "helpsteer run" if partition == ALL else f"helpsteer run --weights {partition}"
            raise HelpsteerError(
                f"{label(asset, partition)} of experiment {experiment.name} is {item.state}"
                f"{f' ({item.detail})' if item.detail else ''} in the home {home}; `{command}` makes it with the "
                "present settings"
            )
    taken = [*wanted, *(name for name in if_there if name not in lacking)]
    return [(asset, partition, items[asset, partition].fingerprint) for asset, partition in taken]


@contextmanager
def held(home: Home, names: Sequence[ArtifactName], doing: str) -> Iterator[list[Artifact]]:
    """Finished artifacts, verified by their digests, which nobody removes during the block.

    Raises HelpsteerError where one is damaged. Works in a home that cannot be written to.
    """
    with home_in_use(home.path, doing):
        artifacts = []
        for asset, partition, fingerprint in names:
            artifact = home.store.get(asset, partition, fingerprint)
            if artifact is None:
                raise HelpsteerError(
                    f"{label(asset, partition)} was damaged, and is set aside or being made again; `helpsteer run` "
                    "computes it again"
                )
            artifacts.append(artifact)
        yield artifacts


def export_policy(
    experiment: Experiment,
    home: Home,
    what: str | float,
    to: Path,
    *,
    merged: bool = True,
    force: bool = False,
    announce: Callable[[str], None] = print,
) -> Export:
    """Write a policy (`w=0.4`, or `sft`) to a folder that other software reads; the module's docstring has the layout.

    The folder must not exist, or be empty; `force` replaces an earlier export in it. One that holds this very export is
    left as it is. `announce` gets lines about the progress.

    Raises HelpsteerError where there is no such policy, it is not finished with the present settings or is damaged, or
    the folder cannot be written to, holds something else, or has no room.
    """
    w = chosen_policy(what, experiment)
    if w is None and not merged:
        raise HelpsteerError("the SFT model is one whole model and has no adapter; leave out --adapter")
    target = to.absolute().resolve()
    if target.is_relative_to(home.path.resolve()):
        raise HelpsteerError(
            f"--to: {to} lies in the home {home}, which holds the pipeline's own files; choose another"
        )
    # A policy can be taken away before all are scored.
    names = require_finished(experiment, home, policy_artifacts(w), if_there=[("score_summary", ALL)])
    identity: dict[str, Any] = {
        "policy": "sft" if w is None else f"w={w}",
        "form": "model" if merged else "adapter",
        "artifacts": {asset: fingerprint for asset, _, fingerprint in names},
        "generation": experiment.generation.model_dump(mode="json"),
        "versions": {package: versions()[package] for package in ("transformers", "peft", "helpsteer_assets")},
    }
    title = f"{'SFT model' if w is None else f'w={w}'} of experiment {experiment.name}"
    title += "" if merged else ", as an adapter"
    with _writing(target):
        earlier = _earlier_export(target)
        unchanged = earlier is not None and _listing(target) == earlier["files"]
    if earlier is not None:
        if earlier["export"] == identity and unchanged:
            return Export(target, title, _sizes(target, earlier), reused=True)
        if not force:
            was = f"{earlier['export']['policy']} ({earlier['export']['form']})"
            raise HelpsteerError(f"{to} holds another export, of {was}; --force replaces it, or choose another folder")
    with held(home, names, f"export of {title}") as artifacts:
        by_asset = {artifact.asset: artifact for artifact in artifacts}
        _require_room(target, by_asset)
        with _writing(target), _beside(target) as folder:
            announce(f"exporting {title}")
            prompt_template = write_model(experiment, by_asset, folder, merged, announce)
            base, summary = base_model(experiment), by_asset.get("score_summary")
            scores = [] if summary is None else summary.table("score_summary.parquet").to_pylist()
            card = export_card(
                experiment,
                base,
                w=w,
                merged=merged,
                scores=[row for row in scores if row["w"] == w],
                fingerprint=by_asset["sft_model" if w is None else "modpo_models"].fingerprint,
                prompt_template=prompt_template,
                transformers_version=identity["versions"]["transformers"],
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            provenance = _provenance(experiment, home, base, by_asset, identity)
            announce("computing digests")
            provenance["files"] = _listing(folder)
            (folder / PROVENANCE).write_text(json.dumps(sealed(provenance), indent=2) + "\n", encoding="utf-8")
            _settle(folder)
            _replace(target, folder, earlier)
    return Export(target, title, _sizes(target, provenance), reused=False)


def take_report(experiment: Experiment, home: Home, to: Path | None = None) -> Path:
    """The report of the trade-off: its file in the home, or a copy of it in the file `to`, which is replaced.

    Raises HelpsteerError where it is not finished with the present settings, is damaged, or cannot be copied.
    """
    names = require_finished(experiment, home, [("tradeoff_report", ALL)])
    with held(home, names, f"copying the report of experiment {experiment.name}") as (artifact,):
        source = artifact.file("report.html")
        if to is None:
            return source
        if to.is_dir():
            raise HelpsteerError(f"--to: {to} is a folder; name a file in it, such as {to / 'report.html'}")
        with _writing(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            copy = to.with_name(f".{to.name}.{os.getpid()}")
            try:
                shutil.copyfile(source, copy)
                copy.replace(to)
            finally:
                copy.unlink(missing_ok=True)
    return to.absolute()


# The folder


def _earlier_export(target: Path) -> dict[str, Any] | None:
    """The provenance of the export that lies in a folder; None where there is no folder, or an empty one.

    Raises HelpsteerError where something else lies there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not target.is_dir():
        raise HelpsteerError(f"--to: {target} is a file; name a folder that is empty or not there")
    try:
        earlier = json.loads((target / PROVENANCE).read_bytes())
        is_export = is_intact(earlier) and earlier["made_by"] == _MAKER
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_export = False
    if not is_export:
        raise HelpsteerError(f"--to: {target} is not empty and holds no whole export; choose another folder")
    if others := sorted(set(_names(target)) - {PROVENANCE, *earlier["files"]}):
        raise HelpsteerError(
            f"--to: {target} holds an export and {len(others)} file(s) that are not part of it (the first: "
            f"{others[0]}); move them away, or choose another folder"
        )
    return earlier


def _names(folder: Path) -> list[str]:
    """Files by path relative to the folder, but for the uploader's notes."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink())
    return [path.as_posix() for path in paths if path.parts[:2] != _UPLOADER_FILES]


def _listing(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of every file but the provenance, which holds them."""
    return listing(folder, [name for name in _names(folder) if name != PROVENANCE])


def _sizes(folder: Path, provenance: dict[str, Any]) -> dict[str, int]:
    sizes = {name: entry["bytes"] for name, entry in provenance["files"].items()}
    return sizes | {PROVENANCE: (folder / PROVENANCE).stat().st_size}


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns errors of the file system and of safetensors inside the block into a HelpsteerError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HelpsteerError(f"cannot write {target}: {reason}; make room, or choose another folder by --to") from error


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder beside the target, removed afterwards unless it was renamed, as are those of dead processes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{target.name}.{socket.gethostname()}."
    for leftover in target.parent.iterdir():
        process = leftover.name.removeprefix(mine).partition(".")[0]
        if leftover.name.startswith(mine) and not Path("/proc", process).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    folder = target.with_name(f"{mine}{os.getpid()}.new")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give files the user's usual permissions (safetensors writes them for one user only), and sync all to the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for root, _, names in os.walk(folder):
        for name in names:
            Path(root, name).chmod(0o666 & ~mask)
            sync(Path(root, name))
        sync(Path(root))


def _replace(target: Path, folder: Path, earlier: dict[str, Any] | None) -> None:
    """Put the new folder in the place of the target, which is not there, empty, or an earlier export."""
    if earlier is None:
        folder.rename(target)
    else:
        old = folder.with_suffix(".old")
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _require_room(target: Path, artifacts: dict[str, Artifact]) -> None:
    files = [file for artifact in artifacts.values() for file in artifact.manifest["files"].items()]
    need = sum(entry["bytes"] for name, entry in files if name.startswith(("model/", "adapter/")))
    where, free = free_space(target)
    if need > free:
        raise HelpsteerError(
            f"about {size_in_words(need)} will be written and {where} has {size_in_words(free)} free; free some, or "
            "choose a folder on a larger disk by --to"
        )


# The card and the provenance


def base_model(experiment: Experiment) -> BaseModel:
    """The base model's id on the hub and its licence; those of a local one are read from the README.md beside it."""
    from huggingface_hub import metadata_load

    source = experiment.model.base
    if is_hub_id(source) or source in BASE_LICENCES:
        return BaseModel(source if is_hub_id(source) else None, BASE_LICENCES.get(source))
    card: dict[str, Any] = {}
    with suppress(Exception):  # a card that somebody wrote can make the YAML reader raise anything
        card = metadata_load(local_path("model.base", source) / "README.md") or {}
    texts = {key: value for key, value in card.items() if isinstance(value, str)}
    return BaseModel(texts.get("base_model"), texts.get("license"))


def _provenance(
    experiment: Experiment, home: Home, base: BaseModel, artifacts: dict[str, Artifact], identity: dict[str, Any]
) -> dict[str, Any]:
    """The artifacts, data and versions that the export was made from. A local source is known by the digest of its
    content in the settings; its path stands nowhere."""
    data = experiment.data
    made_from: dict[str, dict[str, Any]] = {}
    waiting = [(a.asset, a.partition, a.fingerprint) for a in artifacts.values() if a.asset != "score_summary"]
    for asset, partition, fingerprint in waiting:  # it grows by what each was made from
        name, artifact = label(asset, partition), home.store.find(asset, partition, fingerprint)
        if artifact is None:
            made_from.setdefault(name, {"fingerprint": fingerprint, "note": "gone from the home"})
        elif name not in made_from:
            keys = ("version", "settings", "inputs", "seed", "versions", "git_revision", "created_at")
            made_from[name] = {"fingerprint": fingerprint} | {key: artifact.manifest.get(key) for key in keys}
            for above, partitions in artifact.manifest.get("inputs", {}).items():
                waiting += [(above, part, value) for part, value in partitions.items()]
    return {
        "schema_version": _SCHEMA_VERSION,
        "made_by": _MAKER,
        "experiment": experiment.name,
        "data": {
            "source": data.source if data.revision or data.source == "embedded" else "local",
            "revision": data.revision,
            "licence": DATA_LICENCES.get(data.source),
        },
        "base_model": {"id": base.id, "revision": experiment.model.revision, "licence": base.licence},
        "versions": versions(),
        "export": identity,
        "artifacts": made_from,
    }

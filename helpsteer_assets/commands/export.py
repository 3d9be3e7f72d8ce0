"""Taking a policy away: a folder that transformers, PEFT, vLLM and the hub read without this package.

As one model (a policy merged with the SFT model, or the SFT model itself):

    <folder>/config.json, model.safetensors               the model, in the experiment's precision
             tokenizer.json, chat_template.jinja, ...     its tokenizer
             generation_config.json                       the experiment's generation settings
             README.md                                    the model card
             provenance.json                              what it was made from, and the digest of every other file

As an adapter, for those who serve several weights over one SFT model:

    <folder>/adapter_config.json, adapter_model.safetensors     the LoRA; the rest as above
             base_model/                                        the SFT model that it sits on, a whole model

A folder is written beside its place and renamed, so that it is whole or not there. It holds no path and no name of the
machine that it was made on.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import Status, label, status
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, canonical_weight, is_hub_id
from helpsteer_assets.files.digests import file_sha256, is_intact, sealed
from helpsteer_assets.files.durable import free_space, size_in_words, sync
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactName, ArtifactStore, versions
from helpsteer_assets.store.locks import home_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer_assets.assets.model_card import BaseModel

PROVENANCE = "provenance.json"
BASE_FOLDER = "base_model"
"""Where an adapter's SFT model lies in an exported folder."""

_MAKER = "helpsteer_assets"
_SCHEMA_VERSION = 1
_UPLOADER_FILES = (".cache", "huggingface")
"""Folder in which huggingface_hub keeps notes of an upload."""


@dataclass(frozen=True)
class Export:
    """An exported folder."""

    folder: Path
    title: str
    """What it holds, in a few words."""
    files: dict[str, int]
    """Bytes by path relative to the folder."""
    reused: bool
    """Whether it was there already."""


def chosen_policy(what: str | float, experiment: Experiment) -> str | None:
    """The weight that `w=0.4`, `0.4` or 0.4 means, as the grid spells it; None for `sft`.

    Raises HelpsteerError for what is neither, and for a weight that the experiment does not have.
    """
    if what == "sft":
        return None
    there = ", ".join(["sft", *(f"w={weight}" for weight in experiment.objective.weights)])
    try:
        weight = canonical_weight(what.removeprefix("w=") if isinstance(what, str) else what)
    except ValueError:
        hint = (
            "; the margin adapter is a reward model, meaningful only beside its SFT model: `helpsteer status --json` "
            "names its folder"
            if what == "margin_adapter"
            else ""
        )
        raise HelpsteerError(f"{what} is no policy of experiment {experiment.name}; there are {there}{hint}") from None
    if weight not in experiment.objective.weights:
        raise HelpsteerError(
            f"w={weight} is not in the grid of experiment {experiment.name} (there are {there}); add it to "
            "objective.weights and run `helpsteer run`"
        )
    return weight


def policy_artifacts(w: str | None) -> list[tuple[str, str]]:
    """The assets and partitions that a policy consists of: the SFT model, and the adapter of a weight."""
    return [("sft_model", ALL)] + ([] if w is None else [("modpo_models", w)])


def require_finished(
    experiment: Experiment,
    home: Path,
    wanted: Sequence[tuple[str, str]],
    if_there: Sequence[tuple[str, str]] = (),
) -> list[ArtifactName]:
    """The artifacts of some assets and partitions, made with the present settings; others only if they are there.

    Raises HelpsteerError where a wanted one is missing, begun or out of date, with the command that makes it.
    """
    found = {(item.asset, item.partition): item for item in status(experiment, home)}
    finished = {name: item.state in ("complete", "reusable") for name, item in found.items()}
    for name in wanted:
        if not finished[name]:
            raise HelpsteerError(_not_finished(found[name], experiment, home))
    taken = [*wanted, *(name for name in if_there if finished[name])]
    return [(asset, partition, found[asset, partition].fingerprint) for asset, partition in taken]


def _not_finished(item: Status, experiment: Experiment, home: Path) -> str:
    command = "`helpsteer run`" if item.partition == ALL else f"`helpsteer run --weights {item.partition}`"
    where = f"{label(item.asset, item.partition)} of experiment {experiment.name}"
    if item.state == "partial":
        return f"{where} is not finished ({item.detail}); {command} goes on with it"
    if item.state == "out of date":
        return (
            f"{where} is out of date ({item.detail}); {command} makes it with the present settings. To take the "
            "earlier one, set the experiment back to what it was"
        )
    return f"{where} is not there, in the home {home}; {command} makes it"


@contextmanager
def held(home: Path, names: Sequence[ArtifactName], doing: str) -> Iterator[list[Artifact]]:
    """Finished artifacts, verified by their digests, which nobody removes during the block.

    Raises HelpsteerError where one is damaged. Works in a home that cannot be written to.
    """
    with home_in_use(home, doing):
        store = ArtifactStore(home)
        artifacts = []
        for asset, partition, fingerprint in names:
            artifact = store.get(asset, partition, fingerprint)
            if artifact is None:
                raise HelpsteerError(
                    f"{label(asset, partition)} was damaged, and is set aside or being made again; `helpsteer run` "
                    "computes it again"
                )
            artifacts.append(artifact)
        yield artifacts


def export_policy(
    experiment: Experiment,
    home: Path,
    what: str | float,
    to: Path,
    *,
    merged: bool = True,
    force: bool = False,
    announce: Callable[[str], None] = print,
) -> Export:
    """Write a policy to a folder that other software reads; the module's docstring has the layout.

    Args:
        experiment: whose policy; its generation settings go with it.
        home: where results are kept.
        what: `w=0.4`, or `sft`.
        to: the folder; it must not exist, or be empty. One that holds this very export already is left as it is.
        merged: one whole model; else the adapter with the SFT model beside it.
        force: replace an earlier export that lies in the folder.
        announce: gets lines about the progress.

    Raises:
        HelpsteerError: there is no such policy, it is not finished with the present settings or is damaged, or the
            folder cannot be written to, holds something else, or has no room.
    """
    w = chosen_policy(what, experiment)
    if w is None and not merged:
        raise HelpsteerError("the SFT model is one whole model and has no adapter; leave out --adapter")
    target = to.absolute().resolve()
    if target.is_relative_to(home.resolve()):
        raise HelpsteerError(
            f"--to: {to} lies in the home {home}, which holds the pipeline's own files; choose another"
        )
    # A policy can be taken away before all are scored.
    names = require_finished(experiment, home, policy_artifacts(w), if_there=[("score_summary", ALL)])
    identity = {
        "policy": "sft" if w is None else f"w={w}",
        "form": "model" if merged else "adapter",
        "artifacts": {asset: fingerprint for asset, _, fingerprint in names},
        "generation": experiment.generation.model_dump(mode="json"),
        "versions": {package: versions()[package] for package in ("transformers", "peft", "helpsteer_assets")},
    }
    title = f"{'SFT model' if w is None else f'w={w}'} of experiment {experiment.name}"
    title += "" if merged else ", as an adapter"
    earlier = _earlier_export(target)
    if earlier is not None:
        if earlier["export"] == identity and not _changed_files(target, earlier):
            return Export(target, title, _sizes(target, earlier), reused=True)
        if not force:
            was = f"{earlier['export']['policy']} ({earlier['export']['form']})"
            raise HelpsteerError(f"{to} holds another export, of {was}; --force replaces it, or choose another folder")
    with held(home, names, f"export of {title}") as artifacts:
        by_asset = {artifact.asset: artifact for artifact in artifacts}
        _require_room(target, by_asset)
        with _writing(target), _beside(target) as folder:
            announce(f"exporting {title}")
            prompt_template = _write_model(experiment, by_asset, folder, merged, announce)
            base = base_model(experiment)
            provenance = _provenance(experiment, home, base, by_asset, identity)
            _write_card(experiment, base, w, merged, by_asset, prompt_template, folder)
            announce("computing digests")
            provenance["files"] = _listing(folder)
            _write_json(folder / PROVENANCE, sealed(provenance))
            _settle(folder)
            _replace(target, folder, earlier)
    return Export(target, title, _sizes(target, provenance), reused=False)


def take_report(experiment: Experiment, home: Path, to: Path | None = None) -> Path:
    """The report of the trade-off: its file in the home, or a copy of it.

    Args:
        experiment: whose report.
        home: where results are kept.
        to: the file that it is copied to, replaced if it is there; None: it is not copied.

    Raises:
        HelpsteerError: it is not finished with the present settings, is damaged, or cannot be copied.
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
    with _writing(target):
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
    others = [name for name in _names(target) if name not in earlier["files"] and name != PROVENANCE]
    if others:
        raise HelpsteerError(
            f"--to: {target} holds an export and {len(others)} file(s) that are not part of it (the first: "
            f"{others[0]}); move them away, or choose another folder"
        )
    return earlier


def _names(folder: Path) -> list[str]:
    """Files by path relative to the folder, but for the uploader's notes."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink())
    return [path.as_posix() for path in paths if path.parts[:2] != _UPLOADER_FILES]


def _changed_files(folder: Path, provenance: dict[str, Any]) -> bool:
    try:
        return _listing(folder) != provenance["files"]
    except OSError:
        return True


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file but the provenance, which holds them."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in _names(folder)
        if name != PROVENANCE
    }


def _sizes(folder: Path, provenance: dict[str, Any]) -> dict[str, int]:
    return {name: entry["bytes"] for name, entry in provenance["files"].items()} | {
        PROVENANCE: (folder / PROVENANCE).stat().st_size
    }


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what a file system or safetensors refuses inside the block into a HelpsteerError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HelpsteerError(f"cannot write {target}: {reason}; make room, or choose another folder by --to") from error


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder beside the target, gone afterwards unless it was renamed; also removes those of dead processes."""
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
    """Files that whoever may read the folder may read, and all of it on disk: safetensors writes files for one user."""
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
    files = (
        entry["bytes"]
        for asset in ("sft_model", "modpo_models")
        if asset in artifacts
        for name, entry in artifacts[asset].manifest["files"].items()
        if name.startswith(("model/", "adapter/"))
    )
    need = sum(files)
    where, free = free_space(target)
    if need > free:
        raise HelpsteerError(
            f"about {size_in_words(need)} will be written and {where} has {size_in_words(free)} free; free some, or "
            "choose a folder on a larger disk by --to"
        )


# What lies in it


def _write_model(
    experiment: Experiment,
    artifacts: dict[str, Artifact],
    folder: Path,
    merged: bool,
    announce: Callable[[str], None],
) -> str | None:
    """Weights, tokenizer and generation settings. Returns the template of prompts, None where the tokenizer has it."""
    from helpsteer_assets.modpo.models.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_model, load_tokenizer

    sft, policy = artifacts["sft_model"], artifacts.get("modpo_models")
    settings = experiment.model
    tokenizer = load_tokenizer(sft.path / "model", trust_remote_code=settings.trust_remote_code)
    prompt_template = give_chat_template(tokenizer)
    size = size_in_words(sum(entry["bytes"] for entry in sft.manifest["files"].values()))
    if policy is not None and merged:
        announce(f"loading the SFT model ({size}) and merging the adapter into it")
        model = load_model(
            sft.path / "model", precision=settings.precision, trust_remote_code=settings.trust_remote_code
        )
        model = merge_exactly(model, policy.path / "adapter")
        announce("writing the merged model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _finish_model(experiment, tokenizer, folder)
        return prompt_template
    announce(f"copying the SFT model ({size})")
    base = folder if policy is None else folder / BASE_FOLDER
    shutil.copytree(sft.path / "model", base, copy_function=shutil.copyfile, dirs_exist_ok=True)
    tokenizer.save_pretrained(base)
    _finish_model(experiment, tokenizer, base)
    if policy is not None:
        shutil.copyfile(policy.path / "adapter" / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        config = json.loads((policy.path / "adapter" / ADAPTER_CONFIG).read_bytes())
        # A path, and no id: what looks for it from elsewhere fails, where an id could be somebody's model.
        _write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": f"./{BASE_FOLDER}"})
        tokenizer.save_pretrained(folder)
        _generation_config(experiment, tokenizer).save_pretrained(folder)
    return prompt_template


def merge_exactly(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """The model with an adapter merged into its weights: added in fp32, and rounded once to the model's precision."""
    import torch
    from peft.tuners.lora import LoraLayer

    from helpsteer_assets.modpo.models.loading import load_adapters

    peft_model = load_adapters(model, {"policy": adapter})
    with torch.no_grad():
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(weight.float() + module.get_delta_weight("policy").float())
    return peft_model.unload()


def _finish_model(experiment: Experiment, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Beside a saved model: how it answers, and that it may keep keys and values, which training switched off."""
    _generation_config(experiment, tokenizer).save_pretrained(folder)
    config = folder / "config.json"
    _write_json(config, json.loads(config.read_bytes()) | {"use_cache": True})


def _generation_config(experiment: Experiment, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The experiment's generation settings as transformers reads them."""
    from transformers import GenerationConfig

    settings = experiment.generation
    # Without top_k: 0, some versions sample from the fifty likeliest tokens.
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.do_sample else {}
    return GenerationConfig(
        do_sample=settings.do_sample,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def give_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Make the tokenizer's chat template render prompts as in training. Returns the plain template where none can.

    A tokenizer that has one is left as it is. Else the template of training becomes it, unless the tokenizer makes
    other tokens of a text behind a written-out begin-of-text token than of one to which it adds that token itself.
    """
    from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE, encode_prompt

    if tokenizer.chat_template:
        return None
    trial = "Why is the sky blue?"
    expected = encode_prompt(tokenizer, trial, 1000)[0].tolist()
    before, after = (json.dumps(part) for part in FALLBACK_TEMPLATE.split("{prompt}"))
    begin = "{{ bos_token }}" if expected[0] == tokenizer.bos_token_id else ""
    tokenizer.chat_template = (
        f"{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {after} + message['content'] + eos_token }}}}"
        f"{{% else %}}{{{{ {before} + message['content'] }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {after} }}}}{{% endif %}}"
    )
    messages = [{"role": "user", "content": trial}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if rendered == expected:
        return None
    tokenizer.chat_template = None
    return FALLBACK_TEMPLATE


def base_model(experiment: Experiment) -> "BaseModel":
    """What the base model is called on the hub, and its licence: from the card beside a local one, if it says so."""
    from huggingface_hub import metadata_load

    from helpsteer_assets.assets.model_card import BASE_LICENCES, BaseModel

    source = experiment.model.base
    if is_hub_id(source) or source in BASE_LICENCES:
        return BaseModel(source if is_hub_id(source) else None, BASE_LICENCES.get(source))
    card: dict[str, Any] | None = None
    with suppress(Exception):  # whatever a card that somebody wrote makes the YAML reader raise
        card = metadata_load(local_path("model.base", source) / "README.md")
    said = {key: value for key, value in (card or {}).items() if isinstance(value, str)}
    return BaseModel(said.get("base_model"), said.get("license"))


def _write_card(
    experiment: Experiment,
    base: "BaseModel",
    w: str | None,
    merged: bool,
    artifacts: dict[str, Artifact],
    prompt_template: str | None,
    folder: Path,
) -> None:
    from helpsteer_assets.assets.model_card import export_card

    policy = artifacts.get("modpo_models", artifacts["sft_model"])
    transformers_version = versions()["transformers"]
    assert transformers_version is not None  # it has just written the files
    card = export_card(
        experiment,
        base,
        w=w,
        merged=merged,
        scores=_scores(artifacts.get("score_summary"), w),
        fingerprint=policy.fingerprint,
        prompt_template=prompt_template,
        transformers_version=transformers_version,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _scores(summary: Artifact | None, w: str | None) -> list[dict[str, Any]]:
    """A policy's rows of score_summary."""
    if summary is None:
        return []
    import pyarrow.parquet as pq

    rows = pq.read_table(summary.file("score_summary.parquet")).to_pylist()
    return [row for row in rows if row["w"] == w]


def _provenance(
    experiment: Experiment, home: Path, base: "BaseModel", artifacts: dict[str, Artifact], identity: dict[str, Any]
) -> dict[str, Any]:
    """What the export was made from. Local sources stand in the settings by the digest of their content, and nowhere by
    their path."""
    from helpsteer_assets.assets.model_card import DATA_LICENCES

    data = experiment.data
    made_from: dict[str, dict[str, Any]] = {}
    store = ArtifactStore(home)

    def describe(asset: str, partition: str, fingerprint: str) -> None:
        name = label(asset, partition)
        artifact = store.find(asset, partition, fingerprint)
        if artifact is None:
            made_from.setdefault(name, {"fingerprint": fingerprint, "note": "gone from the home"})
            return
        told = ("version", "settings", "inputs", "seed", "versions", "git_revision", "created_at")
        made_from[name] = {"fingerprint": fingerprint} | {key: artifact.manifest.get(key) for key in told}
        for above, partitions in artifact.manifest.get("inputs", {}).items():
            for part, value in partitions.items():
                if label(above, part) not in made_from:
                    describe(above, part, value)

    for artifact in artifacts.values():
        if artifact.asset != "score_summary":
            describe(artifact.asset, artifact.partition, artifact.fingerprint)
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# The hub


def check_repository(repo: str, *, public: bool) -> None:
    """Ask the hub whether an export may be sent to a repository, before any work is done. Changes nothing there.

    Raises:
        HelpsteerError: nobody is logged in, the hub cannot be reached or refuses, or the repository is there and holds
            something else than an export, or is public where a private one is meant.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with _readable_hub_errors(repo):
        api.whoami()
        try:
            found = api.repo_info(repo)
        except errors.RepositoryNotFoundError:
            return
    there = {file.rfilename for file in found.siblings or []} - {".gitattributes", "README.md"}
    if there and PROVENANCE not in there:
        raise HelpsteerError(
            f"--push: {repo} holds something that is no export (the first file: {min(there)}); choose another"
        )
    if not found.private and not public:
        raise HelpsteerError(f"--push: {repo} is public; add --public if that is meant, or choose another")


def push(export: Export, repo: str, *, public: bool) -> str:
    """Send an exported folder to a model repository of the hub, made (private unless `public`) where it is not there.

    All that is in the repository is replaced: call `check_repository` first. Returns the repository's URL. Honours
    HF_TOKEN, HF_HOME and HF_ENDPOINT.

    Raises:
        HelpsteerError: nobody is logged in, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _readable_hub_errors(repo):
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=export.folder,
            commit_message=f"{export.title}, by helpsteer_assets",
            # What an earlier export left would be taken for a part of this one.
            delete_patterns="*",
        )
    return str(url)


def repository(repo: str) -> str:
    """Where a repository of this id is on the hub. Asks nobody; raises HelpsteerError for what is no id."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise HelpsteerError(f"--push: {repo!r} is no id of a repository, such as owner/name: {error}") from error
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _readable_hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except HelpsteerError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise HelpsteerError("--push: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN") from error
    except errors.OfflineModeIsEnabled as error:
        raise HelpsteerError("--push: HF_HUB_OFFLINE forbids it; unset HF_HUB_OFFLINE") from error
    except errors.HfHubHTTPError as error:
        said = " ".join(str(error.server_message or error).split())
        remedy = "try again later"
        if error.response is not None and error.response.status_code in (401, 403):
            remedy = "log in by `hf auth login`, or set HF_TOKEN, with a token that may write there"
        raise HelpsteerError(f"--push: {constants.ENDPOINT} refuses {repo}: {said}; {remedy}") from error
    except (errors.HTTPError, OSError, RuntimeError) as error:  # the network, the proxy, an uploader's thread
        raise HelpsteerError(
            f"--push: {repo} could not be sent to {constants.ENDPOINT} ({type(error).__name__}: {error}); check the "
            "network, and push again: the exported folder stays as it is"
        ) from error

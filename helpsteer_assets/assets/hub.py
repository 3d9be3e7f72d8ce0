"""Data sets and models from the Hugging Face hub.

A download is one commit of one repository, kept in the hub's own cache (`HF_HOME`); a cached commit needs no network.
Pickles of a model are left out, because reading them runs code.
"""

from pathlib import Path
from typing import Literal

from helpsteer_assets.errors import HelpsteerError

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]


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

    key = "`data.source`" if kind == "dataset" else "`model.base` (or `evaluation.rater.model`)"
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
    except errors.HFValidationError as error:
        raise HelpsteerError(
            f"{key}: {repo_id!r} is no id on the hub ({error}). An id reads `owner/name`; a path starts with `.`, `/` "
            "or `~`"
        ) from error
    except (errors.HTTPError, OSError) as error:  # what the server, the proxy or the disk said
        what = f"{'data set' if kind == 'dataset' else 'model'} {repo_id} at revision {revision}"
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        reason = f"could not be downloaded: {error}\nIf it says 401 or 403, {_LOG_IN}; else try again"
        if isinstance(error, errors.GatedRepoError):
            reason = f"is gated: accept its licence on {page}, then {_LOG_IN} of that account"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"does not exist on the hub, or is private: check the name, or {_LOG_IN} of an account with access"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"was not found: the repository has no such commit. Take a commit hash from {page}/commits/main"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = (
                f"is not in the hub cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached "
                f"({error.__cause__ or error}): check the network, unset HF_HUB_OFFLINE, or point HF_HOME at a cache "
                "that holds it"
            )
        raise HelpsteerError(f"the {what} {reason}, or give the path of a local folder as {key}") from error

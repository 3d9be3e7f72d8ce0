"""Sends an exported folder to a repository of the hub."""

from collections.abc import Iterator
from contextlib import contextmanager

from helpsteer_assets.commands.export import PROVENANCE, Export
from helpsteer_assets.errors import HelpsteerError


def check_repository(repo: str, *, public: bool) -> None:
    """Ask the hub whether an export may be sent to a repository, before any work is done. Changes nothing there.

    Raises HelpsteerError where nobody is logged in, the hub cannot be reached or refuses, or the repository is there
    and holds something else than an export, or is public where a private one is meant.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with _readable_hub_errors(repo):
        api.whoami()
        try:
            info = api.repo_info(repo)
        except errors.RepositoryNotFoundError:
            return
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
    if files and PROVENANCE not in files:
        raise HelpsteerError(
            f"--push: {repo} holds something that is no export (the first file: {min(files)}); choose another"
        )
    if not info.private and not public:
        raise HelpsteerError(f"--push: {repo} is public; add --public if that is meant, or choose another")


def push(export: Export, repo: str, *, public: bool) -> str:
    """Send an exported folder to a model repository of the hub, made (private unless `public`) where it is not there.

    All that is in the repository is replaced: call `check_repository` first. Returns the repository's URL. Honours
    HF_TOKEN, HF_HOME and HF_ENDPOINT. Raises HelpsteerError as `check_repository` does.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _readable_hub_errors(repo):
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=export.folder,
            commit_message=f"{export.title}, by helpsteer_assets",
            # Files of an earlier export would be taken for a part of this one.
            delete_patterns="*",
        )
    return str(url)


def repository(repo: str) -> str:
    """The URL of a repository on the hub, without asking the hub. Raises HelpsteerError where `repo` is no id."""
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

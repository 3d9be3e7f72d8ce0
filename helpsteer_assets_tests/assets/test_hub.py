"""Fetching a data set or model from the hub: its cache, and what is said where the hub refuses."""

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from helpsteer_assets.assets.hub import download
from helpsteer_assets.errors import HelpsteerError

REVISION = "3ca5d59c1bc1080af195b4254e7407db60b6f450"


class TestDownload:
    """The hub's client reads its settings when it is imported, so what it does offline is seen in a new process."""

    def download_offline(self, home: Path, *arguments: object) -> str:
        script = (
            "import sys\nfrom helpsteer_assets.assets.hub import download\n"
            "from helpsteer_assets.errors import HelpsteerError\n"
            f"try: print(download{arguments!r})\n"
            "except HelpsteerError as error: print('HelpsteerError:', error)\n"
            "assert 'torch' not in sys.modules"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def test_offline_and_not_cached(self, tmp_path: Path) -> None:
        said = self.download_offline(tmp_path, "nvidia/HelpSteer", REVISION, "dataset")
        assert said.startswith(
            f"HelpsteerError: the data set nvidia/HelpSteer at revision {REVISION} is not in the hub cache"
        )
        assert str(tmp_path / "hub") in said
        assert "unset HF_HUB_OFFLINE" in said
        assert "a local folder as `data.source`" in said

    @pytest.mark.parametrize(("kind", "folder"), [("model", "models--x--y"), ("dataset", "datasets--x--y")])
    def test_a_cached_revision_is_found_offline(self, tmp_path: Path, kind: str, folder: str) -> None:
        snapshot = tmp_path / "hub" / folder / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "hub" / folder / "refs").mkdir()
        (tmp_path / "hub" / folder / "refs" / "main").write_text(REVISION)
        assert self.download_offline(tmp_path, "x/y", REVISION, kind) == str(snapshot)
        assert self.download_offline(tmp_path, "x/y", REVISION, kind, ["*.json"]) == str(snapshot)
        assert "is not in the hub cache" in self.download_offline(tmp_path, "x/y", "0" * 40, kind)

    def test_what_is_no_id(self, tmp_path: Path) -> None:
        said = self.download_offline(tmp_path, "one/two/three", REVISION, "model")
        assert "'one/two/three' is no id on the hub" in said
        assert "`model.base`" in said
        assert "An id reads `owner/name`; a path starts with `.`, `/` or `~`" in said

    @staticmethod
    def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
        class Response:
            headers = MappingProxyType({})
            request = None
            status_code = status

        return kind(f"{status} from the server", response=Response())  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("error", "kind", "said"),
        [
            (
                http(errors.GatedRepoError, 403),
                "model",
                [
                    "is gated: accept its licence on https://huggingface.co/owner/name, then log in with "
                    "`hf auth login` or set HF_TOKEN",
                    "or give the path of a local folder as `model.base`",
                ],
            ),
            (
                http(errors.RepositoryNotFoundError, 401),
                "model",
                ["does not exist or is private", "`hf auth login`", "HF_TOKEN", "`model.base`"],
            ),
            (
                http(errors.RevisionNotFoundError, 404),
                "dataset",
                ["the revision is not", "https://huggingface.co/datasets/owner/name/commits/main", "`data.source`"],
            ),
            (
                http(errors.HfHubHTTPError, 503),
                "model",
                ["could not be downloaded: 503 from the server", "`hf auth login`", "`model.base`"],
            ),
            (OSError(28, "No space left on device"), "model", ["could not be downloaded", "No space left on device"]),
            (
                errors.LocalEntryNotFoundError("no network"),
                "dataset",
                ["https://huggingface.co cannot be reached (no network)", "check the network", "`data.source`"],
            ),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_what_the_hub_refuses(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: Any, said: list[str]
    ) -> None:
        def refuse(*arguments: object, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://huggingface.co")
        with pytest.raises(HelpsteerError) as caught:
            download("owner/name", REVISION, kind)
        what = "data set" if kind == "dataset" else "model"
        for part in (f"the {what} owner/name at revision {REVISION}", *said):
            assert part in str(caught.value)

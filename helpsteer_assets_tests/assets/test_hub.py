import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from helpsteer_assets.assets import hub
from helpsteer_assets.assets.hub import download, file_sha256
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.digests import content_digest

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
                http(errors.GatedRepoError, 403),
                "dataset",
                ["https://huggingface.co/datasets/owner/name", "`data.source`"],
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
            (http(errors.DisabledRepoError, 403), "dataset", ["was disabled on the hub", "`data.source`"]),
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


def old(path: Path, content: str) -> Path:
    """A file written a minute ago, and so of a settled modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    then = time.time_ns() - 60_000_000_000
    os.utime(path, ns=(then, then))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    old(tmp_path / "model/config.json", "{}")
    old(tmp_path / "model/weights/one.bin", "1")
    old(tmp_path / "model/weights/two.bin", "2")
    return tmp_path / "model"


class TestContentDigest:
    def test_it_is_that_of_an_equal_folder_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        for name, content in (("weights/two.bin", "2"), ("config.json", "{}"), ("weights/one.bin", "1")):
            old(tmp_path / "copy" / name, content)
        assert content_digest(tmp_path / "copy") == content_digest(folder)
        assert len(content_digest(folder)) == 64

    def test_content_names_additions_and_removals_change_it(self, folder: Path) -> None:
        digests = [content_digest(folder)]
        (folder / "weights/two.bin").write_text("3")
        digests.append(content_digest(folder))
        (folder / "weights/two.bin").rename(folder / "weights/three.bin")
        digests.append(content_digest(folder))
        (folder / "weights/three.bin").rename(folder / "three.bin")
        digests.append(content_digest(folder))
        (folder / "empty").touch()
        digests.append(content_digest(folder))
        (folder / "three.bin").unlink()
        digests.append(content_digest(folder))
        assert len(set(digests)) == len(digests)

    def test_a_single_file_is_known_by_content_and_name(self, folder: Path) -> None:
        one = content_digest(folder / "weights/one.bin")
        assert one != content_digest(folder / "weights/two.bin")
        (folder / "weights/one.bin").rename(folder / "one.bin")
        assert content_digest(folder / "one.bin") == one
        (folder / "one.bin").rename(folder / "uno.bin")
        assert content_digest(folder / "uno.bin") != one

    def test_hidden_files_and_folders_do_not_count(self, folder: Path) -> None:
        before = content_digest(folder)
        for name in (".git/HEAD", ".cache/huggingface/lock", "weights/.one.bin.swp"):
            old(folder / name, "hidden")
        assert content_digest(folder) == before

    def test_links_are_followed_and_a_circle_ends(self, folder: Path, tmp_path: Path) -> None:
        blob = old(tmp_path / "blobs/0123", "linked")
        (folder / "linked.bin").symlink_to(blob)
        (folder / "linked").symlink_to(blob.parent)
        before = content_digest(folder)
        (folder / "weights/up").symlink_to(folder)
        assert content_digest(folder) == before
        blob.write_text("changed")
        assert content_digest(folder) != before

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(HelpsteerError, match="nowhere does not exist"):
            content_digest(tmp_path / "nowhere")
        with pytest.raises(HelpsteerError, match="holds no files"):
            content_digest(tmp_path)


class TestDigestCache:
    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the files that were hashed."""
        names: list[str] = []

        def spy(path: Path) -> str:
            names.append(path.name)
            return file_sha256(path)

        monkeypatch.setattr(hub, "file_sha256", spy)
        return names

    def test_an_unchanged_file_is_not_read_again(self, folder: Path, tmp_path: Path, read: list[str]) -> None:
        cache = tmp_path / "state/digests.json"
        first = content_digest(folder, cache)
        assert read == ["config.json", "one.bin", "two.bin"]
        assert content_digest(folder, cache) == first == content_digest(folder)
        assert read[3:] == ["config.json", "one.bin", "two.bin"]  # those of the call without a cache
        assert json.loads(cache.read_text())[str(folder / "config.json")][0] == 2
        assert [path.name for path in cache.parent.iterdir()] == ["digests.json"]

    def test_a_change_of_time_or_size_is_seen(self, folder: Path, tmp_path: Path, read: list[str]) -> None:
        cache = tmp_path / "digests.json"
        digests = {content_digest(folder, cache)}
        old(folder / "config.json", "[]")
        digests.add(content_digest(folder, cache))
        time_ns = (folder / "config.json").stat().st_mtime_ns
        (folder / "config.json").write_text("[1]")
        os.utime(folder / "config.json", ns=(time_ns, time_ns))
        digests.add(content_digest(folder, cache))
        assert len(digests) == 3
        assert read[3:] == ["config.json", "config.json"]

    def test_a_file_written_just_now_is_not_trusted_yet(self, folder: Path, tmp_path: Path) -> None:
        cache = tmp_path / "digests.json"
        file = folder / "config.json"
        file.write_text("{1}")
        status = file.stat()
        before = content_digest(folder, cache)
        file.write_text("{2}")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert content_digest(folder, cache) != before

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"%s": 1}', '{"%s": [2, 3]}', '{"%s": [2, 3, null]}', "\udcff"]
    )
    def test_a_damaged_cache_is_as_none_and_mended(self, folder: Path, tmp_path: Path, content: str) -> None:
        cache = tmp_path / "digests.json"
        content = content.replace("%s", str(folder / "config.json"))
        cache.write_text(content, encoding="utf-8", errors="surrogateescape")
        assert content_digest(folder, cache) == content_digest(folder)
        assert len(json.loads(cache.read_text())) == 4  # three files, and its own digest

    def test_a_flipped_bit_in_the_cache_changes_no_digest(self, folder: Path, tmp_path: Path) -> None:
        cache = tmp_path / "digests.json"
        expected = content_digest(folder, cache)
        content = cache.read_text(encoding="utf-8")
        digest = json.loads(content)[str(folder / "config.json")][2]
        other = ("0" if digest[0] != "0" else "1") + digest[1:]
        cache.write_text(content.replace(digest, other), encoding="utf-8")
        assert content_digest(folder, cache) == expected

    def test_what_another_process_learnt_meanwhile_is_kept(self, folder: Path, tmp_path: Path, read: list[str]) -> None:
        cache = tmp_path / "digests.json"
        content_digest(folder / "weights", cache)
        content_digest(folder / "config.json", cache)
        content_digest(folder, cache)
        assert read == ["one.bin", "two.bin", "config.json"]

    def test_a_cache_that_cannot_be_written_is_done_without(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert content_digest(folder, tmp_path / "file/digests.json") == content_digest(folder)

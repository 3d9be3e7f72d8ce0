"""An export sent to a hub, which a small server stands for."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.commands.export import PROVENANCE
from helpsteer_assets_tests.commands.conftest import contents
from helpsteer_assets_tests.finished import Finished


class Hub(ThreadingHTTPServer):
    """As much of the hub as sending a folder needs; keeps repositories in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Requests(BaseHTTPRequestHandler):
    """Answers as the hub's API does."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, {"private": private, "files": {}})
            return self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})
        owner, _, rest = path.removeprefix("/api/models/").partition("/")
        short, _, rest = rest.partition("/")
        name = f"{owner}/{short}"
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if not rest or rest == "revision/main":
            siblings = [{"rfilename": file} for file in repository["files"]]
            return self.answer({"id": name, "private": repository["private"], "siblings": siblings, "sha": "0" * 40})
        if rest.startswith("tree/"):
            return self.answer(
                [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in repository["files"].items()]
            )
        if rest.startswith("preupload/"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        assert rest.startswith("commit/"), rest
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
        return self.answer(
            {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.endpoint}/{name}/commit/{'1' * 40}"}
        )

    do_GET = do_POST

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(finished_home: Finished, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helpsteer export w=0.1` in a process of its own, for the hub's client reads its settings when it is imported."""

    def run(endpoint: str, *arguments: str, token: str = "hf_right", **environment: str) -> Any:
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HELPSTEER_"))}
        variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HELPSTEER_HOME": str(finished_home.home), "HELPSTEER_EXPERIMENT": str(finished_home.file)}
        variables |= {"HF_TOKEN": token} | environment
        program = [sys.executable, "-c", "from helpsteer_assets.cli import main; main()", "export"]
        command = [*program, *arguments, "--to", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, env=variables)

    return run


def test_push_shows_what_it_would_send_and_sends_it_only_with_yes(command: Any, hub: Hub, tmp_path: Path) -> None:
    def pushed(*arguments: str) -> str:
        done = command(hub.endpoint, *arguments, "--push", "me/mine")
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = pushed("w=0.1")
    assert f"would send to {hub.endpoint}/me/mine, private:" in shown
    assert "model.safetensors" in shown and "2.2 MB" in shown
    assert shown.splitlines()[-1] == "nothing was sent; the same command with --yes sends it"
    assert hub.asked == [] and (tmp_path / "out" / PROVENANCE).exists()
    assert f"sent: {hub.endpoint}/me/mine" in pushed("w=0.1", "--yes")
    repository = hub.repositories["me/mine"]
    assert repository["private"] and repository["files"] == contents(tmp_path / "out")
    pushed("w=0.9", "--adapter", "--force", "--yes")
    assert repository["files"] == contents(tmp_path / "out"), "files of the earlier export would be loaded"


@pytest.mark.parametrize(
    ("private", "files", "message"),
    [(True, {"weights.bin": b""}, "holds something that is no export"), (False, {}, "me/mine is public; add --public")],
)
def test_push_leaves_what_is_somebody_elses_or_public(
    command: Any, hub: Hub, private: bool, files: dict[str, bytes], message: str
) -> None:
    hub.repositories["me/mine"] = {"private": private, "files": files}
    done = command(hub.endpoint, "w=0.1", "--push", "me/mine", "--yes")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert hub.repositories["me/mine"]["files"] == files


def test_push_says_what_is_wrong_before_it_exports(command: Any, hub: Hub, tmp_path: Path) -> None:
    push = ("sft", "--push", "me/mine", "--yes")

    def error(*arguments: str, endpoint: str = hub.endpoint, **options: Any) -> str:
        done = command(endpoint, *arguments, **options)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.splitlines()[-1]

    assert "refuses me/mine" in (wrong := error(*push, token="hf_wrong")) and "HF_TOKEN" in wrong
    assert "is no id of a repository" in error("sft", "--push", "a/b/c")
    assert hub.repositories == {} and not (tmp_path / "out").exists()

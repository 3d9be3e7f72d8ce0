"""`helpsteer ui` in tests: started, asked through GraphQL as its own pages do, and ended with all that it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpsteer_assets_tests.processes import descendants

ROOT = Path(__file__).parents[1]
LATE = 800.0
"""Seconds for a backfill to end; Dagster looks at it every 30 seconds."""


def wait(condition: Callable[[], object], what: str, seconds: float = LATE) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


class Ui:
    """A running `helpsteer ui`: webserver, daemon and code server."""

    def __init__(self, experiment: Path, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = home.with_name("ui.log")
        code = "from helpsteer_assets.cli import entry; entry()"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, "-e", str(experiment), "--home", str(home), "ui", "--port", str(port)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Until the assets are loaded."""
        wait(self._is_ready, "the UI to start", 120)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        with suppress(OSError):
            query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
            return bool(self.ask(query)["repositoriesOrError"].get("nodes"))
        return False

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Data that a GraphQL query or mutation returns."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data

    def backfills(self) -> dict[str, str]:
        """Status by id, the latest first."""
        query = "{ partitionBackfillsOrError { ... on PartitionBackfills { results { id status } } } }"
        return {item["id"]: item["status"] for item in self.ask(query)["partitionBackfillsOrError"]["results"]}

    def close(self) -> None:
        """End it as Ctrl-C does, then whatever is left of it."""
        below = descendants(self._process.pid)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for pid in {self._process.pid, *below, *descendants(self._process.pid)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

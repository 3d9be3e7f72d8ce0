"""A Ray cluster of several nodes on this machine, and Dagster on it; run by `make test-ray`, not by `make test`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import ServerUnavailable

from helpsteer_assets_tests.processes import descendants

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "ray"
BIN = Path(sys.executable).parent
WAIT_SECONDS = 1200


def wait(condition: Callable[[], object], what: str, interval: float = 0.2) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(interval)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Of a machine of the cluster: the installation on its PATH, and nothing of ours set."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HELPSTEER_", "DAGSTER_", "RAY_"))}
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return plain | own | {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"} | more


class Cluster:
    """Nodes of one logical GPU each; `head` is the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[str] = []
        self._gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        ports = [f"--port={self._gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
        self._start("head", ["--head", *ports])
        self.client = JobSubmissionClient(self.address)

    def add(self, name: str, *, without: Path | None = None) -> None:
        """Start a node; a node `without` a folder has an empty one in its place, and a host name of its own."""
        hide = f'hostname {name} && mount -t tmpfs none "{without}" && exec "$0" "$@"'
        prefix = [] if without is None else ["unshare", "--mount", "--uts", "sh", "-c", hide]
        self._start(name, [f"--address=127.0.0.1:{self._gcs}"], prefix)

    def _start(self, name: str, arguments: list[str], prefix: list[str] | None = None) -> None:
        size = ["--num-cpus=2", "--num-gpus=1", f'--resources={{"{name}": 1}}', "--object-store-memory=80000000"]
        own = [f"--temp-dir={self._folder}/{name}", "--dashboard-agent-listen-port=0", "--node-ip-address=127.0.0.1"]
        self._nodes.append(name)
        for _ in range(3):  # Ray itself gives up after 30 seconds, which a busy machine may need
            with (self._folder / f"{name}.log").open("ab") as log:
                command = [*(prefix or []), "ray", "start", *arguments, *size, *own]
                if subprocess.run(command, env=environment(), stdout=log, stderr=log, check=False).returncode == 0:
                    wait(lambda: self._is_up(name), f"node {name}", interval=0.5)
                    return
            self._kill(name)
        raise AssertionError((self._folder / f"{name}.log").read_text(errors="replace")[-3000:])

    def _is_up(self, name: str) -> bool:
        with suppress(ConnectionError, ServerUnavailable):
            return name in self.ids()
        return False

    def ids(self) -> dict[str, str]:
        """Ray's ids of the living nodes by name."""
        living = [node for node in list_nodes(address=self.address, detail=True) if node.state == "ALIVE"]
        return {name: node.node_id for node in living for name in self._nodes if name in node.resources_total}

    def steps(self, node: str) -> list[JobDetails]:
        """The jobs of steps that ran on a node, or run there."""
        return [job for job in self.client.list_jobs() if job.driver_node_id == node and "dagster/op" in job.metadata]

    def log(self, node: str, job: str) -> str:
        """What a job printed on a node."""
        (path,) = (self._folder / node).glob(f"session_2*/logs/job-driver-{job}.log")
        return path.read_text(encoding="utf-8")

    def kill(self, name: str) -> None:
        """All processes of a node at once, as a power cut does."""
        self._nodes.remove(name)
        self._kill(name)

    def _kill(self, name: str) -> None:
        own = [pid for pid in processes() if f"{self._folder}/{name}/".encode() in command_line(pid)]
        for pid in {*own, *(child for parent in own for child in descendants(parent))}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for name in list(self._nodes):
            self.kill(name)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def command_line(pid: int) -> bytes:
    """The arguments of a process, each followed by a NUL; empty for one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes: `head` and `second`."""
    # Ray's sockets lie in it, and a socket's path is at most 107 characters long.
    folder = Path(tmp_path_factory.getbasetemp().parent, f"ray{os.getpid()}")
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        cluster.add("second")
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


class Deployment:
    """Dagster on a cluster: its records, its daemon, and the environment in which people start it."""

    def __init__(self, cluster: Cluster, folder: Path, experiment: Path, home: Path) -> None:
        self.home, self._folder, self._daemon = home, folder, None
        self.dagster_home = folder / "dagster"
        self.dagster_home.mkdir()
        # deploy/ray/dagster.yaml but for Postgres, which tests of its own start, and with less patience.
        config: dict[str, Any] = yaml.safe_load((DEPLOY / "dagster.yaml").read_text(encoding="utf-8"))
        del config["storage"]
        config["run_monitoring"]["poll_interval_seconds"] = 5
        (self.dagster_home / "dagster.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self.pool_limit: int = config["concurrency"]["pools"]["default_limit"]
        self.environment = environment(
            RAY_ADDRESS=cluster.address,
            DAGSTER_HOME=str(self.dagster_home),
            HELPSTEER_EXECUTOR="ray",
            HELPSTEER_EXPERIMENT=str(experiment),
            HELPSTEER_HOME=str(home),
        )
        os.environ["RAY_ADDRESS"] = cluster.address  # dagster.yaml takes it from there
        self.instance = dg.DagsterInstance.from_config(str(self.dagster_home))

    def start_daemon(self) -> None:
        command = ["dagster-daemon", "run", "-w", str(DEPLOY / "workspace.yaml")]
        with (self._folder / "daemon.log").open("wb") as log:
            self._daemon = subprocess.Popen(
                command, env=self.environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )

    def backfill(self, *weights: str) -> None:
        where = ["-w", str(DEPLOY / "workspace.yaml"), "-j", "tradeoff_grid"]
        done = self.run("dagster", "job", "backfill", *where, "--partitions", ",".join(weights), "--noprompt")
        assert done.returncode == 0, done.stdout + done.stderr

    def runs(self) -> dict[str, dg.DagsterRun]:
        """The run of each weight."""
        return {run.tags["dagster/partition"]: run for run in self.instance.get_runs()}

    def events(self, run_id: str) -> list[dg.DagsterEvent]:
        return [event.dagster_event for event in self.instance.all_logs(run_id) if event.dagster_event is not None]

    def end(self) -> None:
        if self._daemon is not None:
            for pid in [self._daemon.pid, *descendants(self._daemon.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._daemon.wait()
        self.instance.dispose()


def holder(lock: Path) -> int:
    """The process that holds a lock."""
    return int(json.loads(lock.read_text(encoding="utf-8"))["process"])

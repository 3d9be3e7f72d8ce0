"""A Ray cluster in place of one machine (HELPSTEER_EXECUTOR=ray): what steps ask of it, and whether its nodes are fit.

Each step is a Ray job on a node with room for it. The nodes share the home by a file system that each of them mounts at
the same path. A node that does not see it would make an empty one, and train what nobody finds: so whoever starts steps
holds a lock in the home that has a random name, and each step looks for the lock of that name before it does anything.

Nothing here imports ray or dagster before it is needed: local runs do without them.
"""

import importlib.util
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import RunSettings
from helpsteer_assets.store.home import Home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

HOME_TOKEN = "HELPSTEER_HOME_TOKEN"
"""Environment variable of a step: name of the lock that whoever started it holds in the home."""

CPU_STEP = {"dagster-ray/config": {"num_cpus": 1}}
"""Tag of a step that loads no model. A step that asks for nothing would always run on the head node."""

_FORWARDED_PREFIXES = ("HELPSTEER_", "HF_", "WANDB_", "TRACKIO_")
_FORWARDED = ("DAGSTER_HOME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", HOME_TOKEN)
_COMPARED = ("python", "helpsteer_assets", "torch", "transformers", "peft", "dagster")
_ANSWER_SECONDS = 120.0
"""For a node to answer."""
_JOB_SECONDS = 600.0
"""For the cluster to start a job, ask all nodes and end."""
_ANSWERS = "nodes: "
"""Begins the line in which they are."""


def on_ray() -> bool:
    """Whether steps run on a Ray cluster. Raises HelpsteerError for an executor that there is not."""
    name = os.environ.get("HELPSTEER_EXECUTOR", "")
    if name not in ("", "ray"):
        raise HelpsteerError(
            f"HELPSTEER_EXECUTOR is {name!r}; set it to `ray` for a Ray cluster, or leave it unset for this machine"
        )
    return name == "ray"


def require_ray() -> None:
    """Raise HelpsteerError where the packages for a cluster are not installed."""
    missing = [name for name in ("ray", "dagster_ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise HelpsteerError(
            f"HELPSTEER_EXECUTOR=ray needs {' and '.join(missing)}, not installed here: "
            "pip install -c constraints.txt 'helpsteer_assets[ray]' (from a clone: '.[ray]'), on every node"
        )


def model_step(run: RunSettings) -> dict[str, dict[str, float]]:
    """Tag of a step that loads a model: what it asks of a node."""
    return {"dagster-ray/config": {"num_cpus": run.threads or 1, "num_gpus": run.gpus}}


def require_shared_home(home: Home) -> None:
    """Raise HelpsteerError in a step on a node that sees another home than the process that started the step."""
    token = os.environ.get(HOME_TOKEN)
    if token and not _sees(home, token):
        raise HelpsteerError(
            f"node {socket.gethostname()} does not see the home of this run at {home}: no lock {token} is there. Mount "
            "the shared file system at that path on this node, as on the others; nothing was written here"
        )


def _sees(home: Home, token: str) -> bool:
    from helpsteer_assets.store.locks import process_lock

    return process_lock(home.path, token).exists()


def forwarded_variables() -> list[str]:
    """Names of the environment variables that steps get from the process that starts them.

    Ray forwards none by itself. With ours and the hub's go those that dagster.yaml names by `env:`, such as a
    database's password.
    """
    ours = [name for name in os.environ if name.startswith(_FORWARDED_PREFIXES)]
    folder = os.environ.get("DAGSTER_HOME")
    return sorted({*ours, *_FORWARDED, *(_named_by(_dagster_yaml(Path(folder))) if folder else ())})


def _dagster_yaml(folder: Path) -> dict[str, Any]:
    """dagster.yaml in a DAGSTER_HOME; empty where there is none."""
    path = folder / "dagster.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def _named_by(config: object) -> set[str]:
    """The environment variables that a configuration of Dagster's takes values from."""
    if isinstance(config, dict):
        if set(config) == {"env"}:
            return {str(config["env"])}
        return {name for value in config.values() for name in _named_by(value)}
    return {name for item in config for name in _named_by(item)} if isinstance(config, list) else set()


@dataclass(frozen=True)
class Node:
    """A living node, and what it answered."""

    name: str
    cpus: float
    gpus: float
    error: str = ""
    """Why it did not answer; what follows is then empty."""
    sees_home: bool = False
    locks_reach: bool = True
    """Whether a lock that this machine holds in the home keeps that node out."""
    dagster: str | None = None
    """Where `dagster` is found on the PATH of a job, which starts steps by that name."""
    versions: dict[str, str | None] = field(default_factory=dict)


def ask_nodes(home: Home) -> tuple[str, list[Node]]:
    """The cluster's address, and what each of its living nodes sees of the home and has installed.

    It is asked by a job, as steps are started: what the job cannot do, no step can. Raises HelpsteerError where there
    is no cluster or no home, and where the job fails.
    """
    require_ray()
    if not home.path.is_dir():
        raise HelpsteerError(f"home {home} is not there: make it, on a file system that all nodes mount at this path")
    from ray.job_submission import JobStatus, JobSubmissionClient

    from helpsteer_assets.execution.recovery import PROCESS_TAG, alive

    try:
        client = JobSubmissionClient()
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS") or "unset"
        raise HelpsteerError(
            f"no Ray cluster answers (RAY_ADDRESS is {address}): start one, or set RAY_ADDRESS to http://<head>:8265. "
            f"Ray says: {error}"
        ) from None
    with alive(home) as tags:
        variables = {name: os.environ[name] for name in forwarded_variables() if name in os.environ}
        variables |= {HOME_TOKEN: tags[PROCESS_TAG], "HELPSTEER_HOME": str(home)}
        job = client.submit_job(
            entrypoint="python -m helpsteer_assets.execution.ray_cluster", runtime_env={"env_vars": variables}
        )
        status = _ended(client, job)
    said = client.get_job_logs(job)
    if status != JobStatus.SUCCEEDED.value or _ANSWERS not in said:
        last = "\n".join(said.strip().splitlines()[-5:]) or client.get_job_info(job).message
        raise HelpsteerError(
            f"a job on the Ray cluster at {client.get_address()} is {status}: {last}\n`ray start` must see "
            "`python` and `dagster` of the installation on its PATH, on every node"
        )
    answers = said.rpartition(_ANSWERS)[2].splitlines()[0]
    return client.get_address(), [Node(**answer) for answer in json.loads(answers)]


def _ended(client: "JobSubmissionClient", job: str) -> str:
    """The status in which a job ended, or in which it was stopped after `_JOB_SECONDS`."""
    deadline = time.monotonic() + _JOB_SECONDS
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not status.is_terminal():
        client.stop_job(job)
    return str(status.value)


def print_nodes() -> None:
    """In a job on the cluster: ask every living node, and print what it answered."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ask = ray.remote(num_cpus=0, max_retries=0)(_describe_node)
    living = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in living
    ]
    answers = []
    for node, answer in zip(living, asked, strict=True):
        known = Node(node["NodeManagerHostname"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        try:
            answers.append(asdict(known) | ray.get(answer, timeout=_ANSWER_SECONDS))
        except ray.exceptions.RayError as error:
            answers.append(asdict(known) | {"error": str(error).strip().splitlines()[-1]})
    print(_ANSWERS + json.dumps(answers), flush=True)


def _describe_node() -> dict[str, Any]:
    from helpsteer_assets.store.locks import lock_if_free, process_lock

    home, token = Home.from_environment(), os.environ[HOME_TOKEN]
    answer = {"sees_home": _sees(home, token), "dagster": shutil.which("dagster"), "versions": _installed()}
    if answer["sees_home"]:
        with lock_if_free(process_lock(home.path, token)) as is_free:
            answer["locks_reach"] = not is_free
    return answer


def _installed() -> dict[str, str | None]:
    from helpsteer_assets.store.artifacts import git_revision, versions

    return {name: versions()[name] for name in _COMPARED} | {"commit": git_revision()}


def judge(nodes: list[Node], run: RunSettings, home: Home, dagster_home: Path) -> tuple[list[str], list[str]]:
    """Reasons why steps cannot run on the nodes, and why GPUs stand idle."""
    problems, warnings = [problem for node in nodes for problem in _problems_of(node, home)], []
    cpus = run.threads or 1
    asked = f"{run.gpus:g} GPU" if run.gpus else f"{cpus} CPU"
    room = sum(int(node.gpus // run.gpus if run.gpus else node.cpus // cpus) for node in nodes)
    limit = _dagster_yaml(dagster_home).get("concurrency", {}).get("pools", {}).get("default_limit")
    advice = f"set concurrency.pools.default_limit to {room} in {dagster_home / 'dagster.yaml'}"
    if not room:
        problems.append(f"no node has the {asked} that a step with a model asks for: add one, or change run.gpus")
    elif limit is None or limit > room:
        problems.append(
            f"{'any number of' if limit is None else limit} steps with a model may run at once, and the cluster has "
            f"room for {room} (of {asked} each): others would wait, and Ray fails what waits for 900 s; {advice}"
        )
    elif limit < room:
        warnings.append(f"{limit} steps with a model may run at once, and the cluster has room for {room}: {advice}")
    return problems, warnings


def _problems_of(node: Node, home: Home) -> Iterator[str]:
    if node.error:
        yield f"node {node.name} does not answer: {node.error}"
        return
    if not node.sees_home:
        yield (
            f"node {node.name} sees another home: what this machine wrote to {home} is not there. Mount the shared "
            "file system at that path on it"
        )
    elif not node.locks_reach:
        yield (
            f"node {node.name} can take a lock that this machine holds in {home}: two nodes would train the same "
            "weight. Use a file system whose locks reach from machine to machine (NFS 4, or Lustre mounted with -o "
            "flock)"
        )
    if node.dagster is None:
        yield (
            f"node {node.name} has no `dagster` on its PATH: run `ray start` there with the installation's bin folder "
            "on the PATH"
        )
    for name, here in _installed().items():
        if node.versions[name] != here:
            yield f"node {node.name} has {name} {node.versions[name]}, and this machine {here}: install the same there"


if __name__ == "__main__":
    # Under its own name, by which the nodes import what they are asked to do.
    from helpsteer_assets.execution import ray_cluster

    ray_cluster.print_nodes()

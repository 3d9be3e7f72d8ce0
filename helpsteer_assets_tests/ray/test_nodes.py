"""What a cluster's users are told of nodes, limits and settings that do not fit."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.ref import InstanceRef
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import pg_url_from_config

from helpsteer_assets.execution.ray_cluster import (
    HOME_TOKEN,
    Node,
    _describe_node,
    _installed,
    forwarded_variables,
    judge,
)
from helpsteer_assets.execution.recovery import PROCESS_TAG, alive
from helpsteer_assets.experiment.settings import RunSettings
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import process_lock
from helpsteer_assets_tests.finished import write_experiment
from helpsteer_assets_tests.ray.conftest import DEPLOY, Cluster, Deployment, wait

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2400)]

FIT = {"sees_home": True, "dagster": "/bin/dagster"}
TWO = [Node("one", 8, 2, versions=_installed(), **FIT), Node("two", 8, 1, versions=_installed(), **FIT)]
"""Two nodes with three GPUs."""


def test_dagster_yaml_is_what_dagster_dagster_ray_and_dagster_postgres_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_bytes((DEPLOY / "dagster.yaml").read_bytes())
    for name, value in {"RAY_ADDRESS": "http://head:8265", "PG_HOST": "db", "PG_PASSWORD": "secret"}.items():
        monkeypatch.setenv(name if name == "RAY_ADDRESS" else f"HELPSTEER_{name}", value)
    found = InstanceRef.from_dir(str(tmp_path))
    assert found.run_launcher is not None and found.run_launcher.supports_resume_run
    assert found.run_launcher.address == "http://head:8265"
    assert found.settings["run_monitoring"]["max_resume_run_attempts"] == 3
    assert found.settings["concurrency"]["pools"] == {"default_limit": 2, "granularity": "op"}
    assert found.storage_data is not None
    assert found.storage_data.class_name == "DagsterPostgresStorage"
    storage = process_config(
        resolve_to_config_type(DagsterPostgresStorage.config_type()), found.storage_data.config_dict
    )
    assert storage.success, storage.errors
    assert pg_url_from_config(storage.value) == "postgresql+psycopg2://helpsteer:secret@db:5432/helpsteer"


def test_steps_get_our_environment_and_what_dagster_yaml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text("storage: {postgres: {postgres_db: {password: {env: SECRET}}}}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("UNRELATED", "1")
    found = forwarded_variables()
    assert {"DAGSTER_HOME", "HELPSTEER_EXPERIMENT", "HF_HUB_OFFLINE", "SECRET", HOME_TOKEN} <= set(found)
    assert not {"UNRELATED", "PATH", "RAY_ADDRESS"} & set(found)


@pytest.mark.parametrize(
    ("gpus", "limit", "problem", "warning"),
    [
        (1.0, 3, "", ""),
        (1.0, None, "any number of steps with a model may run at once, and the cluster has room for 3", ""),
        (1.0, 4, "4 steps with a model may run at once, and the cluster has room for 3", ""),
        (1.0, 2, "", "2 steps with a model may run at once, and the cluster has room for 3"),
        (4.0, 1, "no node has the 4 GPU that a step with a model asks for", ""),
        (0.0, 16, "", ""),
    ],
)
def test_the_limit_of_the_pool_has_to_fit_the_cluster(
    tmp_path: Path, gpus: float, limit: int | None, problem: str, warning: str
) -> None:
    config = {} if limit is None else {"concurrency": {"pools": {"default_limit": limit}}}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    problems, warnings = judge(TWO, RunSettings(gpus=gpus), Home(tmp_path), tmp_path)
    assert len(problems) == bool(problem) and all(text.startswith(problem) for text in problems)
    assert len(warnings) == bool(warning) and all(text.startswith(warning) for text in warnings)


def test_a_node_with_other_versions_no_dagster_or_locks_that_do_not_reach_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELPSTEER_HOME", str(tmp_path))
    with alive(Home(tmp_path)) as tags:
        monkeypatch.setenv(HOME_TOKEN, tags[PROCESS_TAG])
        fit = _describe_node()
        assert fit["sees_home"] and fit["locks_reach"]
    process_lock(tmp_path, tags[PROCESS_TAG]).touch()  # as from a machine that its locks do not reach
    unfit = _describe_node() | {"dagster": None, "versions": _installed() | {"torch": "1.0"}}
    problems, _ = judge([*TWO, Node("odd", 1, 0, **unfit)], RunSettings(), Home(tmp_path), DEPLOY)
    locks, command, torch = (problem for problem in problems if problem.startswith("node odd"))
    assert locks.startswith("node odd can take a lock that this machine holds")
    assert command.startswith("node odd has no `dagster` on its PATH")
    assert torch.startswith(f"node odd has torch 1.0, and this machine {_installed()['torch']}")


@pytest.fixture(scope="module")
def deployment(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "home").mkdir()
    deployment = Deployment(cluster, folder, write_experiment(folder), folder / "home")
    yield deployment
    deployment.end()


def check(deployment: Deployment) -> tuple[int, str]:
    """Exit status and output of `helpsteer check`, line breaks removed."""
    done = deployment.run("helpsteer", "check")
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_cluster_that_is_fit_passes_the_check(cluster: Cluster, deployment: Deployment) -> None:
    code, said = check(deployment)
    assert code == 0, said
    assert f"Ray at {cluster.address}" in said and "the cluster can run it" in said


def test_a_node_that_sees_another_home_is_named_by_the_check_and_does_nothing(
    cluster: Cluster, deployment: Deployment
) -> None:
    if subprocess.run(["unshare", "--mount", "--uts", "true"], check=False).returncode:
        pytest.skip("a node with another home needs the right to mount")
    cluster.add("stranger", without=deployment.home)
    code, said = check(deployment)
    assert code == 2, said
    assert f"node stranger sees another home: what this machine wrote to {deployment.home} is not there" in said

    # A step on that node, until it loads the assets.
    job = cluster.client.submit_job(
        entrypoint='python -c "from helpsteer_assets.definitions import defs; defs()" || find "$HELPSTEER_HOME"',
        entrypoint_resources={"stranger": 1},
        runtime_env={
            "env_vars": {
                "HELPSTEER_HOME": str(deployment.home),
                "HELPSTEER_EXECUTOR": "ray",
                HOME_TOKEN: "the-lock-of-a-run",
            }
        },
    )
    wait(lambda: cluster.client.get_job_status(job).is_terminal(), "the step")
    said = cluster.log("stranger", job)
    assert f"HelpsteerError: node stranger does not see the home of this run at {deployment.home}" in said
    assert said.strip().splitlines()[-1] == str(deployment.home), "something was written there"
    cluster.kill("stranger")


def test_helpsteer_run_does_not_compute_here_what_was_meant_for_the_cluster(deployment: Deployment) -> None:
    done = deployment.run("helpsteer", "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: HELPSTEER_EXECUTOR is ray, and `helpsteer run` computes in this process")
    assert list(deployment.home.glob("artifacts")) == []

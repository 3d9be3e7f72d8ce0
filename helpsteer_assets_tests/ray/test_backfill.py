"""A grid of weights on a cluster while a node dies, a node is added, and the process of a run dies.

One backfill of three weights goes through all of it; the tests look at what it left. Two trainings are halted after
their first checkpoint, one on each node. Then the second node is killed, and so is the process of the other training's
run. A third node is added, and the halted training goes on.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import Artifact
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished, quick_experiment
from helpsteer_assets_tests.ray.conftest import Cluster, Deployment, command_line, holder, processes, wait

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2400)]

WEIGHTS = ["0.1", "0.5", "0.9"]
MODEL = "modpo_models"


@dataclass
class Story:
    """What happened, and to which weight."""

    experiment: Experiment
    deployment: Deployment
    nodes: dict[str, str]
    """Ray's ids of `head`, `second` and `third`."""
    undisturbed: Path
    """The home of a run that nothing happened to."""
    killed_node: str = ""
    """The weight whose training was on the node that died."""
    killed_worker: str = ""
    """The weight whose run's process died."""

    def adapter(self, weight: str, home: Path | None = None) -> Artifact:
        return Finished(self.experiment, home or self.deployment.home).artifact(MODEL, weight)


@pytest.fixture(scope="module")
def story(cluster: Cluster, finished_home: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("backfill")
    experiment = quick_experiment(
        folder,
        objective={"weights": [float(w) for w in WEIGHTS]},
        modpo={"steps": 24, "evaluate_every": 8},
        evaluation={"kl_samples": 0},
        run={"threads": 1, "device": "cpu"},
    )
    # What comes before the weights was made by this machine alone.
    for name in ("home", "undisturbed"):
        shutil.copytree(finished_home.home / "artifacts", folder / name / "artifacts")
    deployment = Deployment(cluster, folder, folder / "quick.yaml", folder / "home")
    story = Story(experiment, deployment, cluster.ids(), folder / "undisturbed")
    try:
        deployment.start_daemon()
        deployment.backfill(*WEIGHTS)
        _disturb(story, cluster)
        wait(lambda: all(run.is_finished for run in deployment.runs().values()), "the backfill", interval=1)
        yield story
    finally:
        deployment.end()


def _disturb(story: Story, cluster: Cluster) -> None:
    deployment = story.deployment
    halted: dict[str, int] = {}
    wait(lambda: len(_halt_trainings(story, halted)) == 2, "two trainings", interval=0.02)
    runs = deployment.runs()
    on_second = {job.metadata["dagster/run-id"] for job in cluster.steps(story.nodes["second"])}
    (story.killed_node,) = [weight for weight in halted if runs[weight].run_id in on_second]
    (story.killed_worker,) = set(halted) - {story.killed_node}
    cluster.kill("second")
    run = runs[story.killed_worker].run_id
    os.kill(_worker(run), signal.SIGKILL)
    cluster.add("third")
    story.nodes |= cluster.ids()
    wait(
        lambda: any("from previous run" in (event.message or "") for event in deployment.events(run)),
        "the run to be taken up",
        interval=1,
    )
    os.kill(halted[story.killed_worker], signal.SIGCONT)


def _halt_trainings(story: Story, halted: dict[str, int]) -> dict[str, int]:
    """Stop the trainings that have a checkpoint; their processes by weight are added to `halted`."""
    for weight in set(WEIGHTS) - set(halted):
        value = fingerprints(story.experiment)[MODEL, weight].value
        home = story.deployment.home
        if list((home / "artifacts" / MODEL / weight / f"{value}.partial").glob("checkpoints/*/complete.json")):
            halted[weight] = holder(home / "locks" / MODEL / weight / f"{value}.lock")
            os.kill(halted[weight], signal.SIGSTOP)
    return halted


def _worker(run_id: str) -> int:
    """The process that executes a run."""
    commands = {pid: command_line(pid) for pid in processes()}
    # A shell above it has the same words, in one argument.
    (found,) = [pid for pid, line in commands.items() if b"\0execute_run\0" in line and run_id.encode() in line]
    return found


def test_every_weight_has_its_scores(story: Story) -> None:
    runs = story.deployment.runs()
    assert {weight: run.status for weight, run in runs.items()} == dict.fromkeys(WEIGHTS, dg.DagsterRunStatus.SUCCESS)
    _, rows = Warehouse(story.deployment.home).query("SELECT w, count(*) FROM scores WHERE policy='modpo' GROUP BY w")
    assert sorted(rows) == [(float(weight), story.experiment.evaluation.prompts) for weight in WEIGHTS]


def test_every_node_got_work(story: Story, cluster: Cluster) -> None:
    ran = {name: {job.metadata["dagster/op"] for job in cluster.steps(node)} for name, node in story.nodes.items()}
    assert ran.keys() == {"head", "second", "third"}
    assert all({MODEL, "generations", "scores"} & steps for steps in ran.values()), ran


def test_the_training_of_a_killed_node_ends_in_the_identical_adapter(story: Story) -> None:
    weight = story.killed_node
    assert run_experiment(
        story.experiment, Home(story.undisturbed), select=f'key:"{MODEL}"', weights=[weight], announce=lambda _: None
    )
    resumed, straight = story.adapter(weight), story.adapter(weight, story.undisturbed)
    assert resumed.manifest["metrics"]["resumed_from"] is not None
    assert straight.manifest["metrics"]["resumed_from"] is None
    name = "adapter/adapter_model.safetensors"
    assert resumed.file(name).read_bytes() == straight.file(name).read_bytes()


def test_the_training_of_a_run_whose_process_died_is_not_begun_again(story: Story) -> None:
    events = story.deployment.events(story.deployment.runs()[story.killed_worker].run_id)
    started = [event for event in events if event.event_type_value == "STEP_START" and event.step_key == MODEL]
    assert len(started) == 1
    assert story.adapter(story.killed_worker).manifest["metrics"]["resumed_from"] is None


def test_no_more_steps_with_a_model_are_handed_to_ray_than_the_pool_lets(story: Story) -> None:
    changes: list[tuple[float, int]] = []
    for run in story.deployment.runs().values():
        for entry in story.deployment.instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event is not None and event.event_type_value == "STEP_WORKER_STARTING":
                changes.append((entry.timestamp, 1))
            elif event is not None and event.event_type_value in ("STEP_SUCCESS", "STEP_UP_FOR_RETRY"):
                changes.append((entry.timestamp, -1))
    assert len(changes) >= 2 * len(WEIGHTS) * 3
    at_once, most = 0, 0
    for _, change in sorted(changes):
        at_once += change
        most = max(most, at_once)
    assert at_once == 0
    assert most == story.deployment.pool_limit

"""Several processes that materialize the same artifacts at once."""

import signal
import time

from helpsteer_assets_tests.faults.campaign import Command, Trial, fault, work_done
from helpsteer_assets_tests.faults.kill_faults import TRAININGS

STOPPED_SECONDS = 3.0
"""How long a holder gives no sign of life."""


@fault("two or three commands at once")
def commands_at_once(trial: Trial) -> None:
    """One makes each artifact, the others wait and reuse it."""
    asset, count = trial.random.choice(trial.assets), trial.random.choice((2, 3))
    trial.begin_with(asset)
    trial.note = f"{count} commands, with what comes before {asset} there"
    commands = []
    for _ in range(count):
        commands.append(trial.start("run"))
        time.sleep(trial.random.choice((0, 0, 1)))
    for command in commands:
        assert command.wait() == 0, f"ended with {command.wait()}"
    assert not trial.recomputed().total(), f"computed twice: {trial.recomputed()}"


@fault("the holder of a lock is killed, others wait")
def holder_killed(trial: Trial) -> None:
    """A waiting command takes over, and goes on from the checkpoint."""
    asset, partition = trial.random.choice(TRAININGS)
    holder, waiting = _holder_and_waiting(trial, asset, partition)
    trial.note = f"in {asset} {partition}, with {len(waiting)} waiting"
    holder.send(signal.SIGKILL)
    trial.deaths = 1
    for command in waiting:
        assert command.wait() == 0, f"ended with {command.wait()}"


@fault("the holder of a lock is stopped, others wait")
def holder_stopped(trial: Trial) -> None:
    """A living process's lock is never taken, however long it is silent."""
    asset, partition = trial.random.choice(TRAININGS)
    holder, waiting = _holder_and_waiting(trial, asset, partition)
    holder.send(signal.SIGSTOP)
    trial.note = f"in {asset} {partition}, with {len(waiting)} waiting"
    before = work_done(trial.folder)
    time.sleep(STOPPED_SECONDS)
    assert work_done(trial.folder) == before, "another process went on with the stopped one's work"
    assert all(command.running for command in waiting), "a waiting command has ended"
    holder.send(signal.SIGCONT)
    for command in (holder, *waiting):
        assert command.wait() == 0, f"ended with {command.wait()}"
    assert not trial.recomputed().total(), f"computed twice: {trial.recomputed()}"


def _holder_and_waiting(trial: Trial, asset: str, partition: str) -> tuple[Command, list[Command]]:
    """A command that has done a step of a training, and one or two that wait for it."""
    trial.begin_with(asset)
    holder = trial.start("run")
    steps = trial.random.randint(1, 3)
    trial.wait(
        lambda: work_done(trial.folder)[f"{asset} {partition}", "steps"] >= steps or not holder.running, "a first step"
    )
    # Held where it is: the others need seconds to come as far.
    holder.send(signal.SIGSTOP)
    waiting = [trial.start("run") for _ in range(trial.random.choice((1, 2)))]
    for command in waiting:
        trial.wait(lambda c=command: "waiting for" in c.output or not c.running, "a second command to wait")
        assert command.running, f"did not wait: {command.output[-1000:]}"
    holder.send(signal.SIGCONT)
    return holder, waiting

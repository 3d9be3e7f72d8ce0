"""Sudden death of `helpsteer run`: at random moments, and before and in the middle of every file operation."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from helpsteer_assets.files.durable import write_atomically
from helpsteer_assets_tests.faults import operations
from helpsteer_assets_tests.faults.campaign import Command, Hook, Trial, fault
from helpsteer_assets_tests.faults.homes import TRACEBACK

TRAININGS = (("sft_model", "all"), ("margin_adapter", "all"), ("modpo_models", "0.1"), ("modpo_models", "0.9"))


def _reach(trial: Trial, before: Hook | None = None) -> Command:
    """Start a run, and come back at a random moment of a random artifact's making, or of the run's start."""
    asset, partition = trial.random.choice([*trial.undisturbed.fingerprints, ("", "")])
    trial.begin_with(asset or trial.random.choice(trial.assets))
    command = trial.start("run", before=before)
    seconds = 3.0
    if asset:
        trial.wait_for(asset, partition, command)
        seconds = trial.undisturbed.seconds[asset, partition] + 0.2  # it is recorded and published then
    elif before is not None:
        trial.wait(lambda: "experiment" in command.output, "the first words")
    delay = trial.random.uniform(0, seconds)
    time.sleep(delay)
    trial.note = f"{delay:.2f} s after {f'{asset} {partition}' if asset else 'the run'} began"
    return command


@fault("SIGKILL at a random moment")
def kill_at_random(trial: Trial) -> None:
    _reach(trial).send(signal.SIGKILL)
    trial.deaths = 1


@fault("SIGTERM at a random moment")
def terminate_at_random(trial: Trial) -> None:
    _stop(trial, _reach(trial), signal.SIGTERM)


@fault("Ctrl-C at a random moment")
def interrupt_at_random(trial: Trial) -> None:
    _stop(trial, _reach(trial), signal.SIGINT)


@fault("its terminal is closed at a random moment")
def hang_up_at_random(trial: Trial) -> None:
    """It gets SIGHUP, and what it says from then on fails."""
    terminal = trial.folder / "terminal"
    command = _reach(trial, partial(_print_through_a_process, terminal))
    with suppress(ProcessLookupError):
        os.kill(int(terminal.read_text()), signal.SIGKILL)
    _stop(trial, command, signal.SIGHUP)


def _print_through_a_process(file: Path) -> None:
    """Print through `cat`, which dies as a terminal does; its pid goes into the file."""
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert cat.stdin is not None
    for stream in (1, 2):
        os.dup2(cat.stdin.fileno(), stream)
    write_atomically(file, str(cat.pid))


def _stop(trial: Trial, command: Command, number: int) -> None:
    command.send(number)
    code = command.wait()
    trial.deaths = 1
    assert code in (0, -number, 128 + number), f"ended with {code}"
    assert not TRACEBACK.search(command.output), command.output


@fault("SIGKILL at a file operation")
def kill_at_operation(trial: Trial) -> None:
    _die(trial, power_cut=False)


@fault("power cut at a file operation")
def power_cut(trial: Trial) -> None:
    _die(trial, power_cut=True)


def _die(trial: Trial, *, power_cut: bool) -> None:
    """Die at any operation, each artifact and each kind of place in its making being as likely as another."""
    by_artifact = trial.undisturbed.operations
    artifact = trial.random.choice(sorted(by_artifact))
    places: dict[str, list[int]] = {}
    for number, (_, path) in enumerate(by_artifact[artifact]):
        places.setdefault(_place(path), []).append(number)
    place = trial.random.choice(sorted(places))
    number = trial.random.choice(places[place])
    trial.begin_with(artifact.partition(" ")[0] or trial.random.choice(trial.assets))
    before = partial(operations.die, trial.home, artifact, number, trial.random.getrandbits(32), power_cut)
    code = trial.run("run", before=before).wait()
    operation, path = by_artifact[artifact][number]
    trial.note = f"at {operation} of {path} (operation {number} of {artifact or 'the start'}), ended with {code}"
    trial.deaths = 1


def _place(path: str) -> str:
    """The kind of file: where it lies, and whether it is a checkpoint's, the manifest, or rows."""
    for part in ("checkpoints/checkpoint-", ".jsonl", "manifest.json", ".publish-", "registry", ".partial"):
        if part in path:
            return part
    return path.partition("/")[0]


@fault("SIGKILL three times in a training")
def kill_three_times(trial: Trial) -> None:
    asset, partition = trial.random.choice(TRAININGS)
    trial.begin_with(asset)
    for _ in range(3):
        command = trial.start("run")
        trial.wait_for(asset, partition, command)
        time.sleep(trial.random.uniform(0, trial.undisturbed.seconds[asset, partition]))
        command.send(signal.SIGKILL)
    trial.note = f"in {asset} {partition}"
    trial.deaths = 3

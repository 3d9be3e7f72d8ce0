"""The fault campaign: one fault at a time over the real graph, the same command again, and a comparison.

A trial gets a fresh home, does its harm there, and is then finished by `helpsteer run`, undisturbed. It survives if
the home is then the same as one that was never disturbed: fingerprints, bytes of every file, metrics, rows of every
table, names of all files (so no temporary is left, and nothing is missing), no lock held, no run or pool slot of
Dagster's still taken. What was computed again is counted.

How to add a fault: write a function in a module `<topic>_faults.py` of this folder; the campaign finds it.

    @fault("a damaged manifest")
    def damaged_manifest(trial: Trial) -> None:
        asset = trial.random.choice(trial.assets)       # every random choice comes from trial.random
        trial.begin_with("scores")                      # what comes before `scores` is there, finished
        command = trial.start("run")                    # `helpsteer run` in a process of its own, in its own group
        trial.wait(lambda: ..., "the scores to begin")  # generous deadline, no sleeping by hand
        command.send(signal.SIGKILL)                    # dead when this returns
        trial.note = f"killed while making {asset}"     # what was done, for the report of a failure
        (trial.home / ...).write_bytes(b"")             # harm of another kind

The harness does the rest. A fault that has promises of its own asserts them; an AssertionError fails the trial. A
process that needs other circumstances (a limit, a lower user, a patched clock) gets `before=`: a picklable function of
a module, called in the process before the command. A home of another kind (small, read-only, oddly named) is made by
assigning `trial.home`; what must be taken down again goes to `trial.cleanup`, an ExitStack.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import yaml

from helpsteer_assets.assets.graph import Fingerprint, fingerprints
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.execution.executor import MODEL_MODULES, STEP_MODULES
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL, ArtifactStore
from helpsteer_assets.store.locks import lock_if_free
from helpsteer_assets_tests.faults import operations

EXPERIMENT: dict[str, Any] = {
    "extends": "demo",
    "name": "faults",
    "data": {"max_train_prompts": 40, "max_validation_prompts": 8},
    "objective": {"weights": [0.1, 0.9]},
    "sft": {"steps": 4, "evaluate_every": 1, "batch_size": 4},
    "margin_adapter": {"steps": 6, "evaluate_every": 2, "batch_size": 4},
    "modpo": {"steps": 8, "evaluate_every": 2, "batch_size": 4},
    "generation": {"max_new_tokens": 24},
    "evaluation": {"prompts": 6, "bootstrap_samples": 100},
    "checks": {"margin_adapter_min_accuracy": 0.0},
}
"""The whole graph, with several checkpoints in each training, in some ten seconds."""

DEADLINE = 300
"""Seconds that anything may take before it counts as hung."""
WORK = "work.jsonl"
"""In a trial's folder: what its processes computed."""
OPERATIONS = "operations.jsonl"
"""In the undisturbed folder: what its process did to files of the home."""
DAMAGED = re.compile(r"\.damaged-\d+")
"""In the name of what was set aside because its bytes were not what they had been."""

being_made = ""
"""In a command's process: the latest artifact that it set about, `<asset> <partition>`."""

Hook = Callable[[], None]
Operation = tuple[str, str]
"""What was done to a file, and the file's path in the home."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([*STEP_MODULES, *MODEL_MODULES, "helpsteer_assets.commands.run", __name__])


class Command:
    """A `helpsteer` process, forked from one that has imported the libraries, with a session of its own."""

    def __init__(self, arguments: list[str], log: Path, work: Path, before: Hook | None) -> None:
        self.log = log
        self._process = _processes.Process(target=_helpsteer, args=(arguments, log, work, before))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal; SIGKILL is waited for."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.wait()

    def wait(self) -> int:
        """Its exit code; the negative number of the signal that killed it."""
        self._process.join(DEADLINE)
        if self._process.exitcode is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"hung: {self.output[-2000:]}")
        return self._process.exitcode


def _start_server() -> None:
    """Start the process that commands are forked from; what it says at its end, of leaks in libraries, is nobody's."""
    sys.stdout.flush()
    streams = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in streams:
        os.dup2(nowhere, number)
    try:
        forkserver.ensure_running()
    finally:
        for number, stream in streams.items():
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)


def _helpsteer(arguments: list[str], log: Path, work: Path, before: Hook | None) -> None:
    """The command line, as the process that `arguments` would start."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored under nohup
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = ["helpsteer", *arguments]
    _count_work(work)
    if before is not None:
        before()
    from helpsteer_assets.cli import entry

    entry()


def _count_work(file: Path) -> None:
    """Note each optimizer step, and each batch of rows that a scoring or a generation finished, by artifact."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from helpsteer_assets.files.rows import ResumableRows

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    build, append = ArtifactStore.build, ResumableRows.append

    def note(kind: str, count: int) -> None:
        os.write(descriptor, json.dumps([being_made, kind, count]).encode() + b"\n")

    def building(self: ArtifactStore, asset: str, partition: str, *arguments: Any, **options: Any) -> Any:
        global being_made
        being_made = f"{asset} {partition}"
        return build(self, asset, partition, *arguments, **options)

    def appending(self: ResumableRows, rows: list[dict[str, Any]]) -> None:
        note("rows", len(rows))
        append(self, rows)

    register_optimizer_step_post_hook(lambda *_: note("steps", 1))
    ArtifactStore.build = building  # type: ignore[method-assign]
    ResumableRows.append = appending  # type: ignore[method-assign]


def work_done(folder: Path) -> Counter[tuple[str, str]]:
    """Optimizer steps and rows that the processes of a folder computed, by artifact and kind."""
    done: Counter[tuple[str, str]] = Counter()
    if (folder / WORK).exists():
        for line in (folder / WORK).read_text(encoding="utf-8").splitlines():
            artifact, kind, count = json.loads(line)
            done[artifact, kind] += count
    return done


@dataclass(frozen=True)
class Undisturbed:
    """A finished run that nothing happened to, and what trials are compared with."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Undisturbed":
        _start_server()
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder)
        made.experiment_file.write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
        traced = partial(operations.trace, made.home, folder / OPERATIONS)
        command = Command(made.arguments(made.home, "run"), folder / "log", folder / WORK, traced)
        assert command.wait() == 0, command.output
        return made

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def experiment_file(self) -> Path:
        return self.folder / "faults.yaml"

    def arguments(self, home: Path, *command: str) -> list[str]:
        return ["-e", str(self.experiment_file), "--home", str(home), *command]

    @cached_property
    def experiment(self) -> Experiment:
        return load_experiment(str(self.experiment_file))

    @cached_property
    def fingerprints(self) -> dict[tuple[str, str], Fingerprint]:
        return fingerprints(self.experiment)

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.home, self)

    @cached_property
    def operations(self) -> dict[str, list[Operation]]:
        """Its file operations, in order, by the artifact that was being made."""
        by_artifact: dict[str, list[Operation]] = {}
        for line in (self.folder / OPERATIONS).read_text(encoding="utf-8").splitlines():
            artifact, operation, path = json.loads(line)
            by_artifact.setdefault(artifact, []).append((operation, path))
        return by_artifact

    @cached_property
    def seconds(self) -> dict[tuple[str, str], float]:
        """How long it took to make each artifact."""
        store = ArtifactStore(self.home)
        found = {key: store.find(*key, fingerprint.value) for key, fingerprint in self.fingerprints.items()}
        return {key: artifact.manifest["duration_s"] for key, artifact in found.items() if artifact is not None}

    @cached_property
    def work(self) -> Counter[tuple[str, str]]:
        return work_done(self.folder)


@dataclass
class Trial:
    """One fault, on a home of its own."""

    fault: str
    undisturbed: Undisturbed
    folder: Path
    """Of this trial; gone when it survives."""
    seed: int
    home: Path
    note: str = ""
    """What the fault did, for the report of a failure."""
    deaths: int = 0
    """Processes that died in a training: each may cost the steps since its last checkpoint."""
    damages: bool = False
    """Whether finished work was destroyed on purpose: it is recomputed, and lies beside as `.damaged-1`."""
    commands: list[Command] = field(default_factory=list)
    cleanup: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def random(self) -> random.Random:
        return random.Random(f"{self.fault} {self.seed}")

    @property
    def assets(self) -> list[str]:
        """In topological order."""
        return list(dict.fromkeys(asset for asset, _ in self.undisturbed.fingerprints))

    def arguments(self, *command: str) -> list[str]:
        """The arguments of `helpsteer` on this trial's experiment and home."""
        return self.undisturbed.arguments(self.home, *command)

    def begin_with(self, asset: str) -> None:
        """Put what comes before `asset` into the home, finished."""
        for name in self.assets[: self.assets.index(asset)]:
            shutil.copytree(self.undisturbed.home / "artifacts" / name, self.home / "artifacts" / name)

    def start(self, *command: str, before: Hook | None = None) -> Command:
        """Start `helpsteer <command>`; `before` is called in its process first."""
        log = self.folder / f"log-{len(self.commands) + 1}"
        self.commands.append(Command(self.arguments(*command), log, self.folder / WORK, before))
        return self.commands[-1]

    def run(self, *command: str, before: Hook | None = None) -> Command:
        """Run `helpsteer <command>` to its end."""
        started = self.start(*command, before=before)
        started.wait()
        return started

    def partial(self, asset: str, partition: str) -> Path:
        """The folder in which an artifact is being made."""
        fingerprint = self.undisturbed.fingerprints[asset, partition].value
        return self.home / "artifacts" / asset / partition / f"{fingerprint}.partial"

    def artifact(self, asset: str, partition: str) -> Path:
        """The folder of a finished artifact."""
        return self.partial(asset, partition).with_suffix("")

    def wait_for(self, asset: str, partition: str, command: Command) -> None:
        """Wait until a command sets about computing an artifact, or has ended."""
        text = f"{asset if partition == ALL else f'{asset} w={partition}'}: computing"
        self.wait(lambda: text in command.output or not command.running, text)

    def wait(self, done: Callable[[], object], what: str) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < deadline, f"waited too long for {what}: {self.tail()}"
            time.sleep(0.01)

    def tail(self) -> str:
        """The end of what each command printed."""
        return "\n".join(f"{command.log.name}: {command.output[-1500:]}" for command in self.commands)

    def problems(self) -> list[str]:
        """Finish the run, undisturbed, and say what is not as it should be."""
        finished = {path: path.read_bytes() for path in self.home.glob("artifacts/*/*/*/manifest.json")}
        last = self.start("run")
        if (code := last.wait()) != 0:
            return [f"the run after the fault ended with {code}"]
        found, expected = snapshot(self.home, self.undisturbed), self.undisturbed.snapshot
        problems = [
            f"{key}: {found.get(key, 'missing')!s:.500} instead of {expected.get(key, 'nothing')!s:.500}"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key) and not (self.damages and DAMAGED.search(key))
        ]
        problems += still_taken(self.home, self.undisturbed.experiment.name)
        if not self.damages:
            problems += [
                f"{path.parent} was finished and is made again"
                for path, manifest in finished.items()
                if path.parent.suffix == "" and path.read_bytes() != manifest
            ]
            interval = max(EXPERIMENT[section]["evaluate_every"] for section in ("sft", "margin_adapter", "modpo"))
            if (again := self.recomputed()["steps"]) > self.deaths * interval:
                problems.append(f"{again} steps were done again after {self.deaths} deaths")
        return problems

    def recomputed(self) -> Counter[str]:
        """Optimizer steps and rows that were computed more than once."""
        again: Counter[str] = Counter()
        for (artifact, kind), count in work_done(self.folder).items():
            again[kind] += max(0, count - self.undisturbed.work[artifact, kind])
        return again

    def close(self) -> None:
        """Leave no process and no mount behind."""
        for command in self.commands:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
        self.cleanup.close()


def snapshot(home: Path, of: Undisturbed) -> dict[str, Any]:
    """What must be the same in every home of the experiment, however it came about."""
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home)
        # Dagster names its files after its runs.
        if name.parts[0] != "dagster":
            found[f"file {name}"] = True
    for path in (*home.glob("dagster/*/.new-*"), *home.glob("dagster/*/.dagster.yaml.*")):
        found[f"file {path.relative_to(home)}"] = True
    store = ArtifactStore(home)
    for (asset, partition), fingerprint in of.fingerprints.items():
        artifact = store.get(asset, partition, fingerprint.value)
        if artifact is not None:
            metrics = {key: value for key, value in artifact.manifest["metrics"].items() if key != "resumed_from"}
            found[f"metrics of {asset} {partition}"] = metrics
            for name in artifact.manifest["files"]:
                # An adapter's configuration and card say in which home it was trained.
                content = artifact.file(name).read_bytes()
                for path in (home, of.home):
                    content = content.replace(str(path).encode(), b"<home>")
                found[f"bytes of {asset} {partition} {name}"] = hashlib.sha256(content).hexdigest()
    with duckdb.connect(home / "warehouse" / "helpsteer.duckdb", read_only=True) as warehouse:
        for (table,) in warehouse.execute("SELECT table_name FROM information_schema.tables").fetchall():
            rows = warehouse.execute(
                f"SELECT * EXCLUDE (run_id) FROM {table}"
                if table != "materializations"
                else f"SELECT experiment, asset, partition, fingerprint FROM {table}"
            ).fetchall()
            found[f"rows of {table}"] = sorted(rows, key=repr)
    with instance_of(home, of.experiment.name) as instance:
        for asset, partition in of.fingerprints:
            key = dg.AssetKey(asset)
            wanted = key if partition == ALL else dg.AssetRecordsFilter(key, asset_partitions=[partition])
            latest = instance.fetch_materializations(wanted, limit=1).records
            version = latest[0].asset_materialization.tags["dagster/data_version"] if latest else None
            found[f"Dagster's version of {asset} {partition}"] = version
    return found


@contextmanager
def instance_of(home: Path, experiment: str) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(dagster_home(home, experiment))) as instance:
        yield instance


def still_taken(home: Path, experiment: str) -> list[str]:
    """Locks that are held, runs that have not ended, slots of pools that are not free."""
    problems = []
    for path in home.rglob("*.lock"):
        with lock_if_free(path) as free:
            if not free:
                problems.append(f"{path} is held")
    with instance_of(home, experiment) as instance:
        problems += [f"run {run.run_id} is {run.status}" for run in instance.get_runs() if not run.is_finished]
        for pool in instance.event_log_storage.get_concurrency_keys():
            slots = instance.event_log_storage.get_concurrency_info(pool)
            if slots.claimed_slots or slots.pending_steps:
                problems.append(f"pool {pool} is not free: {slots}")
    return problems


@dataclass(frozen=True)
class Result:
    """What became of a trial."""

    fault: str
    seed: int
    note: str
    problems: list[str]
    recomputed: Counter[str]
    printed: str
    """The end of what each of its commands printed."""
    folder: Path
    """Kept where the trial failed."""


Fault = Callable[[Trial], None]
FAULTS: dict[str, Fault] = {}
"""Every fault by its name, in the order of the table."""


def fault(name: str) -> Callable[[Fault], Fault]:
    """Register a fault."""

    def register(function: Fault) -> Fault:
        assert name not in FAULTS, f"there are two faults {name!r}"
        FAULTS[name] = function
        return function

    return register


def try_fault(name: str, seed: int, undisturbed: Undisturbed, folder: Path) -> Result:
    """One trial. It survives where the result has no problems."""
    trial = Trial(name, undisturbed, folder, seed, folder / "home")
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.callback(trial.close)
        try:
            FAULTS[name](trial)
            problems = trial.problems()
        except (AssertionError, OSError, ValueError, LookupError, duckdb.Error) as error:
            problems = [f"{type(error).__name__}: {error}"]
        result = Result(name, seed, trial.note, problems, trial.recomputed(), trial.tail(), folder)
    if not problems:
        shutil.rmtree(folder)
    return result

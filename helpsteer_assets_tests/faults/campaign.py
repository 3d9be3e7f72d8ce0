"""One fault at a time on the real graph, the same command again, and a comparison with a run that nothing happened to.

A fault is a function in faults.py. It chooses an artifact, does harm to the command that makes it or to files, and
asserts the promises that are its own; `judge` does the rest. Every random choice comes from `trial.random`, so that a
seed repeats a trial.
"""

import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import yaml

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.execution.executor import MODEL_MODULES, STEP_MODULES
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.store.artifacts import ALL, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.faults.moments import BEFORE_ALL, Moment, note_operations
from helpsteer_assets_tests.processes import descendants

NAME = "faults"
EXPERIMENT: dict[str, Any] = {
    "extends": "demo",
    "name": NAME,
    "data": {"max_train_prompts": 24, "max_validation_prompts": 6},
    "objective": {"weights": [0.1, 0.9]},
    "sft": {"steps": 4, "evaluate_every": 1, "batch_size": 4},
    "margin_adapter": {"steps": 4, "evaluate_every": 2, "batch_size": 4},
    "modpo": {"steps": 6, "evaluate_every": 2, "batch_size": 4},
    "generation": {"max_new_tokens": 12},
    "evaluation": {"prompts": 4, "bootstrap_samples": 100},
    "checks": {"margin_adapter_min_accuracy": 0.0},
}
"""The whole graph, with several checkpoints in each training, in some ten seconds."""

DEADLINE = 300
"""Seconds that anything may take before it counts as hung."""
TRACEBACK = re.compile(r'Traceback|^ +File "', re.MULTILINE)

Key = tuple[str, str]
"""Asset and partition."""
Hook = Callable[[], object]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([*STEP_MODULES, *MODEL_MODULES, "helpsteer_assets.commands.run", __name__])


class Command:
    """A `helpsteer` process, forked from one that has imported the libraries, with a session of its own."""

    def __init__(self, arguments: list[str], log: Path, before: Hook | None) -> None:
        self._log = log
        self._process = _processes.Process(target=_helpsteer, args=(arguments, log, before))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def output(self) -> str:
        """Both streams, as far as it has printed them."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> int:
        """The exit code; the negative number of the signal that killed it."""
        self._process.join(DEADLINE)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"it hung: {self.output[-2000:]}")
        return self._process.exitcode


def _helpsteer(arguments: list[str], log: Path, before: Hook | None) -> None:
    """The command line, as the process that `arguments` would start."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background of a script, and under nohup
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))
    sys.argv = ["helpsteer", *arguments]
    if before is not None:
        before()
    from helpsteer_assets.cli import entry

    entry()


class Undisturbed:
    """A finished run that nothing happened to, made in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.home = folder / "home"
        self.experiment_file = folder / "faults.yaml"
        self.experiment_file.write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
        made = fingerprints(load_experiment(str(self.experiment_file)))
        self.fingerprints: dict[Key, str] = {key: fingerprint.value for key, fingerprint in made.items()}
        """In topological order."""
        noted = partial(note_operations, self.home, folder / "operations")
        command = Command(self.arguments(self.home, "run"), folder / "log", noted)
        assert command.wait() == 0, command.output
        self.operations: dict[str, list[str]] = {}
        """The paths of the run's file operations, by artifact."""
        for line in (folder / "operations").read_text(encoding="utf-8").splitlines():
            artifact, _, path = line.partition("\t")
            self.operations.setdefault(artifact, []).append(path)

    def arguments(self, home: Path, *command: str) -> list[str]:
        return ["-e", str(self.experiment_file), "--home", str(home), *command]


@dataclass
class Trial:
    """One fault, on a home of its own."""

    undisturbed: Undisturbed
    folder: Path
    """Gone when the trial is over and had no problems."""
    home: Path
    random: random.Random
    key: Key = ("", "")
    """The artifact that the fault is about."""
    command: tuple[str, ...] = ("run",)
    """The command that something happens to, and that has to mend it."""
    note: str = ""
    damages: bool = False
    """Whether finished files are harmed: what they belong to may be made again, and lie beside as `.damaged-1`."""
    commands: list[Command] = field(default_factory=list)
    cleanup: ExitStack = field(default_factory=ExitStack)

    def choose(self, *assets: str, finished: bool = False) -> None:
        """Choose an artifact (of some assets), and a command that makes it or, now and then, the whole graph.

        What comes before it is there; with `finished` all is, warehouse and Dagster's records too.
        """
        all_assets = list(dict.fromkeys(asset for asset, _ in self.undisturbed.fingerprints))
        self.key = self.random.choice([k for k in self.undisturbed.fingerprints if not assets or k[0] in assets])
        asset, partition = self.key
        if finished:
            shutil.copytree(self.undisturbed.home, self.home, dirs_exist_ok=True)
        for before in [] if finished else all_assets[: all_assets.index(asset)]:
            shutil.copytree(self.undisturbed.home / "artifacts" / before, self.home / "artifacts" / before)
        if self.random.random() < 0.9:
            self.command = ("run", "--select", asset, *(() if partition == ALL else ("--weights", partition)))
        self.note = f"{asset} {partition} by {' '.join(self.command)}"

    def moment(self, *, resumable: bool = False) -> Moment:
        """A random moment in the making of the artifact, now and then before it; or one when some can be resumed."""
        artifact = BEFORE_ALL if not resumable and self.random.random() < 0.15 else " ".join(self.key)
        paths = self.undisturbed.operations[artifact]
        delay = self.random.choice((0, 0, self.random.uniform(0, 0.5)))
        numbers = range(len(paths))
        if resumable:
            first = next(n for n, path in enumerate(paths) if path.endswith(("complete.json", ".jsonl"))) + 1
            numbers, delay = range(first, next(n for n, path in enumerate(paths) if "manifest.json" in path)), 0
        moment = Moment(artifact, self.random.choice(numbers), delay)
        self.note += f", {moment}"
        return moment

    def start(self, before: Hook | None = None, *, command: tuple[str, ...] = ()) -> Command:
        """Start the command, or another one; `before` is called in its process first."""
        arguments = self.undisturbed.arguments(self.home, *(command or self.command))
        self.commands.append(Command(arguments, self.folder / f"log-{len(self.commands) + 1}", before))
        return self.commands[-1]

    def run(self, before: Hook | None = None, *, command: tuple[str, ...] = ()) -> Command:
        """Run it to its end."""
        started = self.start(before, command=command)
        started.wait()
        return started

    @property
    def partial(self) -> Path:
        """The folder in which the artifact is being made."""
        return ArtifactStore(self.home).partial(*self.key, self.undisturbed.fingerprints[self.key])

    def wait_for(self, done: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < deadline, f"waited too long for {what}"
            time.sleep(0.01)

    def close(self) -> None:
        """Leave no process and no mount behind."""
        for command in self.commands:
            for pid in [*descendants(command.pid), command.pid]:
                if command.running:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self.cleanup.close()


def ends_in_words(command: Command, *words: str) -> bool:
    """Assert that a command ended well, or with an error that has one of the words; True for an error."""
    if (code := command.wait()) == 0:
        return False
    assert code in (1, 2), f"it ended with {code}: {command.output[-3000:]}"
    assert any(word in command.output for word in words), f"it does not say {' or '.join(words)}: {command.output}"
    return True


def judge(trial: Trial) -> list[str]:
    """Give the same command again, undisturbed, and list what is not as in a run that nothing happened to."""
    before = {path: path.read_bytes() for path in trial.home.glob("artifacts/*/*/*[0-9a-f]/manifest.json")}
    unfinished = trial.key != ("", "") and not (trial.partial / "manifest.json").exists()
    began = checkpoint_progress(trial.partial / "checkpoints") if unfinished else None
    last = trial.run()
    if (code := last.wait()) != 0:
        return [f"the command after the fault ended with {code}: {last.output[-3000:]}"]
    problems = [
        f"a traceback: {command.output[-3000:]}" for command in trial.commands if TRACEBACK.search(command.output)
    ]
    keys = list(trial.undisturbed.fingerprints) if trial.command == ("run",) else [trial.key]
    is_now, should_be = (_results(home, trial.undisturbed, keys) for home in (trial.home, trial.undisturbed.home))
    problems += [
        f"{what}: {is_now.get(what, 'missing')!s:.500} instead of {should_be.get(what, 'nothing')!s:.500}"
        for what in sorted(is_now.keys() | should_be.keys())
        if is_now.get(what) != should_be.get(what)
    ]
    left_behind = _names(trial.home) - _names(trial.undisturbed.home)
    problems += [f"left behind: {name}" for name in left_behind if not (trial.damages and ".damaged-" in name)]
    problems += _still_taken(trial.home)
    if not trial.damages:
        problems += [f"{path} was finished, and is made again" for path in before if path.read_bytes() != before[path]]
        if began is not None:
            store, fingerprint = ArtifactStore(trial.home), trial.undisturbed.fingerprints[trial.key]
            artifact = store.find(*trial.key, fingerprint)
            resumed = None if artifact is None else artifact.manifest["metrics"]["resumed_from"]
            if resumed != began[0]:
                problems.append(f"the checkpoint of step {began[0]} was whole, and it went on from {resumed}")
    return problems


def _results(home: Path, undisturbed: Undisturbed, keys: list[Key]) -> dict[str, Any]:
    """What some artifacts hold, and what the tables and Dagster say of them."""
    results: dict[str, Any] = {}
    store = ArtifactStore(home)
    for asset, partition in keys:
        artifact = store.get(asset, partition, undisturbed.fingerprints[asset, partition])
        if artifact is None:
            continue
        metrics = artifact.manifest["metrics"]
        results[f"metrics of {asset} {partition}"] = {k: v for k, v in metrics.items() if k != "resumed_from"}
        for name in artifact.manifest["files"]:
            content = artifact.file(name).read_bytes()
            for path in (home, undisturbed.home):  # an adapter's configuration and card say where it was trained
                content = content.replace(str(path).encode(), b"<home>")
            results[f"bytes of {asset} {partition} {name}"] = hashlib.sha256(content).hexdigest()
    made = [undisturbed.fingerprints[key] for key in keys]
    with duckdb.connect(home / "warehouse" / "helpsteer.duckdb", read_only=True) as warehouse:
        for (table,) in warehouse.execute("SELECT table_name FROM information_schema.tables").fetchall():
            columns = "experiment, asset, partition, fingerprint" if table == "materializations" else "* EXCLUDE run_id"
            rows = warehouse.execute(f"SELECT {columns} FROM {table} WHERE list_contains(?, fingerprint)", [made])
            results[f"rows of {table}"] = sorted(rows.fetchall(), key=repr)
    with dg.DagsterInstance.from_config(str(dagster_home(Home(home), NAME))) as instance:
        for asset, partition in keys:
            wanted = dg.AssetKey(asset)
            latest = instance.fetch_materializations(
                wanted if partition == ALL else dg.AssetRecordsFilter(wanted, asset_partitions=[partition]), limit=1
            ).records
            version = latest[0].asset_materialization.tags["dagster/data_version"] if latest else None
            results[f"Dagster's version of {asset} {partition}"] = version
    return results


def _names(home: Path) -> set[str]:
    """What lies in a home; of Dagster's records and the locks, which are named after runs, what is temporary."""
    names = {path.relative_to(home) for path in home.rglob("*")}
    return {str(n) for n in names if n.parts[0] not in ("dagster", "locks") or re.match(r"\.(new|dagster)", n.name)}


def _still_taken(home: Path) -> list[str]:
    """Runs that have not ended, and slots of pools that are not free, in Dagster's records."""
    with dg.DagsterInstance.from_config(str(dagster_home(Home(home), NAME))) as instance:
        problems = [f"run {run.run_id} is {run.status}" for run in instance.get_runs() if not run.is_finished]
        pools = instance.event_log_storage.get_concurrency_keys()
        slots = [instance.event_log_storage.get_concurrency_info(pool) for pool in pools]
        return problems + [f"a slot is taken: {s}" for s in slots if s.claimed_slots or s.pending_steps]


def try_fault(
    fault: Callable[[Trial], None], seed: str, undisturbed: Undisturbed, folder: Path
) -> tuple[str, list[str]]:
    """What happened in one trial, and its problems: none if the run survived the fault."""
    trial = Trial(undisturbed, folder, folder / "home", random.Random(seed))
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.callback(trial.close)
        try:
            fault(trial)
            problems = judge(trial)
        except (AssertionError, OSError, ValueError, LookupError, duckdb.Error) as error:
            problems = [f"{type(error).__name__}: {error}"]
    if not problems:
        shutil.rmtree(folder)
    return trial.note, problems

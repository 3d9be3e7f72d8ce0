"""The faults: each does its harm to a trial. What must hold afterwards is said by `judge` in campaign.py."""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from helpsteer_assets.execution.dagster_home import make_dagster_home
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.faults.campaign import NAME, Trial, ends_in_words, fault
from helpsteer_assets_tests.faults.moments import act_at, cut_power_at, kill
from helpsteer_assets_tests.processes import descendants

TRAININGS = ("sft_model", "margin_adapter", "modpo_models")
RESUMABLE = (*TRAININGS, "reference_log_probs", "margin_rewards", "sft_generations", "generations")
PAGE = 4096

# The process dies or is told to end.


@fault("killed")
def killed(trial: Trial) -> None:
    trial.choose()
    trial.run(partial(act_at, trial.home, trial.moment(), kill))


@fault("killed three times in one training")
def killed_three_times(trial: Trial) -> None:
    trial.choose(*TRAININGS)
    for _ in range(3):
        trial.run(partial(act_at, trial.home, trial.moment(), kill))


@fault("power cut")
def power_cut(trial: Trial) -> None:
    trial.choose()
    trial.run(partial(cut_power_at, trial.home, trial.moment(), trial.random.getrandbits(32)))


@fault("told to end")
def told_to_end(trial: Trial) -> None:
    """By Ctrl-C, `kill` or the closed terminal, to which nothing can be said any more."""
    trial.choose()
    number = trial.random.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    trial.note += f", {number.name}"
    code = trial.run(partial(act_at, trial.home, trial.moment(), partial(tell_to_end, number))).wait()
    assert code in (0, 128 + number), f"it ended with {code}"


def tell_to_end(number: int) -> None:
    if number == signal.SIGHUP:
        reading, writing = os.pipe()
        os.close(reading)
        for stream in (1, 2):
            os.dup2(writing, stream)
    os.kill(os.getpid(), number)


# Files are damaged.


def harm(file: Path, others: Iterable[Path], chance: random.Random) -> str:
    """Damage a file, and say how."""
    content = file.read_bytes()
    swappable = [other for other in others if other.suffix == file.suffix and other.read_bytes() != content]
    kind = chance.choice(("cut short", "a bit flipped", "removed", *(("swapped",) if swappable else ())))
    if kind == "cut short":
        os.truncate(file, chance.randrange(len(content)))
    elif kind == "a bit flipped":  # the file's times stay as they were, as where a disk rots: only its content tells
        times = file.stat()
        position = chance.randrange(len(content))
        file.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << chance.randrange(8)]) + content[position + 1 :]
        )
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif kind == "removed":
        file.unlink()
    else:
        other = chance.choice(swappable)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{file} and {other} swapped"
    return f"{file}: {kind}"


def files_below(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@fault("a damaged artifact")
def damaged_artifact(trial: Trial) -> None:
    """It is set aside and made again."""
    trial.choose(finished=True)
    trial.damages = True
    folder = trial.partial.with_suffix("")
    files = files_below(folder)
    trial.note = harm(trial.random.choice(files), files, trial.random)
    command = trial.run()
    assert f"{folder} is damaged and set aside" in command.output, command.output
    assert folder.with_name(f"{folder.name}.damaged-1").is_dir()


@fault("damaged unfinished work")
def damaged_work(trial: Trial) -> None:
    """A checkpoint, or finished rows: the work goes on from what comes before."""
    trial.choose(*RESUMABLE)
    trial.damages = True
    trial.run(partial(act_at, trial.home, trial.moment("resumable"), kill))
    files = files_below(trial.partial / "checkpoints")
    assert files, "nothing was finished"
    trial.note += f", {harm(trial.random.choice(files), files, trial.random)}"


@fault("damaged records")
def damaged_records(trial: Trial) -> None:
    """Of the warehouse, digests, locks: reading goes on, or says why not."""
    trial.choose(finished=True)
    trial.command = ("run",)
    files = files_below(*(trial.home / name for name in ("warehouse", "cache", "locks")))
    trial.note = harm(trial.random.choice(files), files, trial.random)
    for command in (("status",), ("query", "SELECT * FROM scores")):
        ends_in_words(trial.run(command=command), "error:")


# The disk or its permissions refuse.

FULL = ("No space left on device", "disk is full", "free some")
TOO_LARGE = ("File too large", "Input/output error")  # SQLite and torch do not say why they cannot write
DENIED = ("Permission denied", "readonly database", "unable to open database file")
READ_ONLY = ("Read-only file system", "readonly database")


@cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs: root may, and whoever is root in `unshare --user --map-root-user -m`."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return tried.returncode == 0


def mount_home(trial: Trial) -> Path:
    """Put the home on a small file system of its own, which is returned."""
    disk = trial.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    trial.cleanup.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
    trial.home = disk / "home"
    trial.home.mkdir()
    return disk


def full_disk(trial: Trial) -> None:
    """Others fill the disk, to the last page or to a few."""
    disk = mount_home(trial)
    trial.choose()
    pages = trial.random.choice((0, 0, 1, 2, 8, 32, 128))
    trial.note += f", {pages} pages left"
    ends_in_words(trial.run(partial(act_at, trial.home, trial.moment(), partial(fill, disk, pages))), *FULL)
    (disk / "ballast").unlink(missing_ok=True)


def fill(disk: Path, pages: int) -> None:
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, os.statvfs(disk).f_bavail - pages) * PAGE)


def read_only_disk(trial: Trial) -> None:
    """It is still read from."""
    disk = mount_home(trial)
    trial.choose(finished=True)
    shutil.rmtree(trial.partial.with_suffix(""))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    query = trial.run(command=("query", "--format", "csv", "SELECT count(DISTINCT w) FROM scores"))
    assert query.wait() == 0 and query.output.split()[-1] == "2", query.output
    status = trial.run(command=("status",))
    assert status.wait() == 0 and "complete" in status.output, status.output
    assert ends_in_words(trial.run(), *READ_ONLY)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


if can_mount():
    fault("a full disk")(full_disk)
    fault("a read-only disk")(read_only_disk)


@fault("a limit on the size of files")
def file_size_limit(trial: Trial) -> None:
    """As with a quota, the smaller files can be written and the larger cannot."""
    trial.choose()
    limit = PAGE * round(2 ** trial.random.uniform(0, 8))
    trial.note += f", no file over {limit} bytes"
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    ends_in_words(trial.run(partial(act_at, trial.home, trial.moment(), limited)), *TOO_LARGE)


@fault("permissions lost")
def permissions_lost(trial: Trial) -> None:
    """Of a folder of the home, or of a file."""
    trial.choose()
    seed = trial.random.getrandbits(32)
    modes = trial.folder / "modes"
    command = trial.run(partial(lose_permissions_at, trial.home, trial.moment(), seed, modes))
    ends_in_words(command, *DENIED)
    if modes.exists():
        path, mode = modes.read_text(encoding="utf-8").splitlines()
        trial.note += f", {path}"
        with suppress(FileNotFoundError):
            Path(path).chmod(int(mode))


def lose_permissions_at(home: Path, moment: object, seed: int, noted: Path) -> None:
    obey_permissions()
    act_at(home, moment, partial(lose_permissions, home, random.Random(seed), noted))


def lose_permissions(home: Path, chance: random.Random, noted: Path) -> None:
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    path = chance.choice(sorted(folders if chance.random() < 0.8 else files_below(home) or folders))
    noted.write_text(f"{path}\n{path.stat().st_mode & 0o777}\n", encoding="utf-8")
    path.chmod(chance.choice((0o555 if path.is_dir() else 0o444, 0o000)))


def obey_permissions() -> None:
    """Make permission bits count for this process, were it root's."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))

    class Capabilities(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc = ctypes.CDLL(None, use_errno=True)
    header, capabilities = Header(0x20080522, 0), (Capabilities * 2)()
    assert libc.capget(ctypes.byref(header), capabilities) == 0, os.strerror(ctypes.get_errno())
    capabilities[0].effective &= ~0b1111  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER
    capabilities[0].permitted &= ~0b1111
    assert libc.capset(ctypes.byref(header), capabilities) == 0, os.strerror(ctypes.get_errno())


# Several processes at once.


@fault("commands at once")
def commands_at_once(trial: Trial) -> None:
    """One makes each artifact, the others wait and reuse it."""
    trial.choose()
    commands = []
    for _ in range(trial.random.choice((2, 3))):
        commands.append(trial.start())
        time.sleep(trial.random.choice((0, 0, 1)))
    for command in commands:
        assert command.wait() == 0, f"it ended with {command.wait()}: {command.output}"
    label = f"{trial.key[0]} w={trial.key[1]}" if "." in trial.key[1] else trial.key[0]
    computed = sum(f"{label}: computing" in command.output for command in commands)
    assert computed == 1, f"{computed} processes computed it"


@fault("the maker of what others wait for is slow, or killed")
def slow_maker(trial: Trial) -> None:
    """A living process's work is never taken from it, however long it is silent; that of a dead one is, at once."""
    trial.choose()
    trial.command = ("run", "--select", trial.key[0])
    place = trial.folder
    maker = trial.start(partial(act_at, trial.home, trial.moment("making"), partial(stand_still, place)))
    trial.wait_for(lambda: (place / "stands").exists() or not maker.running, "the maker to stand still")
    waiting = trial.start()
    trial.wait_for(lambda: "waiting for" in waiting.output or not waiting.running, "the second to wait")
    time.sleep(2)
    assert maker.running and waiting.running, f"{maker.output}\n{waiting.output}"
    dies = trial.random.random() < 0.5
    trial.note += f", {'killed' if dies else 'slow'}"
    if dies:
        maker.send(signal.SIGKILL)
    (place / "go").touch()
    assert dies or maker.wait() == 0, maker.output
    assert waiting.wait() == 0, waiting.output
    assert dies or ": reused" in waiting.output, waiting.output


def stand_still(place: Path) -> None:
    """Keep the thread where it is until it may go. (A process stopped by SIGSTOP could hold a lock of SQLite's.)"""
    (place / "stands").touch()
    while not (place / "go").exists():
        time.sleep(0.05)


@fault("a job of the UI dies in a training")
def job_dies(trial: Trial) -> None:
    """The process that Dagster runs a job in, and with it, or not, that of the step: the next command ends the run's
    record, waits for what still trains, and goes on from the checkpoint of what does not."""
    trial.choose("modpo_models")
    job = start_job(trial)
    trial.wait_for(lambda: job.poll() is not None or checkpoint_progress(trial.partial / "checkpoints"), "a checkpoint")
    assert job.poll() is None, (trial.folder / "job.log").read_text(encoding="utf-8")[-3000:]
    steps = descendants(job.pid) if trial.random.random() < 0.5 else []
    trial.note += ", with the step" if steps else ", without the step"
    for pid in (job.pid, *steps):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()


def start_job(trial: Trial) -> subprocess.Popen[bytes]:
    """A run of one weight in a process of its own, with steps in theirs, as the UI launches it."""
    job = ["job", "execute", "-m", "helpsteer_assets.definitions", "-j", "tradeoff_grid"]
    environment = {
        "HELPSTEER_HOME": str(trial.home),
        "HELPSTEER_EXPERIMENT": str(trial.undisturbed.experiment_file),
        "DAGSTER_HOME": str(make_dagster_home(Home(trial.home), NAME)),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with (trial.folder / "job.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", *job, "--tags", f'{{"dagster/partition": "{trial.key[1]}"}}'],
            env=os.environ | environment,
            stdout=log,
            stderr=log,
        )
    trial.cleanup.callback(process.kill)
    return process


# The home lies elsewhere.

NAMES = (
    "a home",
    "[x]*",
    "w=1",
    "a,b",
    "{a}",
    "$HOME",
    "a#b",
    "-home",
    "~",
    "a;b",
    "a:b",
    "a&b",
    "it's",
    'a"b',
    "ü☃",
    "line\nbreak",
)


@fault("a home of an odd name, moved after a death")
def odd_home(trial: Trial) -> None:
    trial.home = trial.folder / "before"
    trial.choose()
    trial.run(partial(act_at, trial.home, trial.moment(), kill))
    moved = trial.folder / trial.random.choice(NAMES)
    trial.note += f", moved to {moved.name!r}"
    if trial.home.exists():
        trial.home.rename(moved)
    trial.home = moved

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from helpsteer_assets.execution.dagster_home import make_dagster_home
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.faults.campaign import NAME, Trial, ends_in_words
from helpsteer_assets_tests.faults.moments import Moment, act_at, cut_power_at, kill
from helpsteer_assets_tests.processes import descendants

TRAININGS = ("sft_model", "margin_adapter", "modpo_models")
RESUMABLE = (*TRAININGS, "reference_log_probs", "margin_rewards", "sft_generations", "generations")
PAGE = 4096

# The process dies or is told to end.


def killed(trial: Trial) -> None:
    trial.choose()
    trial.run(partial(act_at, trial.home, trial.moment(), kill))


def killed_three_times(trial: Trial) -> None:
    trial.choose(*TRAININGS)
    for _ in range(3):
        trial.run(partial(act_at, trial.home, trial.moment(), kill))


def power_cut(trial: Trial) -> None:
    trial.choose()
    trial.run(partial(cut_power_at, trial.home, trial.moment(), trial.random.getrandbits(32)))


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
    content, times = file.read_bytes(), file.stat()
    swappable = [other for other in others if other.suffix == file.suffix and other.read_bytes() != content]
    kind = chance.choice(("cut short", "a bit flipped", "removed", *(("swapped",) if swappable else ())))
    if kind == "cut short":
        os.truncate(file, chance.randrange(len(content)))
    elif kind == "a bit flipped":  # the file's times stay as they were, as where a disk rots: only its content tells
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif kind == "removed":
        file.unlink()
    else:
        other = chance.choice(swappable)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        kind += f" with {other}"
    return f"{file}: {kind}"


def files_below(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


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


def damaged_work(trial: Trial) -> None:
    """A checkpoint, or finished rows: the work goes on from what comes before."""
    trial.choose(*RESUMABLE)
    trial.damages = True
    for _ in range(3):  # a few operations more than in the undisturbed run, and nothing is finished yet
        trial.run(partial(act_at, trial.home, trial.moment(resumable=True), kill))
        if files := files_below(trial.partial / "checkpoints"):
            break
    assert files, "nothing was finished"
    trial.note += f", {harm(trial.random.choice(files), files, trial.random)}"


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


def file_size_limit(trial: Trial) -> None:
    """As with a quota, the smaller files can be written and the larger cannot."""
    trial.choose()
    limit = PAGE * round(2 ** trial.random.uniform(0, 8))
    trial.note += f", no file over {limit} bytes"
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    ends_in_words(trial.run(partial(act_at, trial.home, trial.moment(), limited)), *TOO_LARGE)


def permissions_lost(trial: Trial) -> None:
    """Of a folder of the home, or of a file."""
    trial.choose()
    seed = trial.random.getrandbits(32)
    ends_in_words(trial.run(partial(lose_permissions_at, trial.home, trial.moment(), seed)), *DENIED)
    if trial.home.exists():
        subprocess.run(["chmod", "-R", "u+rwX", trial.home], check=True)


def lose_permissions_at(home: Path, moment: Moment, seed: int) -> None:
    chance = random.Random(seed)

    def lose_permissions() -> None:
        folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
        path = chance.choice(sorted(folders if chance.random() < 0.8 else files_below(home) or folders))
        path.chmod(chance.choice((0o555 if path.is_dir() else 0o444, 0o000)))

    # Permission bits count for root too, once it gives up CAP_CHOWN, CAP_DAC_* and CAP_FOWNER.
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, capabilities) == 0
    capabilities[0] &= ~0b1111  # effective
    capabilities[1] &= ~0b1111  # permitted
    assert libc.capset(header, capabilities) == 0
    act_at(home, moment, lose_permissions)


# Several processes at once.


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

NAMES = ("a home", "[x]*", "w=1", "a,b", "{a}", "$HOME", "a#b", "-home", "~", "a;b", "it's", 'a"b', "ü☃", "line\nbreak")


def odd_home(trial: Trial) -> None:
    trial.home = trial.folder / "before"
    trial.choose()
    trial.run(partial(act_at, trial.home, trial.moment(), kill))
    moved = trial.folder / trial.random.choice(NAMES)
    trial.note += f", moved to {moved.name!r}"
    if trial.home.exists():
        trial.home.rename(moved)
    trial.home = moved


FAULTS: dict[str, tuple[Callable[[Trial], None], tuple[int, ...]]] = {
    "killed": (killed, (1, 2, 5)),
    "killed three times in one training": (killed_three_times, (2,)),
    "power cut": (power_cut, (0, 1)),
    "told to end": (told_to_end, (0, 1, 5)),
    "a damaged artifact": (damaged_artifact, (2,)),
    "damaged unfinished work": (damaged_work, (3, 11)),
    "damaged records": (damaged_records, (0,)),
    "a full disk": (full_disk, (1, 5)),
    "a read-only disk": (read_only_disk, (0,)),
    "a limit on the size of files": (file_size_limit, (3,)),
    "permissions lost": (permissions_lost, (0,)),
    "commands at once": (commands_at_once, (4,)),
    "a job of the UI dies in a training": (job_dies, (1,)),
    "a home of an odd name, moved after a death": (odd_home, (1,)),
}
"""Each with the seeds that every run of the tests tries."""

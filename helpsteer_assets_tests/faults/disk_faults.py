"""The disk is full, or full up to a limit on the size of files."""

import os
import resource
from functools import partial
from pathlib import Path

from helpsteer_assets_tests.faults.campaign import Trial, fault
from helpsteer_assets_tests.faults.homes import can_mount, mount_home, says_what_is_wrong, wait_or_end

PAGE = 4096
FULL = ("No space left on device", "disk is full", "free some")
"""What a run says that meets a full disk, or sees before that there will be no room."""


def small_disk(trial: Trial) -> None:
    """Little space is left when the run starts: it ends wherever the disk is full."""
    asset = trial.random.choice(trial.assets)
    disk = mount_home(trial)
    trial.begin_with(asset)
    # Mostly less than the rest of the run takes, and often less than its first file does.
    pages = round(2 ** trial.random.uniform(0, 10))
    fill(disk, pages)
    trial.note = f"{pages} pages of disk for {asset} and what follows"
    says_what_is_wrong(trial.run("run"), *FULL)
    trial.deaths = 1
    (disk / "ballast").unlink()


def filling_disk(trial: Trial) -> None:
    """The disk is filled by others while one artifact is made."""
    asset, partition = trial.random.choice(list(trial.undisturbed.fingerprints))
    disk = mount_home(trial)
    trial.begin_with(asset)
    command = trial.start("run")
    folder = trial.partial(asset, partition)
    wanted = trial.random.choice(("", "checkpoints"))
    wait_or_end(trial, command, (folder / wanted).exists, f"{asset} to begin")
    pages = trial.random.choice((0, 0, 1, 2, 8, 32, 128))
    fill(disk, pages)
    trial.note = f"{pages} pages of disk left in the middle of {asset} {partition}"
    says_what_is_wrong(command, *FULL)
    trial.deaths = 1  # It costs the steps since the last checkpoint.
    (disk / "ballast").unlink()


def fill(disk: Path, pages: int) -> None:
    """Write a file that leaves so many pages free."""
    with (disk / "ballast").open("wb") as file:
        free = os.statvfs(disk).f_bavail
        os.posix_fallocate(file.fileno(), 0, max(1, free - pages) * PAGE)


if can_mount():
    fault("a disk too small")(small_disk)
    fault("a disk filled in mid-run")(filling_disk)


@fault("a limit on the size of files")
def file_size_limit(trial: Trial) -> None:
    """As a quota does, `ulimit -f` lets the smaller files be written and the larger not."""
    asset = trial.random.choice(trial.assets)
    trial.begin_with(asset)
    limit = PAGE * round(2 ** trial.random.uniform(3, 10))
    trial.note = f"no file over {limit} bytes, with what comes before {asset} there"
    # SQLite and torch do not say why they cannot write.
    says_what_is_wrong(trial.run("run", before=partial(limit_files, limit)), "File too large", "Input/output error")
    trial.deaths = 1


def limit_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

"""Permissions of folders and files of a home are lost, or the whole file system turns read-only."""

import os
from contextlib import suppress
from pathlib import Path

from helpsteer_assets_tests.faults.campaign import Trial, fault
from helpsteer_assets_tests.faults.homes import (
    can_mount,
    finished_home,
    forget,
    mount_home,
    obey_permissions,
    remount,
    says_what_is_wrong,
    wait_or_end,
)

DENIED = ("Permission denied", "readonly database", "unable to open database file")
READ_ONLY = ("Read-only file system", "readonly database")


@fault("permission lost")
def permission_lost(trial: Trial) -> None:
    """A folder or file is made read-only or inaccessible before a run."""
    finished_home(trial)
    asset = trial.random.choice(trial.assets)
    forget(trial, *trial.assets[trial.assets.index(asset) :])
    deny_one(trial, trial.home, f"before {asset} is made")
    says_what_is_wrong(trial.run("status", before=obey_permissions), *DENIED)
    says_what_is_wrong(trial.run("query", "SELECT count(*) FROM scores", before=obey_permissions), *DENIED)
    says_what_is_wrong(trial.run("run", before=obey_permissions), *DENIED)
    trial.cleanup.pop_all().close()


@fault("permission lost in mid-run")
def permission_lost_in_mid_run(trial: Trial) -> None:
    """The same while an artifact is being made."""
    asset, partition = trial.random.choice(list(trial.undisturbed.fingerprints))
    trial.begin_with(asset)
    command = trial.start("run", before=obey_permissions)
    folder = trial.partial(asset, partition)
    wait_or_end(trial, command, folder.exists, f"{asset} to begin")
    inside = folder if trial.random.random() < 0.4 and folder.exists() else trial.home
    deny_one(trial, inside, f"while {asset} {partition} is made")
    says_what_is_wrong(command, *DENIED)
    trial.deaths = 1
    trial.cleanup.pop_all().close()


def deny_one(trial: Trial, root: Path, when: str) -> None:
    """Take the permissions of a random folder, or now and then a file, until the trial's clean-up."""
    files_too = trial.random.random() < 0.2
    found = [Path(folder, name) for folder, _, names in os.walk(root) for name in ("", *(names if files_too else ()))]
    path = trial.random.choice(sorted(found))
    without = trial.random.choice((0o555 if path.is_dir() else 0o444, 0o000))
    trial.note = f"{path.relative_to(trial.home)} has the permissions {without:o} {when}"
    # In mid-run it may have gone since.
    with suppress(FileNotFoundError):
        trial.cleanup.callback(give_back, path, path.stat().st_mode)
        path.chmod(without)


def give_back(path: Path, mode: int) -> None:
    if path.exists():
        path.chmod(mode)


def read_only_home(trial: Trial) -> None:
    """A home on a file system that cannot be written to is still read from."""
    disk = mount_home(trial)
    finished_home(trial)
    asset = trial.random.choice(trial.assets)
    forget(trial, asset)
    trial.note = f"read-only, {asset} to be made"
    assert remount(disk, "ro")
    rows = sum(key[0] == "scores" for key in trial.undisturbed.fingerprints)
    query = trial.run("query", "--format", "json", "SELECT count(DISTINCT w) AS weights FROM scores")
    assert query.wait() == 0 and f'"weights": {rows}' in query.output, query.output
    status = trial.run("status")
    assert status.wait() == 0 and "complete" in status.output, status.output
    assert says_what_is_wrong(trial.run("run"), *READ_ONLY)
    assert remount(disk, "rw")


def turned_read_only(trial: Trial) -> None:
    """What Linux does to a file system with errors: from one moment to the next nothing can be written."""
    asset, partition = trial.random.choice(list(trial.undisturbed.fingerprints))
    disk = mount_home(trial)
    trial.begin_with(asset)
    command = trial.start("run")
    wait_or_end(trial, command, trial.partial(asset, partition).exists, f"{asset} to begin")
    # Refused while a file is open for writing.
    wait_or_end(trial, command, lambda: remount(disk, "ro"), "the file system to turn read-only")
    trial.note = f"read-only from the middle of {asset} {partition}"
    says_what_is_wrong(command, *READ_ONLY)
    trial.deaths = 1
    assert remount(disk, "rw")


if can_mount():
    fault("a read-only file system")(read_only_home)
    fault("a file system turned read-only")(turned_read_only)

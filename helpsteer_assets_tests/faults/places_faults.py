"""Homes that are moved, linked to, or oddly named."""

import signal

from helpsteer_assets_tests.faults.campaign import Trial, fault
from helpsteer_assets_tests.faults.homes import finished_home, forget

NAMES = ("a home", "[x]*", "w=1", "a,b", "{a}", "$HOME", "a#b", "-home", "~", "a;b", "a:b", "a&b", "a.partial")
ESCAPED_NAMES = ("it's", 'a"b', "ü☃", "א ב", "line\nbreak")
"""Which JSON escapes: what holds the home's path in it differs from an undisturbed home's."""


@fault("a home that was moved")
def moved_home(trial: Trial) -> None:
    """It is found whole at its new path, also what a killed run left there."""
    asset = trial.random.choice(trial.assets)
    following = trial.assets[trial.assets.index(asset) :]
    trial.note = f"moved after a death in {asset}"
    new, trial.home = trial.home, trial.folder / "old"
    finished_home(trial)
    forget(trial, *following)
    command = trial.start("run")
    partial = trial.home / "artifacts" / asset
    trial.wait(lambda: next(partial.glob("*/*.partial"), None), f"{asset} to begin")
    command.send(signal.SIGKILL)
    trial.deaths = 1
    # What was trained at the old path says so in its model card, which no other home's does.
    trial.home.rename(new)
    trial.home = new
    query = trial.run("query", "--format", "csv", "SELECT count(DISTINCT split) FROM preference_pairs")
    assert query.wait() == 0 and query.output.split()[-1] == "3", query.output


@fault("a home that is a symbolic link")
def linked_home(trial: Trial) -> None:
    asset = trial.random.choice(trial.assets)
    trial.note = f"with what comes before {asset} there"
    (trial.folder / "elsewhere").mkdir()
    trial.home.symlink_to(trial.folder / "elsewhere")
    trial.begin_with(asset)


@fault("an oddly named home")
def odd_name(trial: Trial) -> None:
    name = trial.random.choice((*NAMES, *ESCAPED_NAMES))
    asset = trial.random.choice(
        trial.assets if name in NAMES else trial.assets[trial.assets.index("sft_generations") :]
    )
    trial.note = f"named {name!r}, with what comes before {asset} there"
    trial.home = trial.folder / name
    trial.begin_with(asset)
    command = trial.run("run")
    assert command.wait() == 0, command.output
    query = trial.run("query", "--format", "csv", "SELECT count(DISTINCT w) FROM scores")
    assert query.wait() == 0 and query.output.split()[-1] == "2", query.output
    status = trial.run("status", "--json")
    assert status.wait() == 0 and status.output.count('"complete"') == len(trial.undisturbed.fingerprints), (
        status.output
    )

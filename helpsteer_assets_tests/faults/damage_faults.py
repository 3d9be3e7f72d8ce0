"""Files that are cut short, bit-flipped, missing or swapped: finished artifacts, unfinished work, the warehouse.

A flipped bit leaves the file's times as they were, as it does where a disk rots: only its content tells.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path
from random import Random

from helpsteer_assets.files.rows import ResumableRows
from helpsteer_assets.store.artifacts import MANIFEST
from helpsteer_assets_tests.faults.campaign import Trial, fault
from helpsteer_assets_tests.faults.homes import TRACEBACK, finished_home, says_what_is_wrong

TRAININGS = ("sft_model", "margin_adapter", "modpo_models")
SCORINGS = ("reference_log_probs", "margin_rewards", "sft_generations", "generations", "sft_scores", "scores")


def harm(file: Path, others: list[Path], random: Random) -> tuple[str, list[Path]]:
    """Damage a file; what was done, and the files that it was done to."""
    content = file.read_bytes()
    swappable = [other for other in others if other.read_bytes() != content]
    kind = random.choice(("cut short", "a bit flipped", "removed", *(("swapped",) if swappable else ())))
    if kind == "cut short":
        os.truncate(file, random.randrange(len(content)))
    elif kind == "a bit flipped":
        times = file.stat()
        flipped = bytearray(content)
        flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
        with file.open("r+b") as opened:
            opened.write(flipped)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif kind == "removed":
        file.unlink()
    else:
        other = random.choice(swappable)
        aside = file.with_name("swapped")
        file.rename(aside)
        other.rename(file)
        aside.rename(other)
        return f"{file} and {other} swapped", [file, other]
    return f"{file}: {kind}", [file]


@fault("a damaged artifact")
def damaged_artifact(trial: Trial) -> None:
    """It is set aside and made again; nothing else is."""
    finished_home(trial)
    files = sorted(path for path in trial.home.glob("artifacts/**/*") if path.is_file())
    manifests = {path: path.read_bytes() for path in files if path.name == MANIFEST}
    file = trial.random.choice(files)
    trial.note, harmed = harm(file, [path for path in files if path.suffix == file.suffix], trial.random)
    trial.damages = True
    damaged = {
        folder for folder in (path.parent for path in manifests) if any(folder in path.parents for path in harmed)
    }
    assert trial.run("status").wait() == 0
    if trial.random.random() < 0.3:
        says_what_is_wrong(trial.run("run", "--select", "tradeoff"), "materialize it first")
    command = trial.run("run")
    assert command.wait() == 0 and not TRACEBACK.search(command.output), command.output
    for manifest, content in manifests.items():
        folder = manifest.parent
        if folder not in damaged:
            assert manifest.read_bytes() == content, f"{folder} was whole, and was made again"
        else:
            assert folder.with_name(f"{folder.name}.damaged-1").is_dir(), f"{folder} was not set aside"
            told = "".join(earlier.output for earlier in trial.commands)
            assert f"{folder} is damaged and set aside" in told, told


@fault("a damaged checkpoint")
def damaged_checkpoint(trial: Trial) -> None:
    """The training goes on from the one before it."""
    asset, partition = trial.random.choice([key for key in trial.undisturbed.fingerprints if key[0] in TRAININGS])
    trial.begin_with(asset)
    command = trial.start("run", "--select", asset)
    checkpoints = trial.partial(asset, partition) / "checkpoints"

    def complete() -> list[Path]:
        found = [path.parent for path in checkpoints.glob("checkpoint-*/complete.json")]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    trial.wait(lambda: len(complete()) >= 2 or not command.running, "checkpoints")
    command.send(signal.SIGKILL)
    found = complete()
    assert len(found) >= 2, f"{asset} had ended: {command.output[-1000:]}"
    *_, before, newest = found
    files = sorted(path for path in newest.iterdir() if path.is_file())
    file = trial.random.choice(files)
    trial.note, _ = harm(file, files, trial.random)
    trial.deaths = 2  # The fall back costs what another death would.
    command = trial.run("run", "--select", asset)
    assert command.wait() == 0 and not TRACEBACK.search(command.output), command.output
    if (newest / "complete.json") != file or file.exists():
        assert f"{newest.name} is damaged" in command.output, command.output
    manifest = json.loads((trial.artifact(asset, partition) / MANIFEST).read_bytes())
    assert manifest["metrics"]["resumed_from"] == int(before.name.partition("-")[2]), manifest["metrics"]


@fault("damaged rows of unfinished work")
def damaged_rows(trial: Trial) -> None:
    """What comes before the damage is used, and what comes after it is computed again."""
    asset = trial.random.choice(SCORINGS)
    trial.begin_with(asset)
    batches = trial.random.choice((1, 1, 2))
    trial.run("run", "--select", asset, before=partial(die_after_batches, batches))
    left = sorted(trial.home.glob("artifacts/*/*/*.partial/checkpoints/*.jsonl"))
    trial.note = f"{asset} was done before batch {batches} was"
    if left:
        done, _ = harm(trial.random.choice(left), [], trial.random)
        trial.note = f"after batch {batches}: {done}"


def die_after_batches(batches: int) -> None:
    append = ResumableRows.append
    appended = 0

    def appending(self: ResumableRows, rows: list[dict[str, object]]) -> None:
        nonlocal appended
        append(self, rows)
        appended += 1
        if appended == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    ResumableRows.append = appending  # type: ignore[method-assign]


@fault("a damaged registry")
def damaged_registry(trial: Trial) -> None:
    """Status and query go on; the next run makes it whole."""
    finished_home(trial)
    files = sorted(trial.home.glob("warehouse/registry/*/*/*.json"))
    trial.note, _ = harm(trial.random.choice(files), files, trial.random)
    look_at(trial)


@fault("a damaged publication")
def damaged_publication(trial: Trial) -> None:
    """The published database, or what is noted of it."""
    finished_home(trial)
    warehouse = trial.home / "warehouse"
    file = trial.random.choice((warehouse / "helpsteer.duckdb", warehouse / "published.json"))
    trial.note, _ = harm(file, [], trial.random)
    look_at(trial)


@fault("damaged notes")
def damaged_notes(trial: Trial) -> None:
    """What a home can do without: remembered digests, names of lock holders."""
    finished_home(trial)
    files = sorted(path for folder in ("cache", "locks") for path in (trial.home / folder).rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size]
    trial.note, _ = harm(trial.random.choice(files), files, trial.random)
    look_at(trial)


def look_at(trial: Trial) -> None:
    """Status and query end well, or in words."""
    says_what_is_wrong(trial.run("status"), "error:")
    says_what_is_wrong(trial.run("query", "SELECT * FROM scores"), "error:")

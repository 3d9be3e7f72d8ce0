"""The checkpoints of a training, and which of them it can resume from. Imports no torch: `helpsteer status` reads it.

transformers writes `checkpoint-<step>` folders file by file. A checkpoint is complete when `complete.json` lies in it:
that is written last and holds the size and sha256 of every other file. The next attempt deletes incomplete and damaged
checkpoints. A training resumes from the newest intact checkpoint, if the best checkpoint of that time is intact, too.
To make that likely, the last two checkpoints and the best one of each are kept. Older ones are deleted only after a new
one is complete.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpsteer_assets.files.digests import is_intact, listing, sealed

COMPLETE = "complete.json"

logger = logging.getLogger(__name__)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The folder that transformers writes the checkpoint of a step into."""
    return folder / f"checkpoint-{step}"


def mark_complete(checkpoint: Path, step: int, steps: int, *, best: int | None = None, finished: bool = False) -> None:
    """Mark a checkpoint as complete; all of its files must have been written.

    Args:
        checkpoint: its folder.
        step: optimizer steps done.
        steps: optimizer steps of the whole training.
        best: step of the best checkpoint so far; None: this one.
        finished: whether the training ends here, at its last step or stopped early.
    """
    files = listing(checkpoint, sorted(path.name for path in checkpoint.iterdir()))
    for path in [*checkpoint.iterdir(), checkpoint]:
        # Otherwise, if the machine dies, complete.json may be on the disk and the other files not.
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    content = {"step": step, "of": steps, "best": best or step, "finished": finished, "files": files}
    partial = checkpoint / f"{COMPLETE}.partial"
    partial.write_text(json.dumps(sealed(content)), encoding="utf-8")
    partial.rename(checkpoint / COMPLETE)


def damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint, told by sizes and sha256; None if it is intact."""
    complete = _read(checkpoint)
    if complete is None or complete["step"] != step_of(checkpoint):
        return f"{COMPLETE} is missing or damaged"
    for name, entry in complete["files"].items():
        if not (checkpoint / name).is_file() or listing(checkpoint, [name]) != {name: entry}:
            return f"{name} is missing or not as it was written"
    return None


def is_finished(checkpoint: Path) -> bool:
    """Whether a training ended with this checkpoint."""
    complete = _read(checkpoint)
    return complete is not None and bool(complete["finished"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from, or None. Removes incomplete and damaged ones, and all that are newer."""
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)  # the process died while it wrote or removed it
        elif (problem := damage(checkpoint)) is not None:
            logger.warning("%s is damaged and thrown away: %s", checkpoint, problem)
            _remove(checkpoint)
        else:
            whole[step_of(checkpoint)] = checkpoint
    for step, checkpoint in sorted(whole.items(), reverse=True):
        complete = _read(checkpoint)
        if complete is not None and complete["best"] in whole:
            return checkpoint
        logger.warning("%s is thrown away: the best checkpoint before it is gone", checkpoint)
        _remove(whole.pop(step))
    return None


def prune(folder: Path) -> None:
    """Delete all checkpoints but the newest two and the best one of each."""
    newest = sorted(_complete(folder), key=lambda entry: int(entry["step"]))[-2:]
    kept = {entry[key] for entry in newest for key in ("step", "best")}
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in kept:
            _remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_progress(folder: Path) -> tuple[int, int] | None:
    """Step of the newest complete checkpoint and the steps of the whole training, None where there is none."""
    newest = max(_complete(folder), key=lambda entry: int(entry["step"]), default=None)
    return None if newest is None else (newest["step"], newest["of"])


def _remove(checkpoint: Path) -> None:
    # complete.json goes first: a checkpoint that is half removed must not count.
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _complete(folder: Path) -> Iterator[dict[str, Any]]:
    for checkpoint in folder.glob("checkpoint-*"):
        if (entry := _read(checkpoint)) is not None:
            yield entry


def _read(checkpoint: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads((checkpoint / COMPLETE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and is_intact(entry) else None

"""Which checkpoints of a training can be gone on from. Imports no torch: `helpsteer status` reads it.

transformers writes `checkpoint-<step>` folders file by file. One counts once `complete.json` lies in it, which is
written last and holds the size and sha256 of every other file: a process killed while writing one leaves a folder that
the next attempt throws away, and so does it with one that was damaged since. A training goes on from the newest
checkpoint that is whole and whose best checkpoint is whole; the last two and the best of each are kept for that. Older
ones are deleted only after a new one is complete.
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
    """Where transformers writes the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def mark_complete(checkpoint: Path, step: int, steps: int, *, best: int | None = None, finished: bool = False) -> None:
    """Mark a checkpoint, all of whose files are written, as complete: at `step` of `steps`.

    Args:
        checkpoint: its folder.
        step: optimizer steps done.
        steps: optimizer steps of the whole training.
        best: step of the best checkpoint so far; None: this one.
        finished: whether the training ends here, at its last step or stopped early.
    """
    files = listing(checkpoint, sorted(path.name for path in checkpoint.iterdir()))
    for path in [*checkpoint.iterdir(), checkpoint]:
        # Else a machine that dies could leave complete.json on the disk and not what it vouches for.
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    content = {"step": step, "of": steps, "best": best or step, "finished": finished, "files": files}
    partial = checkpoint / f"{COMPLETE}.partial"
    partial.write_text(json.dumps(sealed(content)), encoding="utf-8")
    partial.rename(checkpoint / COMPLETE)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that was complete, by size and sha256; None if nothing is."""
    complete = _read(checkpoint)
    if complete is None or complete["step"] != step_of(checkpoint):
        return f"{COMPLETE} is missing or damaged"
    for name, entry in complete["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if listing(checkpoint, [name]) != {name: entry}:
            return f"{name} is not as it was written"
    return None


def is_finished(checkpoint: Path) -> bool:
    """Whether a whole checkpoint is the end of its training."""
    complete = _read(checkpoint)
    return complete is not None and bool(complete["finished"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; half-written and damaged ones, and all after it, are removed."""
    whole: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)  # a death left it half-written or half-removed
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
    """Delete all checkpoints but the newest two and the best of each."""
    complete = sorted(_complete(folder), key=lambda found: int(found["step"]))[-2:]
    kept = {found[key] for found in complete for key in ("step", "best")}
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in kept:
            _remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder's name ends in."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_progress(folder: Path) -> tuple[int, int] | None:
    """Step of the newest complete checkpoint and the steps of the whole training, None where there is none."""
    newest = max(_complete(folder), key=lambda found: int(found["step"]), default=None)
    return None if newest is None else (newest["step"], newest["of"])


def _remove(checkpoint: Path) -> None:
    # First what makes it count.
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _complete(folder: Path) -> Iterator[dict[str, Any]]:
    for checkpoint in folder.glob("checkpoint-*"):
        if (found := _read(checkpoint)) is not None:
            yield found


def _read(checkpoint: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((checkpoint / COMPLETE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and is_intact(found) else None

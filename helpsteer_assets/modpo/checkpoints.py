"""Which checkpoints of a training can be gone on from. Imports no torch: `helpsteer status` reads it.

transformers writes `checkpoint-<step>` folders file by file. One counts once `complete.json` lies in it, which is
written last: a process killed while writing one leaves a folder that the next attempt throws away. Older ones are
deleted only after that, so that a half-deleted folder is never the newest nor the best.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

COMPLETE = "complete.json"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where transformers writes the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def mark_complete(checkpoint: Path, step: int, steps: int, *, finished: bool = False) -> None:
    """Mark a checkpoint, all of whose files are written, as complete: at `step` of `steps`.

    Args:
        checkpoint: its folder.
        step: optimizer steps done.
        steps: optimizer steps of the whole training.
        finished: whether the training ends here, at its last step or stopped early.
    """
    for path in [*checkpoint.iterdir(), checkpoint]:
        # Else a machine that dies could leave complete.json on the disk and not what it vouches for.
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    partial = checkpoint / f"{COMPLETE}.partial"
    partial.write_text(json.dumps({"step": step, "of": steps, "finished": finished}), encoding="utf-8")
    partial.rename(checkpoint / COMPLETE)


def is_finished(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is the end of its training."""
    return bool(json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["finished"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps; what a death left half-written is removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=step_of, default=None)


def keep_only(folder: Path, steps: Collection[int]) -> None:
    """Delete the checkpoints of all other steps."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in steps:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder's name ends in."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_progress(folder: Path) -> tuple[int, int] | None:
    """Step of the newest complete checkpoint and the steps of the whole training, None where there is none."""
    steps = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    newest = max(steps, key=lambda step: step["step"], default=None)
    return None if newest is None else (newest["step"], newest["of"])

"""Which checkpoints of a training can be gone on from. Imports no torch: `helpsteer status` reads it.

transformers writes `checkpoint-<step>` folders file by file. One counts once `complete.json` lies in it, which is written
last: a process killed while writing one leaves a folder that the next attempt throws away.
"""

import json
import shutil
from pathlib import Path

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path, step: int, steps: int) -> None:
    """Mark a checkpoint, all of whose files are written, as complete: at `step` of `steps`."""
    (checkpoint / COMPLETE).write_text(json.dumps({"step": step, "of": steps}))


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps; what a death left half-written is removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def checkpoint_progress(folder: Path) -> tuple[int, int] | None:
    """Step of the newest complete checkpoint and the steps of the whole training, None where there is none."""
    steps = [json.loads(path.read_text()) for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    newest = max(steps, key=lambda step: step["step"], default=None)
    return None if newest is None else (newest["step"], newest["of"])

"""Time and memory: contenders take turns, and ratios are taken round by round. Imports no torch."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Contenders = Mapping[str, Callable[[], object]]
"""Work by name; called once a round."""
Seconds = dict[str, list[float]]
"""Seconds of each contender, one number per round."""


def seconds(work: Callable[[], object], device: "torch.device") -> float:
    """CPU seconds of this process; on a GPU the seconds between the device's first and last kernel."""
    if device.type == "cuda":
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    begun = time.process_time()
    work()
    return time.process_time() - begun


def interleave(contenders: Contenders, rounds: int, device: "torch.device") -> Seconds:
    """Seconds of each contender in each round; every other round in reverse order, so that drift favours nobody."""
    measured: Seconds = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            measured[name].append(seconds(contenders[name], device))
    return measured


def ratio(dear: list[float], cheap: list[float]) -> dict[str, float]:
    """How many times dearer one contender is than another: the median of the rounds' ratios, lowest and highest."""
    by_round = [a / b for a, b in zip(dear, cheap, strict=True)]
    return {"median": statistics.median(by_round), "low": min(by_round), "high": max(by_round)}


def compared(timed: Seconds, units: int = 1) -> dict[str, Any]:
    """Median seconds of `reference` and `ours` for a unit of work, and how many times dearer the first is."""
    return {
        "reference_seconds": statistics.median(timed["reference"]) / units,
        "our_seconds": statistics.median(timed["ours"]) / units,
        "ratio": ratio(timed["reference"], timed["ours"]),
    }


def peak_memory(work: Callable[[], object], device: "torch.device") -> float | None:
    """MiB that `work` needs at its peak, above what is allocated before.

    On a GPU of the allocator's, on Linux of the process's resident memory; None where neither can be told.
    """
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak start anew from what is resident now
    before = _resident("VmRSS")
    work()
    return most_resident() - before


def most_resident() -> float:
    """Most MiB that this process ever had resident (Linux only; getrusage's number includes the parent's)."""
    return _resident("VmHWM")


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))

"""Time and memory: contenders take turns, and ratios are taken round by round."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Contenders = Mapping[str, Callable[[], object]]
"""Work by name; called once a round."""
Seconds = dict[str, list[float]]
"""Of each contender, one per round."""

_MIB = 2**20


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process; on a GPU the seconds between the device's first and last kernel."""
    if device.type == "cuda":
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


def interleave(contenders: Contenders, rounds: int, device: torch.device) -> Seconds:
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


def peak_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """MiB that `work` needs at its peak, above what is allocated before.

    On a GPU of the allocator's, on Linux of the process's resident memory; None where neither can be told.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak start anew from what is resident now
    before = _resident("VmRSS")
    work()
    return (_resident("VmHWM") - before) / 1024


def _resident(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

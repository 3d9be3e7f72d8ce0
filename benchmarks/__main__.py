"""`python -m benchmarks`: measure the cases, print a report, and write it as JSON where asked to.

`python -m benchmarks gpu` is a program of its own, for a machine with a GPU and little else.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.models import MODELS, SMOLLM2, smollm2_folder
from benchmarks.report import as_text, describe_machine, write_json
from benchmarks.setting import Setting
from helpsteer_assets.errors import HelpsteerError

CASES = ("training_step", "grid", "scoring", "trl_dpo", "generation", "data_at_size", "start_up")
NEEDS = {"trl_dpo": "trl", "data_at_size": "duckdb", "start_up": "dagster"}
"""Packages without which a case is left out, so that the rest runs on a machine that has but torch and transformers."""


def main(arguments: Items[str] | None = None) -> None:
    """Parse the command line and run the cases one after another."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers and TRL would tear the report
    if arguments[:1] == ["gpu"]:
        gpu.main(arguments[1:])
        return
    options = _parse(arguments)
    setting = _setting(options)
    torch.set_num_threads(options.threads)
    # As in training processes: see choose_device.
    torch.set_flush_denormal(True)
    results: dict[str, Any] = {
        **describe_machine(setting.device),
        "precision": setting.precision,
        "form": "long" if setting.long else "short",
        "cases": {},
    }
    print("\n".join(f"{name}: {value}" for name, value in results.items() if name != "cases"), flush=True)
    for case in options.case or CASES:
        begun = time.perf_counter()
        result = _run(case, setting)
        results["cases"][case] = result | {"wall_seconds": time.perf_counter() - begun}
        print(f"\n{as_text(case.replace('_', ' '), results['cases'][case])}", flush=True)
        if options.json is not None:
            write_json(results, options.json)  # after each case: the next may be interrupted


def _parse(arguments: Items[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed against the reference procedure; `gpu`: the GPU path."
    )
    parser.add_argument("--long", action="store_true", help="full lengths, every length mix, more rounds")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default: what fits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1: CPU time is least disturbed)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> Setting:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise HelpsteerError("--device cuda: torch sees no CUDA device here; leave --device out or set it to cpu")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if options.model:
        models = tuple(options.model)
    else:
        models = ("body8",) if device.type == "cpu" else ("body8", "llama1b")
        if options.long and smollm2_folder() is not None:
            models += (SMOLLM2,)
    return Setting(long=options.long, device=device, precision=options.precision, models=models)


def _run(case: str, setting: Setting) -> dict[str, Any]:
    if case in NEEDS and importlib.util.find_spec(NEEDS[case]) is None:
        return {"skipped": f"{NEEDS[case]} is not installed"}
    return importlib.import_module(f"benchmarks.{case}").run(setting)


if __name__ == "__main__":
    try:
        main()
    except HelpsteerError as error:
        sys.exit(f"error: {error}")
    # End at once: DuckDB 2's bindings print pages about harmless leaks while an interpreter is torn down.
    sys.stdout.flush()
    os._exit(0)

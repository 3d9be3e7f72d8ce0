"""The long campaign: python -m helpsteer_assets_tests.faults [--trials N] [--seed S] [--only FAULT]."""

import argparse
import importlib
import os
import pkgutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import helpsteer_assets_tests.faults
from helpsteer_assets_tests.faults.campaign import FAULTS, Result, Undisturbed, try_fault


def load_faults() -> None:
    """Import every `<topic>_faults.py` of this folder: each registers its faults."""
    package = helpsteer_assets_tests.faults
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.endswith("_faults"):
            importlib.import_module(f"{package.__name__}.{module.name}")


def main(arguments: list[str]) -> int:
    load_faults()
    parser = argparse.ArgumentParser(prog="python -m helpsteer_assets_tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=300, help="trials in all, spread over the faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial of each fault; the next has S + 1")
    parser.add_argument("--only", metavar="FAULT", action="append", default=[], help="faults whose name has this in it")
    options = parser.parse_args(arguments)
    names = [name for name in FAULTS if not options.only or any(part in name for part in options.only)]
    if not names:
        parser.error(f"no such fault; there are: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a trial in progress leaves no process behind
    results: defaultdict[str, list[Result]] = defaultdict(list)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"{len(names)} faults in {folder}", flush=True)
    undisturbed = Undisturbed.make(folder / "undisturbed")
    for number in range(options.trials):
        name, seed = names[number % len(names)], options.seed + number // len(names)
        result = try_fault(name, seed, undisturbed, folder / f"{name.replace(' ', '-')}-{seed}")
        results[name].append(result)
        print(f"{number + 1}/{options.trials} {name}, seed {seed}: {result.note or name}", flush=True)
        for problem in result.problems:
            print(f"    {problem:.1000}", flush=True)
        if result.problems:
            print(f"    its home: {result.folder}", flush=True)
            print(f"    again: python -m helpsteer_assets_tests.faults --trials 1 --seed {seed} --only {name!r}")
    return _table(results)


def _table(results: dict[str, list[Result]]) -> int:
    """Print the table; 1 if a trial did not survive, else 0."""
    width = max(len(name) for name in results)
    print(f"\n{'fault':{width}} | trials | survived | recomputed")
    for name, trials in results.items():
        recomputed: Counter[str] = sum((trial.recomputed for trial in trials), Counter())
        again = ", ".join(f"{count} {kind}" for kind, count in sorted(recomputed.items())) or "nothing"
        survived = sum(not trial.problems for trial in trials)
        print(f"{name:{width}} | {len(trials):6} | {survived:8} | {again}")
    failed = sum(bool(trial.problems) for trials in results.values() for trial in trials)
    print(f"\n{sum(map(len, results.values())) - failed} survived, {failed} did not")
    return min(failed, 1)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # DuckDB 2's bindings print pages about harmless leaks while an interpreter is torn down

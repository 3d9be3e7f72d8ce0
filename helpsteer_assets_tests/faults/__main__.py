"""The long campaign: python -m helpsteer_assets_tests.faults [--trials N] [--seed S] [--only FAULT]."""

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import helpsteer_assets_tests.faults.faults  # noqa: F401  registers them
from helpsteer_assets_tests.faults.campaign import FAULTS, Undisturbed, try_fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpsteer_assets_tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=300, help="trials in all, spread over the faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial of each fault; the next has S + 1")
    parser.add_argument("--only", metavar="FAULT", default="", help="faults that have this in their name")
    options = parser.parse_args()
    names = [name for name in FAULTS if options.only in name]
    if not names:
        parser.error(f"no such fault; there are: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a trial in progress leaves no process behind
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    undisturbed = Undisturbed.make(folder / "undisturbed")
    failed: Counter[str] = Counter()
    for number in range(options.trials):
        name, seed = names[number % len(names)], options.seed + number // len(names)
        place = folder / f"trial-{number}"
        note, problems = try_fault(name, seed, undisturbed, place)
        failed[name] += bool(problems)
        print(f"{number + 1}/{options.trials} {name}, seed {seed}: {note}", flush=True)
        if problems:
            print("\n".join(f"    {problem:.3000}" for problem in problems))
            print(f"    its home is in {place}; again: --trials 1 --seed {seed} --only {name!r}", flush=True)
    print(f"{options.trials - failed.total()} of {options.trials} survived", *(+failed).items(), sep="\n    ")
    return min(1, failed.total())


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # DuckDB 2's bindings print pages about harmless leaks while an interpreter is torn down

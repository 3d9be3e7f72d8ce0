"""Ratings, pairs and tokens of as many rows as HelpSteer has (37,120), and in the long form of ten times as many.

Made-up rows of HelpSteer's shape: gzipped JSON lines, four responses to a prompt, prompts of 90 to 200 words and
responses of 80 to 200. Each step runs in a process of its own, so that its peak memory is its own; tokens are those of
SmolLM2 where it is at hand, else of the embedded model, which has more of them.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting
from benchmarks.timing import most_resident
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES

ROOT = Path(__file__).parent.parent
HELPSTEER_ROWS = 37_120
RESPONSES_PER_PROMPT = 4
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512

Work = Callable[[], int]
"""The measured work of a step; returns how many rows it makes."""


def run(setting: Setting) -> dict[str, Any]:
    """Measurements by number of rows; the long form adds ten times HelpSteer's rows."""
    sizes = (HELPSTEER_ROWS, *((10 * HELPSTEER_ROWS,) if setting.long else ()))
    return {f"{rows} rows": {"rows": measure(rows)} for rows in sizes}


def measure(rows: int) -> list[dict[str, Any]]:
    """Run all steps on so many rows, a multiple of four.

    Returns
        of each step `cpu_s`, `wall_s`, `peak_mib` and `start_mib` (resident memory at its peak, and before the work,
            when libraries are loaded) and `kept`, the rows that it makes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        write_rows(folder / "source" / "train.jsonl.gz", rows)
        return [{"step": step, **_in_own_process(step, folder)} for step in STEPS]


def write_rows(path: Path, rows: int) -> None:
    """Rated responses of HelpSteer's shape; always the same ones."""
    random_ = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfglmnprstvz" for vowel in "aeiou"]
    words = ["".join(random_.choices(syllables, k=random_.choice((1, 1, 2, 2, 3, 4)))) for _ in range(8_000)]
    # The first words are the most frequent ones, as in a language.
    running = [words[min(int(random_.paretovariate(0.7)), len(words)) - 1] for _ in range(500_000)]

    def text(shortest: int, longest: int) -> str:
        start, count = random_.randrange(len(running) - longest), random_.randint(shortest, longest)
        return " ".join(running[start : start + count]) + "."

    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for row in range(rows):
            if row % RESPONSES_PER_PROMPT == 0:
                prompt = text(90, 200)
            ratings = {attribute: random_.randint(0, 4) for attribute in ATTRIBUTES}
            file.write(json.dumps({"prompt": prompt, "response": text(80, 200), **ratings}) + "\n")


def _ratings(folder: Path) -> Work:
    from helpsteer_assets.modpo.data.ratings import read_ratings

    def work() -> int:
        report = read_ratings(
            folder / "source",
            folder / "ratings.parquet",
            on_bad_rows="error",
            validation_share=0.05,
            max_train_prompts=None,
            max_validation_prompts=None,
        )
        return sum(split["rows"] for split in report["splits"].values())

    return work


def _pairs(attribute: str) -> Callable[[Path], Work]:
    def prepare(folder: Path) -> Work:
        from helpsteer_assets.modpo.data.pairs import build_pairs

        ratings, pairs = folder / "ratings.parquet", folder / f"{attribute}.parquet"
        return lambda: sum(build_pairs(ratings, attribute, 0.05, pairs).values())

    return prepare


def _tokenization(folder: Path) -> Work:
    from benchmarks.models import smollm2_folder
    from helpsteer_assets.modpo.data.pairs import unique_responses
    from helpsteer_assets.modpo.models.loading import load_tokenizer
    from helpsteer_assets.modpo.models.tokenization import encode_responses

    tokenizer = load_tokenizer(smollm2_folder() or ROOT / "helpsteer_assets" / "embedded" / "model")
    responses = unique_responses(folder / "helpfulness.parquet", folder / "verbosity.parquet")
    return lambda: len(encode_responses(tokenizer, responses, MAX_LENGTH, MAX_PROMPT_LENGTH))


STEPS: dict[str, Callable[[Path], Work]] = {
    "ratings": _ratings,
    "preference_pairs": _pairs("helpfulness"),
    "margin_pairs": _pairs("verbosity"),
    "tokenization": _tokenization,
}
"""In this order: a step reads the files of those before it."""


def _in_own_process(step: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "benchmarks.data_at_size", step, str(folder)]
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _measured(work: Work) -> dict[str, Any]:
    start_mib, cpu, wall = most_resident(), time.process_time(), time.perf_counter()
    kept = work()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "start_mib": start_mib,
        "peak_mib": most_resident(),
        "kept": kept,
    }


if __name__ == "__main__":
    name, temporary_folder = sys.argv[1:]
    print(json.dumps(_measured(STEPS[name](Path(temporary_folder)))))

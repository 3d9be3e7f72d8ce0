"""Ratings, pairs and tokens of as many rows as HelpSteer has (37,120), and in the long form of ten times as many.

Made-up rows of HelpSteer's shape: gzipped JSON lines, four responses to a prompt, prompts of 90 to 200 words and
responses of 80 to 200. Each step runs in a process of its own, so that its peak memory is its own; tokens are those of
SmolLM2 where it is at hand, else of a tokenizer trained on the rows.
"""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from helpsteer_assets.modpo.data.attributes import ATTRIBUTES

HELPSTEER_ROWS = 37_120
RESPONSES_PER_PROMPT = 4
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512
SAMPLE = 1_000
"""Responses that are tokenized many and one a call, to compare."""
ROUNDS = 3
VOCABULARY = 16_384
"""Tokens of the trained tokenizer."""

Work = Callable[[], dict[str, Any]]
"""What is measured of a step; returns what the step counts."""


def run(long: bool) -> dict[str, Any]:
    """Measurements by number of rows; the long form adds ten times HelpSteer's rows."""
    return {f"{rows} rows": measure(rows) for rows in (HELPSTEER_ROWS, *((10 * HELPSTEER_ROWS,) if long else ()))}


def measure(rows: int) -> dict[str, Any]:
    """Run all steps on so many rows, a multiple of four.

    Returns
        steps: of each, `cpu_s`, `wall_s`, `rows_per_s` (of wall time), `peak_mib` and `start_mib` (resident memory at
            its peak, and before the work, when libraries are loaded) and `kept`, the rows that it makes;
        one_by_one_over_batched_cpu, one_by_one_over_batched_wall: how many times dearer it is to tokenize one text a
            call than many a call, the token ids being equal.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        write_rows(folder / "source" / "train.jsonl.gz", rows)
        tokenizer = _tokenizer_folder(folder)
        measured = {step: _in_own_process(step, folder, tokenizer) for step in STEPS}
    ratios = measured.pop("batching")["ratios"]
    steps = [{"step": step, **numbers, "rows_per_s": rows / numbers["wall_s"]} for step, numbers in measured.items()]
    return {"steps": steps, **ratios}


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


def _tokenizer_folder(folder: Path) -> Path:
    """SmolLM2's folder, or one with a byte-level BPE of the rows' own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.models import smollm2_folder

    if (found := smollm2_folder()) is not None:
        return found.absolute()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False)
    with gzip.open(folder / "source" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        bpe.train_from_iterator((json.loads(line)["response"] for line in islice(lines, SAMPLE)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def _ratings(folder: Path, tokenizer_folder: Path) -> Work:
    from helpsteer_assets.modpo.data.ratings import read_ratings

    def work() -> dict[str, Any]:
        report = read_ratings(
            folder / "source",
            folder / "ratings.parquet",
            on_bad_rows="error",
            validation_share=0.05,
            max_train_prompts=None,
            max_validation_prompts=None,
        )
        return {"kept": sum(split["rows"] for split in report["splits"].values())}

    return work


def _pairs(attribute: str) -> Callable[[Path, Path], Work]:
    def prepare(folder: Path, tokenizer_folder: Path) -> Work:
        from helpsteer_assets.modpo.data.pairs import build_pairs

        ratings, pairs = folder / "ratings.parquet", folder / f"{attribute}.parquet"
        return lambda: {"kept": sum(build_pairs(ratings, attribute, 0.05, pairs).values())}

    return prepare


def _description(folder: Path, tokenizer_folder: Path) -> Work:
    from helpsteer_assets.modpo.data.pairs import describe_pairs

    ratings, pairs = folder / "ratings.parquet", folder / "helpfulness.parquet"
    return lambda: {"kept": sum(describe_pairs(pairs, ratings, "helpfulness", "verbosity")["pairs"].values())}


def _unique_responses(folder: Path, tokenizer_folder: Path) -> Work:
    from helpsteer_assets.modpo.data.pairs import unique_responses

    pairs = [folder / f"{attribute}.parquet" for attribute in ("helpfulness", "verbosity")]
    return lambda: {"kept": len(unique_responses(*pairs))}


def _tokenization(folder: Path, tokenizer_folder: Path) -> Work:
    from helpsteer_assets.modpo.data.pairs import unique_responses
    from helpsteer_assets.modpo.models.loading import load_tokenizer
    from helpsteer_assets.modpo.models.tokenization import encode_responses

    tokenizer = load_tokenizer(tokenizer_folder)
    responses = unique_responses(folder / "helpfulness.parquet", folder / "verbosity.parquet")
    return lambda: {"kept": len(encode_responses(tokenizer, responses, MAX_LENGTH, MAX_PROMPT_LENGTH))}


def _batching(folder: Path, tokenizer_folder: Path) -> Work:
    from benchmarks.timing import ratio
    from helpsteer_assets.modpo.data.pairs import unique_responses
    from helpsteer_assets.modpo.models.loading import load_tokenizer
    from helpsteer_assets.modpo.models.tokenization import Sequence, encode_prompt, encode_response, encode_responses

    tokenizer = load_tokenizer(tokenizer_folder)
    responses = unique_responses(folder / "helpfulness.parquet").slice(0, SAMPLE)

    def one_by_one() -> dict[str, Sequence]:
        prompts: dict[str, Any] = {}
        encoded = {}
        for row in responses.to_pylist():
            if row["prompt_id"] not in prompts:
                prompts[row["prompt_id"]] = encode_prompt(tokenizer, row["prompt"], MAX_PROMPT_LENGTH)
            ids, prompt_cut = prompts[row["prompt_id"]]
            response_ids, cut = encode_response(tokenizer, row["response"], MAX_LENGTH - len(ids))
            encoded[row["response_id"]] = Sequence(ids, response_ids, prompt_cut or cut)
        return encoded

    def batched() -> dict[str, Sequence]:
        return dict(encode_responses(tokenizer, responses, MAX_LENGTH, MAX_PROMPT_LENGTH))

    def work() -> dict[str, Any]:
        assert one_by_one() == batched()
        rounds = [(_seconds(one_by_one), _seconds(batched)) for _ in range(ROUNDS)]
        return {
            "ratios": {
                f"one_by_one_over_batched_{clock}": ratio(
                    [slow[number] for slow, _ in rounds], [fast[number] for _, fast in rounds]
                )
                for number, clock in enumerate(("cpu", "wall"))
            }
        }

    return work


STEPS: dict[str, Callable[[Path, Path], Work]] = {
    "ratings": _ratings,
    "preference_pairs": _pairs("helpfulness"),
    "margin_pairs": _pairs("verbosity"),
    "description": _description,
    "unique_responses": _unique_responses,
    "tokenization": _tokenization,
    "batching": _batching,
}
"""In this order: a step reads the files of those before it."""


def _in_own_process(step: str, folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "benchmarks.data_at_size", step, str(folder), str(tokenizer_folder)]
    return json.loads(subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _measured(work: Work) -> dict[str, Any]:
    start_mib = _peak_mib()
    counted: dict[str, Any] = {}
    cpu_s, wall_s = _seconds(lambda: counted.update(work()))
    return {"cpu_s": cpu_s, "wall_s": wall_s, "start_mib": start_mib, "peak_mib": _peak_mib(), **counted}


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _peak_mib() -> float:
    """Most memory that this process ever had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says counts in, on Linux, the process that started this one.
        (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    print(json.dumps(_measured(STEPS[name](*map(Path, folders)))))

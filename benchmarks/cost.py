"""The cost model of `modpo/cost.py` against the clock.

Its pieces, with each of the models: a micro-batch of training, a batch of scoring, decoding. In the long form whole
runs, too: what `helpsteer check` estimates against CPU seconds of every stage that computes with a model, in real runs
of the graph, cut down, on models of three sizes, in this process and on one thread. What the machine does in a second
is measured before and after each, for a busy machine does less. The estimate of a run is made twice: as `helpsteer
check` makes it, which has to guess how long answers will be, and with the lengths that the answers have.
"""

import dataclasses
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.models import ALL_LINEAR, contenders, load_base, smollm2_folder
from benchmarks.setting import Setting
from benchmarks.timing import ratio, seconds
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import status
from helpsteer_assets.commands.cost import Machine, decoding, forward, measure_machine, training, tree
from helpsteer_assets.commands.estimate import Texts, estimate, measure_texts
from helpsteer_assets.commands.run import run_experiment
from helpsteer_assets.execution.executor import MODEL_MODULES
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.data.pairs import unique_responses
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.models.loading import batch_tokens, load_tokenizer, model_size, size_of
from helpsteer_assets.modpo.models.tokenization import Sequence, count_response_tokens, encode_prompts
from helpsteer_assets.modpo.scoring.log_probs import response_log_probs
from helpsteer_assets.modpo.scoring.trees import pack
from helpsteer_assets.store.artifacts import ALL

CPU = torch.device("cpu")
ROUNDS = 3
_UNCUT = 2**31

_COMMON: dict[str, Any] = {
    "extends": "demo",
    "checks": {"margin_adapter_min_accuracy": 0},
    "evaluation": {"prompts": 24, "kl_samples": 1, "bootstrap_samples": 200},
    "run": {"device": "cpu", "threads": 1},
}
_SIZES: dict[str, dict[str, Any]] = {
    "embedded": {
        "data": {"max_train_prompts": 300, "max_validation_prompts": 80},
        "objective": {"weights": [0.5]},
        "sft": {"steps": 12},
        "margin_adapter": {"steps": 30, "evaluate_every": 10},
        "modpo": {"steps": 20, "evaluate_every": 10},
    },
    "body8": {
        "data": {"max_train_prompts": 60, "max_validation_prompts": 30, "selection_share": 0.1},
        "objective": {"weights": [0.5]},
        "sft": {"steps": 4, "batch_size": 8},
        "margin_adapter": {"steps": 12, "batch_size": 8, "evaluate_every": 6},
        "modpo": {"steps": 8, "batch_size": 8, "evaluate_every": 4},
        "generation": {"max_new_tokens": 48},
    },
    "smollm2": {
        "data": {"max_train_prompts": 20, "max_validation_prompts": 12, "selection_share": 0.1},
        "model": {"max_length": 192, "max_prompt_length": 96},
        "objective": {"weights": [0.5], "beta": 0.1, "margin_beta": 0.1},
        "sft": {"steps": 4, "batch_size": 4, "learning_rate": 2e-4, "evaluate_every": 2},
        "margin_adapter": {"steps": 10, "batch_size": 4, "learning_rate": 5e-4, "evaluate_every": 5},
        "modpo": {"steps": 6, "batch_size": 4, "learning_rate": 2e-4, "evaluate_every": 3},
        "generation": {"max_prompt_length": 96, "max_new_tokens": 32},
        "evaluation": {"prompts": 10},
    },
}
"""The demo with another model and fewer steps. docs/scaling.md holds what was found with them."""


@dataclass
class Measured:
    """CPU seconds of stages, by label, and what the machine did before and after each."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    machines: dict[str, list[Machine]] = dataclasses.field(default_factory=dict)


def run(setting: Setting) -> dict[str, Any]:
    """`pieces`: of each model, estimates over what was measured; `runs`: the same of the stages of whole runs."""
    rows = [{"model": name} | pieces(name, setting) for name in setting.models]
    return {"pieces": rows} | ({"runs": runs()} if setting.long else {})


def pieces(name: str, setting: Setting) -> dict[str, Any]:
    """Estimate over measured seconds: how the coefficients fit a model of this size on this machine."""
    prompt, responses, rows, steps = (64, (64, 64), 16, 16) if setting.long else (24, (24, 24), 8, 8)
    device, bytes_each = setting.device, {"fp32": 4, "bf16": 2}[setting.precision]
    with contenders(name, device, setting.precision, ALL_LINEAR) as models:
        policy = models.policy
        base = policy.get_base_model()
        size = size_of(policy)
        ids = [torch.randint(3, size.embeddings, (length,)).numpy() for length in (prompt, *responses)]
        batch, _ = pack([Sequence(ids[0], response) for response in ids[1:]])
        batch, read = batch.to(device), tree(prompt, *responses)
        how = Decoding(max_new_tokens=steps + 1, end_id=-1, max_batch_tokens=2**20)
        prompts = {row: ids[0].tolist() for row in range(rows)}

        def train() -> None:
            response_log_probs(policy.train(), batch).sum().backward()

        def score() -> None:
            with torch.inference_mode():
                response_log_probs(policy.eval(), batch)

        def answer(how: Decoding) -> None:
            with torch.inference_mode(), policy.disable_adapter():
                list(decode(base.eval(), prompts, how))

        common = {"bytes_each": bytes_each}
        decoded = {"prompts": rows, "prompt_tokens": prompt, "response_tokens": steps, "steps": steps, "prefills": 1}
        expected = {
            "training": training(size, read, passes=1, checkpointing=False, **common),
            "scoring": forward(size, read, passes=1, adapter=True, **common),
            "greedy": decoding(size, **decoded, sampled=False, **common),
            "sampled": decoding(size, **decoded, sampled=True, **common),
        }
        works = {
            "training": train,
            "scoring": score,
            "greedy": partial(answer, how),
            "sampled": partial(answer, replace(how, do_sample=True)),
        }
        found: dict[str, Any] = {}
        for kind, work in works.items():
            work()  # finds out what the model can do, once in a process
            machines, measured = [measure_machine(device.type, setting.precision)], []
            for _ in range(ROUNDS):
                measured.append(seconds(work, device))
                machines.append(measure_machine(device.type, setting.precision))
            found[f"{kind}_seconds"] = statistics.median(measured)
            found[kind] = ratio([expected[kind].seconds(_mean(machines))] * ROUNDS, measured)
        return found | {"rate": _mean(machines).rate}


def runs() -> dict[str, Any]:
    """By model: seconds measured, and estimates over them."""
    for module in MODEL_MODULES:
        importlib.import_module(module)  # what a process imports once is no stage's cost
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in _SIZES:
            model = model_folder(name, Path(folder))
            if model is not None:
                file = Path(folder) / f"{name}.yaml"
                file.write_text(yaml.safe_dump(experiment_of(name, model)), encoding="utf-8")
                experiment, home = load_experiment(str(file)), Path(folder) / "homes" / name
                found[name] = compare(experiment, home, measure(experiment, home))
    return found


def experiment_of(name: str, model: str) -> dict[str, Any]:
    """The content of an experiment file for one of the sizes."""
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in _COMMON.items()}
    for section, keys in _SIZES[name].items():
        made[section] = made.get(section, {}) | keys
    made["model"] = made.get("model", {}) | {"base": model}
    return made | {"name": f"cost-{name}"}


def model_folder(name: str, folder: Path) -> str | None:
    """What `model.base` is for one of the sizes; None for SmolLM2 where it is not on this machine."""
    if name == "embedded":
        return name
    if name == "smollm2":
        found = smollm2_folder()
        return None if found is None else str(found.absolute())
    tokenizer = load_tokenizer(local_path("model.base", "embedded"))
    model = load_base(name, CPU, "fp32")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, key, getattr(tokenizer, key))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def measure(experiment: Experiment, home: Path) -> Measured:
    """Run an experiment in a new home."""
    measured, begun = Measured(), dict[str, float]()

    def announce(message: str) -> None:
        what, _, told = message.partition(": ")
        if told.startswith("computing"):
            measured.machines[what] = [measure_machine("cpu", "fp32")]
            begun[what] = time.process_time()
        elif told.startswith("finished") and what in begun:
            measured.seconds[what] = time.process_time() - begun[what]
            measured.machines[what].append(measure_machine("cpu", "fp32"))

    os.environ.setdefault("TQDM_DISABLE", "1")
    if not run_experiment(experiment, home, announce=announce):
        raise RuntimeError(f"the run of {experiment.name} failed; `helpsteer run` on its file says why")
    return measured


def compare(experiment: Experiment, home: Path, measured: Measured) -> dict[str, Any]:
    """Estimates over what was measured, by stage and weight.

    Returns:
        `seconds`: measured; `check`: the estimate of `helpsteer check` over it; `known_answers`: the same where the
        lengths of the answers are known.
    """
    files = {s.asset: Path(s.path) for s in status(experiment, home) if s.partition == ALL and s.path}
    size = model_size(local_path("model.base", experiment.model.base), experiment.lora)
    guessed = texts_of(experiment, files)
    answers = pq.read_table(files["sft_generations"] / "generations.parquet")["response_tokens"].to_pylist()
    known = replace(guessed, answers=answers)
    rows: dict[str, dict[str, float]] = {"seconds": {}, "check": {}, "known_answers": {}}
    tokens = batch_tokens(experiment.run, CPU)
    by_guess, by_knowledge = (estimate(experiment, size, texts, tokens) for texts in (guessed, known))
    for stage in by_guess:
        for what in (s for s in measured.seconds if s == stage or s.startswith(f"{stage} w=")):
            machine, seconds = _mean(measured.machines[what]), measured.seconds[what]
            rows["seconds"][what] = seconds
            rows["check"][what] = by_guess[stage].seconds(machine) / seconds
            rows["known_answers"][what] = by_knowledge[stage].seconds(machine) / seconds
    for kind in ("check", "known_answers"):
        predicted = sum(ratio * rows["seconds"][what] for what, ratio in rows[kind].items())
        rows[kind]["all of these"] = predicted / sum(rows["seconds"].values())
    return rows


def texts_of(experiment: Experiment, files: Mapping[str, Path]) -> Texts:
    """What `helpsteer check` would measure, from the artifacts of a finished run, by asset."""
    tokenizer = load_tokenizer(local_path("model.base", experiment.model.base))
    pairs = [files[name] / "pairs.parquet" for name in ("preference_pairs", "margin_pairs") if name in files]
    responses = unique_responses(*pairs)
    prompts = [len(ids) for ids, _ in encode_prompts(tokenizer, responses["prompt"].to_pylist(), _UNCUT)]
    counted = count_response_tokens(tokenizer, responses)
    lengths = {
        "response_id": responses["response_id"],
        "prompt_tokens": prompts,
        "response_tokens": [counted[response] for response in responses["response_id"].to_pylist()],
    }
    asked = pq.read_table(files["evaluation_prompts"] / "prompts.parquet")["prompt"].to_pylist()
    return measure_texts(
        experiment,
        pairs[0],
        pairs[1] if len(pairs) > 1 else None,
        pa.table(lengths),
        [len(ids) for ids, _ in encode_prompts(tokenizer, asked, _UNCUT)],
    )


def _mean(machines: list[Machine]) -> Machine:
    return Machine(*(sum(values) / len(values) for values in zip(*map(dataclasses.astuple, machines), strict=True)))

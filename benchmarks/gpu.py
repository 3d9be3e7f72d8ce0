"""`python -m benchmarks gpu`: what a machine with a GPU has to show, in ten minutes.

A Llama of 7B parameters (random weights, bf16) goes through the parts that matter on a GPU, the most important first:
the attention kernel, the training step with and without checkpointing and dropout, the reference procedure, noise of
log-probabilities, decoding, merging of adapters, scoring, and a whole training of a smaller model. A part for which
too little time is left is skipped; one that fails is reported, and the next one runs.

Needs torch, transformers, peft and accelerate, no files and no network. `--tiny` rehearses everything on a CPU.
"""

import argparse
import gc
import math
import time
import traceback
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks import ours, reference_procedure
from benchmarks.models import ATTENTION, load_base
from benchmarks.optimizer import Optimizer
from benchmarks.pairs import LengthMix, Pair, RandomText
from benchmarks.report import as_text, describe_machine, write_json
from benchmarks.timing import interleave, peak_memory
from benchmarks.timing import seconds as seconds_of
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.models.lending import Snapshot, merged
from helpsteer_assets.modpo.models.loading import attach_lora, in_words, load_adapters
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.log_probs import (
    BASE,
    attention_for,
    method_for,
    response_log_probs,
    score_sequences,
)
from helpsteer_assets.modpo.scoring.tree_attention import require_varlen
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.training.preference import PairCollator, PairDataset, PreferencePair, train_preference

HELPSTEER = LengthMix(100, 0.3, 55, 0.5)
"""Lengths as HelpSteer has them at a limit of 512 tokens: prompts of about 200, responses of about 110."""
SCORING_TOKENS = 16384
W, BETA = 0.5, 0.1


@dataclass(frozen=True)
class Place:
    """Where the parts run, and how large they are."""

    device: torch.device
    tiny: bool
    """Whether this is a rehearsal with a tiny model and short texts."""

    def model(self, name: str = "llama7b") -> PreTrainedModel:
        """A model of random weights with logits spread like a trained model's."""
        model = load_base("tiny" if self.tiny else name, self.device, "bf16")
        with torch.no_grad():
            model.lm_head.weight.normal_(std=3.0 / math.sqrt(model.config.hidden_size))
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(3)
                layer.mlp.down_proj.weight.mul_(3)
        return model

    def text(self, model: PreTrainedModel) -> RandomText:
        """Draws pairs of HelpSteer's lengths."""
        return RandomText(model.config.vocab_size, HELPSTEER, 64 if self.tiny else 512)

    def seconds(self, work: Callable[[], object], rounds: int = 3) -> float:
        """Median seconds of `work`, after a first call that does not count."""
        work()
        return median(interleave({"work": work}, rounds, self.device)["work"])

    def clean(self) -> None:
        """Free the memory of a part that has ended."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def kernels(place: Place) -> dict[str, Any]:
    """Whether variable-length flash attention runs here, by numbers of heads and head size."""
    results = {}
    for heads, key_value_heads, head_size in ((32, 32, 128), (32, 8, 128), (9, 3, 64), (32, 1, 128)):
        try:
            require_varlen(place.device, torch.bfloat16, heads, key_value_heads, head_size)
            verdict = "agrees"
        except Exception as error:  # of any kind: the kernel raises it
            verdict = in_words(error)
        results[f"varlen_{heads}_heads_{key_value_heads}_key_value_heads_of_{head_size}"] = verdict
    return results


def training_step(place: Place) -> dict[str, Any]:
    """An optimizer step of eight pairs; useful FLOPs are 4 per weight and token, recomputation does not count."""
    model = place.model()
    policy = _lora(model, dropout=0.05)
    pairs = [PreferencePair(*_sequences(pair), -100.0, -100.0) for pair in place.text(model).pairs(8)]
    collate = PairCollator(ours.micro_batch_tokens(place.device))
    batches = [inputs["trees"] for inputs in collate(pairs)["micro_batches"]]
    tokens, predicted = sum(batch.tokens for batch in batches), sum(len(batch.targets) for batch in batches)
    head = model.lm_head.weight.numel()
    body = model.num_parameters(exclude_embeddings=True) - head
    useful = 4 * (body * tokens + head * predicted)
    optimizer = Optimizer(policy)

    def step() -> None:
        with attention_for(policy):
            ours.training_step(policy, pairs, w=W, beta=BETA)
        optimizer.step()

    def measure(*, checkpointing: bool, dropout: float) -> dict[str, Any]:
        place.clean()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        try:
            seconds = place.seconds(step)
            begun = time.perf_counter()
            step()
            numbers = {
                "seconds": seconds,
                "seconds_to_launch": time.perf_counter() - begun,
                "tokens_per_second": tokens / seconds,
                "useful_tflops": useful / seconds / 1e12,
                "peak_mib": peak_memory(step, place.device),
            }
        except torch.OutOfMemoryError as error:
            numbers = {"failed": in_words(error)}
        return {"checkpointing": checkpointing, "dropout": dropout, **numbers}

    return {
        "method": str(method_for(model)),
        "tokens": tokens,
        "micro_batches": len(batches),
        "seconds_to_collate": seconds_of(lambda: collate(pairs), torch.device("cpu")),
        "rows": [
            measure(checkpointing=checkpointing, dropout=dropout)
            for checkpointing, dropout in ((True, 0.05), (False, 0.05), (False, 0.0))
        ],
        "synchronisations": _synchronisations(step) if place.device.type == "cuda" else None,
    }


def reference_step(place: Place) -> dict[str, Any]:
    """The reference procedure on such pairs: one at a time, four forward passes, checkpointing; no optimizer."""
    model = place.model()
    pairs = place.text(model).pairs(8)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    policy = get_peft_model(model, config, adapter_name=reference_procedure.POLICY)
    policy.add_adapter(reference_procedure.MARGIN, config)
    policy.set_adapter(reference_procedure.POLICY)

    def step() -> None:
        reference_procedure.training_step(policy, pairs, w=W, beta=BETA)

    return {"seconds": place.seconds(step, rounds=2), "peak_mib": peak_memory(step, place.device)}


def noise(place: Place) -> dict[str, Any]:
    """Log-ratios before the first step, which are 0 but for rounding; all in nats a response, root mean squares."""
    model = place.model()
    text = place.text(model)
    pairs = text.helpsteer_like(4 if place.tiny else 24)
    sequences = [sequence for pair in pairs for sequence in _sequences(pair)]
    reference = _scores(model, sequences)
    results = {
        "scored_again": _rms(_scores(model, sequences) - reference),
        "scored_prompt_by_prompt": _rms(_scores(model, sequences, batch_tokens=1) - reference),
    }
    policy = _lora(model).train()
    table = [
        PreferencePair(*_sequences(pair), *reference[2 * number : 2 * number + 2]) for number, pair in enumerate(pairs)
    ]
    log_ratios = []
    for inputs in PairCollator(ours.micro_batch_tokens(place.device))(table)["micro_batches"]:
        with torch.no_grad():
            trained = response_log_probs(policy, inputs["trees"].to(place.device)).cpu()
        log_ratios.append((trained[inputs["rows"]] - inputs["reference"]).numpy())
    chosen, rejected = np.concatenate(log_ratios, axis=1)
    return results | {"log_ratio": _rms(np.stack([chosen, rejected])), "log_ratio_of_a_pair": _rms(chosen - rejected)}


def decoding(place: Place) -> dict[str, Any]:
    """A step of greedy decoding at several sizes of the key-value cache."""
    model = place.model()
    length, new, longest = (12, 6, 64) if place.tiny else (300, 48, 2560)
    rows = []
    for room in (256,) if place.tiny else (16384, 65536, 262144):
        count = room // (length + longest)
        prompts = {index: _ids(model, length).tolist() for index in range(count)}

        def respond(tokens: int, prompts: dict[int, list[int]] = prompts) -> None:
            with torch.inference_mode():
                list(decode(model, prompts, Decoding(tokens, end_id=-1, max_batch_tokens=10**9)))

        prefill, whole = (place.seconds(lambda tokens=tokens: respond(tokens), rounds=1) for tokens in (1, new))
        step = (whole - prefill) / (new - 1)
        rows.append(
            {
                "max_batch_tokens": room,
                "rows": count,
                "seconds_of_prefill": prefill,
                "seconds_of_a_step": step,
                "tokens_per_second": count / step,
                "peak_mib": peak_memory(lambda: respond(2), place.device),
            }
        )
    return {"rows": rows}


def merging(place: Place) -> dict[str, Any]:
    """An adapter merged into bf16 weights, as in generation, against the same unmerged, as in scoring; nats rms."""
    model = place.model()
    length = 12 if place.tiny else 300
    sequences = [Sequence(_ids(model, length), _ids(model, length)) for _ in range(4 if place.tiny else 32)]
    weight = model.model.layers[0].self_attn.q_proj.weight
    original = weight.clone()
    with TemporaryDirectory() as folder:
        adapter = Path(folder)
        snapshot = Snapshot(model)
        _lora(model, std_of_b=3e-3).save_pretrained(adapter)
        snapshot.restore()
        policy = load_adapters(model, {"policy": adapter})
        scored = score_sequences(policy, sequences, adapters=(BASE, "policy"), batch_tokens=SCORING_TOKENS)
        snapshot.restore()
        begun = time.perf_counter()
        with merged(model, adapter) as whole:
            together = _scores(whole, sequences)
    base, apart = np.array(scored[BASE]), np.array(scored["policy"])
    return {
        "seconds_with_scoring": time.perf_counter() - begun,
        "log_ratio_of_the_policy": _rms(apart - base),
        "merged_against_unmerged": _rms(together - apart),
        "weights_put_back_exactly": torch.equal(weight, original),
        "base_scored_afterwards": _rms(_scores(model, sequences) - base),
    }


def scoring(place: Place) -> dict[str, Any]:
    """Responses a second: four short ones to each prompt, and long ones to long prompts."""
    model = place.model()
    rows = []
    for prompt, response, prompts, responses in ((200, 120, 24, 4), (1536, 2560, 4, 1)):
        if place.tiny:
            prompt, response = 20, 12
        prompts_ids = [_ids(model, prompt) for _ in range(prompts)]
        sequences = [Sequence(ids, _ids(model, response)) for ids in prompts_ids for _ in range(responses)]
        seconds = place.seconds(lambda sequences=sequences: _scores(model, sequences), rounds=2)
        rows.append(
            {
                "prompt_tokens": prompt,
                "response_tokens": response,
                "responses_of_a_prompt": responses,
                "responses_per_second": len(sequences) / seconds,
                "peak_mib": peak_memory(lambda sequences=sequences: _scores(model, sequences), place.device),
            }
        )
    return {"rows": rows}


def training(place: Place) -> dict[str, Any]:
    """A whole training by transformers' Trainer: pinned batches, evaluations, checkpoints."""
    model = place.model("llama1b")
    count, held_out, steps = (12, 4, 4) if place.tiny else (64, 16, 20)
    sequences = {
        f"{number}{side}": sequence
        for number, pair in enumerate(place.text(model).pairs(count + held_out))
        for side, sequence in zip("cr", _sequences(pair), strict=True)
    }
    reference = dict(zip(sequences, _scores(model, list(sequences.values())).tolist(), strict=True))

    def dataset(numbers: range) -> PairDataset:
        return PairDataset([(f"{number}c", f"{number}r") for number in numbers], sequences, reference)

    settings = Training(1e-4, steps, batch_size=4 if place.tiny else 8, schedule="cosine", evaluate_every=steps // 2)
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        result = train_preference(
            _lora(model, dropout=0.05),
            train_pairs=dataset(range(count)),
            selection_pairs=dataset(range(count, count + held_out)),
            w=W,
            beta=BETA,
            settings=settings,
            batch_tokens=ours.micro_batch_tokens(place.device),
            seed=0,
            report_to=[],
            what=f"w={W}",
            checkpoints=Path(folder) / "checkpoints",
        )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    return {
        "seconds": time.perf_counter() - begun,
        "steps": result.steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


PARTS: dict[Callable[[Place], dict[str, Any]], float] = {
    kernels: 20,
    training_step: 120,
    reference_step: 60,
    noise: 40,
    decoding: 60,
    merging: 40,
    scoring: 30,
    training: 60,
}
"""The parts, the most important first, and the seconds each of them may need."""


def _parse(arguments: Items[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="The parts that matter on a GPU.")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="skip what would take longer")
    parser.add_argument("--part", action="append", choices=[part.__name__ for part in PARTS], help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here, after each part")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU, with a tiny model")
    return parser.parse_args(arguments)


def main(arguments: Items[str]) -> None:
    """Run the parts one after another; raises HelpsteerError where there is no GPU or a part failed."""
    options = _parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise HelpsteerError("torch sees no CUDA device here; --tiny rehearses on a CPU")
    place = Place(torch.device("cpu" if options.tiny else "cuda"), options.tiny)
    end = time.perf_counter() + options.budget
    results: dict[str, Any] = {**describe_machine(place.device), "parts": {}}
    failed = []
    for part, wanted in PARTS.items():
        name, begun = part.__name__, time.perf_counter()
        if options.part and name not in options.part:
            continue
        if not options.tiny and end - begun < wanted:
            result: dict[str, Any] = {"skipped": f"{end - begun:.0f} s are left, and it may need {wanted:.0f}"}
        else:
            try:
                result = part(place)
            except Exception as error:  # of any kind: the other parts have to run
                result = {"failed": in_words(error), "traceback": traceback.format_exc()}
                failed.append(name)
            place.clean()
        results["parts"][name] = result | {"wall_seconds": time.perf_counter() - begun}
        print(f"{as_text(name.replace('_', ' '), results['parts'][name])}\n", flush=True)
        if options.json is not None:
            write_json(results, options.json)
    if failed:
        raise HelpsteerError(f"{len(failed)} part(s) failed: {', '.join(failed)}; the report above says why")


def _lora(model: PreTrainedModel, dropout: float = 0.0, std_of_b: float = 0.0) -> PeftModel:
    policy = attach_lora(model, Lora(dropout=dropout, target_modules=list(ATTENTION)), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std_of_b)
    return policy


def _sequences(pair: Pair) -> tuple[Sequence, Sequence]:
    return ours.sequence_of(pair.prompt_ids, pair.chosen_ids), ours.sequence_of(pair.prompt_ids, pair.rejected_ids)


def _ids(model: PreTrainedModel, count: int) -> np.ndarray:
    return torch.randint(5, model.config.vocab_size, (count,), dtype=torch.int32).numpy()


def _scores(model: PreTrainedModel, sequences: list[Sequence], batch_tokens: int = SCORING_TOKENS) -> np.ndarray:
    return np.array(score_sequences(model, sequences, batch_tokens=batch_tokens)[BASE])


def _rms(differences: np.ndarray) -> float:
    return float(np.sqrt(np.mean(differences**2)))


def _synchronisations(step: Callable[[], object]) -> list[str]:
    """Lines of code at which a step waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{warning.filename}:{warning.lineno}" for warning in caught if "synchron" in str(warning.message)})

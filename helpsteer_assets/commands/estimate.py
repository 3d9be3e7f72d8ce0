"""The cost of an experiment before it is run: tokens, FLOPs and time of each stage that computes with the model.

A forward pass takes 2 FLOPs for each weight and token, so 2 N T for N weights and T tokens. Training a LoRA takes
4 N T: the backward pass goes through the frozen weights (2 N T) and computes no gradient of them, which would be the
other 2 N T of the 6 N T in Kaplan et al., "Scaling Laws for Neural Language Models", 2020. Attention and the LoRA's own
weights are left out.

Work becomes time by a rate in FLOP/s that was measured: in this home, where the same stage has finished with a model of
the same size on the same device, else in a matrix product, which is faster than any model.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpsteer_assets.experiment.settings import Experiment, TrainingSettings
from helpsteer_assets.modpo.data.pairs import SPLITS, count_texts
from helpsteer_assets.modpo.settings import Training
from helpsteer_assets.modpo.training.schedule import count_steps, evaluation_interval
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.home import Home

if TYPE_CHECKING:
    import torch

_TRAININGS = {"sft_model": "sft", "margin_adapter": "margin_adapter", "modpo_models": "modpo"}
"""Stages that train, and the section of their settings."""
_USE_MARGIN_ADAPTER = ("margin_rewards", "sft_scores", "scores")
"""Stages that compute with the margin adapter if there is one, and so do less under a length penalty."""
_SAME_SIZE = 0.02
"""Two models whose files differ by less than this share count as equally large."""


@dataclass(frozen=True)
class Pairs:
    """A file of pairs (PAIRS_SCHEMA), and how many it has of each split."""

    file: Path
    counts: dict[str, int]


@dataclass(frozen=True)
class Work:
    """The work of one stage; for a stage with one partition per weight, of one weight."""

    rows: float
    """Pairs or sequences trained on, responses scored, or answers generated."""
    tokens: float
    flops: float
    each_weight: bool = False


def estimate(
    experiment: Experiment,
    weights_per_token: int,
    preference: Pairs,
    margin: Pairs | None,
    lengths: np.ndarray,
    asked: np.ndarray,
) -> dict[str, Work]:
    """The work of each stage that computes with the model, in the order of a run. Early stopping is not foreseen.

    `weights_per_token` is N; under a length penalty there are no `margin` pairs. `lengths` are the tokens of (prompt,
    response) of some responses, uncut, [responses, 2]; `asked` those of each evaluation prompt, uncut.
    """
    n, model, generation = weights_per_token, experiment.model, experiment.generation
    prompts = np.minimum(lengths[:, 0], model.max_prompt_length)
    prompt, response = prompts.mean(), np.minimum(lengths[:, 1], model.max_length - prompts).mean()
    answers = len(asked)
    # Nobody knows how long answers will be: taken are the lengths of the source's responses.
    answered = np.minimum(asked, generation.max_prompt_length).sum()
    answered += answers * np.minimum(lengths[:, 1], generation.max_new_tokens).mean()

    def read(*pairs: Pairs, splits: tuple[str, ...] = SPLITS) -> tuple[int, float]:
        """How many responses these pairs have, and their tokens with each prompt once."""
        count, responses = count_texts(*(each.file for each in pairs), splits=splits)
        return responses, count * prompt + responses * response

    def train(settings: TrainingSettings, items: int, item_tokens: float, held_out: float, *, w: bool = False) -> Work:
        plain = settings.plain(Training)
        steps = count_steps(plain, items)
        rows = steps * settings.batch_size * settings.accumulation
        evaluated = steps // evaluation_interval(plain, steps) * held_out
        passes = 6 if settings.gradient_checkpointing else 4  # checkpointing does the forward pass twice
        flops = n * (passes * rows * item_tokens + 2 * evaluated)
        return Work(rows, rows * item_tokens + evaluated, flops, w)

    def score(responses: int, tokens: float, *, models: int = 1, w: bool = False) -> Work:
        return Work(responses, models * tokens, 2 * n * models * tokens, w)

    both = (preference,) if margin is None else (preference, margin)
    pair = prompt + 2 * response
    works: dict[str, Work] = {}
    if experiment.sft.enabled:
        _, chosen = count_texts(preference.file, splits=("train",), sides=("chosen",))
        _, selected = count_texts(preference.file, splits=("selection",), sides=("chosen",))
        works["sft_model"] = train(experiment.sft, chosen, prompt + response, selected * (prompt + response))
    works["reference_log_probs"] = score(*read(*both))
    if margin is not None and experiment.margin_adapter is not None:
        _, held_out = read(margin, splits=("selection",))
        works["margin_adapter"] = train(experiment.margin_adapter, margin.counts["train"], pair, held_out)
        works["margin_adapter_quality"] = score(*read(margin, splits=("validation",)))
        works["margin_rewards"] = score(*read(preference))
    works["sft_generations"] = score(answers, answered)
    if margin is not None:
        works["sft_scores"] = score(answers, answered, models=2)
    _, held_out = read(preference, splits=("selection",))
    works["modpo_models"] = train(experiment.modpo, preference.counts["train"], pair, held_out, w=True)
    works["generations"] = score(answers, answered, w=True)
    works["scores"] = score(answers, answered, models=2 if margin is None else 3, w=True)
    if samples := experiment.evaluation.kl_samples:
        # Drawn by the policy, then read by the policy and by the SFT model.
        works["kl_to_sft"] = score(samples * answers, samples * answered, models=3, w=True)
    return works


def measured_rates(home: Home, works: dict[str, Work], model_bytes: int, device: str) -> dict[str, float]:
    """FLOP/s by stage, of stages that this home has finished with a model of the same size; the newest of each counts.

    `works` says what the rows of each stage cost; `model_bytes` is the size of the model's weights in its precision;
    `device` is `cpu`, or the GPU's name.
    """
    rates: dict[str, float] = {}
    same_model = set()
    for manifest in _finished(home, "sft_model"):
        files = manifest["files"].items()
        size = sum(entry["bytes"] for name, entry in files if name.endswith(".safetensors"))
        if abs(size - model_bytes) < _SAME_SIZE * model_bytes:
            same_model.add(manifest["fingerprint"])
    for stage, work in works.items():
        for manifest in _finished(home, stage):
            base = manifest["fingerprint"] if stage == "sft_model" else manifest["inputs"]["sft_model"][ALL]
            rows = _rows(stage, manifest)
            comparable = base in same_model and manifest["environment"]["device"] == device
            if stage in _USE_MARGIN_ADAPTER:
                comparable &= ("margin_adapter" in manifest["inputs"]) == ("margin_adapter" in works)
            # A resumed stage's duration is that of its last attempt alone.
            if rows and work.rows and comparable and not manifest["resumed"]:
                rates[stage] = work.flops / work.rows * rows / max(manifest["duration_s"], 1e-3)
    return rates


def _finished(home: Home, stage: str) -> list[dict[str, Any]]:
    """Manifests of a stage's finished artifacts, the newest last."""
    store = home.store
    folders = [path for path in (store.artifacts / stage).glob("*/*") if "." not in path.name]
    found = [store.find(stage, folder.parent.name, folder.name) for folder in folders]
    manifests = [artifact.manifest for artifact in found if artifact is not None]
    return sorted((m for m in manifests if "environment" in m), key=lambda manifest: manifest["created_at"])


def _rows(stage: str, manifest: dict[str, Any]) -> float | None:
    """How many rows a finished stage worked on; None where its manifest does not say."""
    metrics, settings, section = manifest["metrics"], manifest["settings"], _TRAININGS.get(stage)
    if section is None:
        return metrics.get("samples") or metrics.get("responses")
    if not metrics:  # sft.enabled was false
        return None
    return metrics["steps"] * settings[f"{section}.batch_size"] * settings[f"{section}.accumulation"]


def product_rate(device: "torch.device", precision: str) -> float:
    """FLOP/s of a large matrix product on a device, measured in a fraction of a second."""
    import torch

    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    (matrix @ matrix)[0, 0].item()  # the first finds cold caches; reading a number waits for the device
    begun, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < 0.2:
        (matrix @ matrix)[0, 0].item()
        products += 1
    return products * 2 * size**3 / passed

"""The library's side of the comparison: the calls that its stages make."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel

from benchmarks.pairs import Pair
from benchmarks.reference_procedure import MARGIN, MARGIN_BETA
from helpsteer_assets.modpo.models.loading import attach_lora, batch_tokens, load_adapters, scoring_batch_tokens
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.log_probs import BASE, score_sequences
from helpsteer_assets.modpo.settings import Compute, Lora
from helpsteer_assets.modpo.training.preference import PairCollator, PreferencePair, pair_losses

_Key = tuple[tuple[int, ...], tuple[int, ...]]


def micro_batch_tokens(device: torch.device) -> int:
    """Tokens that go through the model at once in training."""
    return batch_tokens(Compute(), device)


def load_policy(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The policy as training starts from it, with the weights of an adapter."""
    config = LoraConfig.from_pretrained(adapter)
    lora = Lora(config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules))
    model = attach_lora(base, lora, seed=0)
    set_peft_model_state_dict(model, load_peft_weights(str(adapter), device=str(base.device)))
    return model


def load_scorer(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The SFT model with the margin adapter."""
    return load_adapters(base, {MARGIN: adapter})


def make_table(scorer: PeftModel, pairs: Items[Pair]) -> list[PreferencePair]:
    """Pairs as training gets them: every unique (prompt, response) scored once by both models."""
    unique = {key: sequence_of(*key) for pair in pairs for key in _keys(pair)}
    scored = _score(scorer, list(unique.values()))
    reference = dict(zip(unique, scored[BASE], strict=True))
    margins = {key: MARGIN_BETA * (margin - reference[key]) for key, margin in zip(unique, scored[MARGIN], strict=True)}
    made = []
    for pair in pairs:
        chosen, rejected = _keys(pair)
        made.append(
            PreferencePair(
                unique[chosen],
                unique[rejected],
                reference[chosen],
                reference[rejected],
                margins[chosen],
                margins[rejected],
            )
        )
    return made


def training_step(model: PeftModel, pairs: list[PreferencePair], *, w: float, beta: float) -> torch.Tensor:
    """Accumulate the gradient of the mean loss; returns [pairs], the loss of each before the step."""
    model.train()
    losses = []
    for inputs in _micro_batches(pairs, model.device):
        of_micro_batch = pair_losses(model, inputs, w=w, beta=beta)
        (of_micro_batch.sum() / len(pairs)).backward()
        losses.append(of_micro_batch.detach())
    return torch.cat(losses)


@torch.no_grad()
def validation(model: PeftModel, pairs: list[PreferencePair], *, w: float, beta: float) -> torch.Tensor:
    """[pairs], the MODPO loss of each."""
    model.eval()
    return torch.cat([pair_losses(model, inputs, w=w, beta=beta) for inputs in _micro_batches(pairs, model.device)])


def margin_log_ratios(scorer: PeftModel, records: Items[tuple[list[int], list[int]]]) -> torch.Tensor:
    """log p_margin - log p_sft of (prompt, response) records: [records], nats."""
    scored = _score(scorer, [sequence_of(prompt, response) for prompt, response in records])
    return torch.tensor(scored[MARGIN], dtype=torch.float64) - torch.tensor(scored[BASE], dtype=torch.float64)


def _score(scorer: PeftModel, sequences: list[Sequence]) -> dict[str, list[float]]:
    tokens = scoring_batch_tokens(Compute(), scorer.device)
    return score_sequences(scorer, sequences, adapters=(BASE, MARGIN), batch_tokens=tokens)


def _micro_batches(pairs: list[PreferencePair], device: torch.device) -> Iterator[dict[str, Any]]:
    for inputs in PairCollator(micro_batch_tokens(device))(pairs)["micro_batches"]:
        yield {name: inputs[name].to(device) for name in ("trees", "rows", "reference", "margin")}


def _keys(pair: Pair) -> tuple[_Key, _Key]:
    prompt = tuple(pair.prompt_ids)
    return (prompt, tuple(pair.chosen_ids)), (prompt, tuple(pair.rejected_ids))


def sequence_of(prompt: Items[int], response: Items[int]) -> Sequence:
    """Token ids as the library holds them."""
    return Sequence(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))

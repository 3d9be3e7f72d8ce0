"""Summed log-probabilities of responses: log p(y|x), the end-of-text token included."""

from collections.abc import Sequence as Items
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from helpsteer_assets.modpo.batching import Batch, collate, plan_batches
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.resumable import ResumableRows
from helpsteer_assets.modpo.tokenization import Sequence

SCORING_BATCH_TOKENS = 8192
"""Padded tokens in one scoring batch."""

BASE = "base"
"""Stands for the model with its adapters switched off."""


def response_log_probs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """log p(y|x) of each response.

    Args:
        model: a causal language model.
        batch: padded sequences [batch, length].

    Returns:
        [batch] float64, in nats: the sum over the response's tokens. Token terms are computed in fp32 (fp64 for an
        fp64 model) and summed in fp64, since differences of sums of hundreds of terms are what the loss is made of.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    targets = batch.response_mask[:, 1:]  # position t predicts token t + 1
    chosen = logits[:, :-1][targets]
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    token_log_probs = -F.cross_entropy(chosen, batch.input_ids[:, 1:][targets], reduction="none")
    sums = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=logits.device)
    return sums.index_add(0, targets.nonzero()[:, 0], token_log_probs.double())


@torch.inference_mode()
def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Items[Sequence],
    *,
    pad_id: int,
    adapters: Items[str] = (BASE,),
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> dict[str, list[float]]:
    """Summed response log-probabilities of every sequence under the model with each adapter.

    Args:
        model: the model, with `adapters` loaded where other than `BASE` is asked for.
        sequences: what to score.
        pad_id: padding token id.
        adapters: adapter names; `BASE` for the model without any.
        progress: called after each batch with the sequences done.
        checkpoint: a file that keeps finished batches, from which a killed scoring goes on.

    Returns:
        per adapter one log-probability (nats) per sequence, in their order.
    """
    model.eval()
    rows = ResumableRows(checkpoint)
    found = {int(row["index"]): row["log_probs"] for row in rows.read()}
    for indices in plan_batches([len(sequence) for sequence in sequences], SCORING_BATCH_TOKENS):
        if all(index in found for index in indices):
            continue
        batch = collate([sequences[index] for index in indices], pad_id).to(model.device)
        by_adapter = [_under(model, adapter, batch) for adapter in adapters]
        finished = [
            {"index": index, "log_probs": list(values)}
            for index, values in zip(indices, zip(*by_adapter, strict=True), strict=True)
        ]
        rows.append(finished)
        found |= {row["index"]: row["log_probs"] for row in finished}
        progress(len(found), len(sequences))
    return {
        adapter: [found[index][column] for index in range(len(sequences))] for column, adapter in enumerate(adapters)
    }


def _under(model: PreTrainedModel | PeftModel, adapter: str, batch: Batch) -> list[float]:
    switched_off = nullcontext()
    if isinstance(model, PeftModel):
        if adapter == BASE:
            switched_off = model.disable_adapter()
        else:
            model.set_adapter(adapter, inference_mode=True)
    with switched_off:
        return response_log_probs(model, batch).tolist()

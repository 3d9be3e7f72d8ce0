"""The procedure that the library is measured against, written for this comparison.

Per pair and step: chosen and rejected responses padded to one batch of two; the policy with gradient checkpointing,
logits of all positions in fp32; the reference model, by the adapter switched off; the margin adapter; the reference
model once more, for the margin; then backward. Micro-batches of one pair, eight of which make an optimizer step.
Validation runs the same four forwards; generated responses are scored one record at a time. Responses end with the
end-of-text token; there is no dropout.

`exact_step` gives the truth that rounding errors are measured by.
"""

from collections.abc import Sequence as Items

import torch
import torch.nn.functional as F
from peft import PeftModel

from benchmarks.pairs import END_OF_TEXT, Pair

POLICY = "default"
"""Name of the adapter that is trained."""
MARGIN = "margin"
"""Name of the adapter whose log-ratio is the margin reward."""
MARGIN_BETA = 0.1
_IGNORE = -100


def training_step(model: PeftModel, pairs: Items[Pair], *, w: float, beta: float) -> torch.Tensor:
    """Accumulate the gradient of the mean MODPO loss in the policy's adapter.

    Args:
        model: with the adapters `POLICY` and `MARGIN`.
        pairs: those of one optimizer step.
        w: weight of the preference in (0, 1].
        beta: MODPO's beta.

    Returns:
        [pairs], the loss of each, before the step.
    """
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = []
    for pair in pairs:
        loss = _pair_loss(model, pair, w=w, beta=beta)
        (loss / len(pairs)).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def validation(model: PeftModel, pairs: Items[Pair], *, w: float, beta: float) -> torch.Tensor:
    """[pairs], the MODPO loss of each."""
    model.eval()
    return torch.stack([_pair_loss(model, pair, w=w, beta=beta) for pair in pairs])


@torch.no_grad()
def reference_and_margin(model: PeftModel, pairs: Items[Pair]) -> torch.Tensor:
    """The three forwards of each pair that do not depend on the policy, alone.

    Returns:
        [2, pairs, 2]: log p_sft, then log p_margin, of the chosen and the rejected response, nats.
    """
    model.eval()
    rows = []
    for pair in pairs:
        reference, margin, _ = _fixed_log_probs(model, _pair_batch(pair, model.device))
        rows.append(torch.stack([reference, margin]))
    return torch.stack(rows, dim=1)


def exact_step(model: PeftModel, pairs: Items[Pair], *, w: float, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`training_step` on a model in fp64, without what the procedure does twice or again.

    Returns:
        [pairs] losses, and [pairs, 2] log p_sft of the chosen and the rejected responses.
    """
    references, margins = reference_and_margin(model, pairs)
    losses = []
    for pair, reference, margin in zip(pairs, references, margins, strict=True):
        policy = _sequence_log_probs(model, _pair_batch(pair, model.device))
        loss = _modpo_loss(policy, reference, margin, reference, w=w, beta=beta)
        (loss / len(pairs)).backward()
        losses.append(loss.detach())
    return torch.stack(losses), references


@torch.no_grad()
def margin_log_ratios(model: PeftModel, records: Items[tuple[list[int], list[int]]]) -> torch.Tensor:
    """log p_margin - log p_sft of (prompt, response) records, one at a time: [records], nats."""
    model.eval()
    ratios = []
    for record in records:
        batch = _batch([record], model.device)
        model.set_adapter(MARGIN)
        margin = _sequence_log_probs(model, batch)
        with model.disable_adapter():
            reference = _sequence_log_probs(model, batch)
        ratios.append((margin - reference).squeeze(0))
    model.set_adapter(POLICY)
    return torch.stack(ratios)


_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""input_ids, attention_mask and labels, each [batch, length]."""


def _pair_loss(model: PeftModel, pair: Pair, *, w: float, beta: float) -> torch.Tensor:
    batch = _pair_batch(pair, model.device)
    policy = _sequence_log_probs(model, batch)
    with torch.no_grad():
        fixed = _fixed_log_probs(model, batch)
    return _modpo_loss(policy, *fixed, w=w, beta=beta)


def _modpo_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    margin: torch.Tensor,
    margin_reference: torch.Tensor,
    *,
    w: float,
    beta: float,
) -> torch.Tensor:
    """The loss of one pair; log-probabilities are [2], of chosen and rejected."""
    rewards = beta * (policy - reference) - (1 - w) * MARGIN_BETA * (margin - margin_reference)
    chosen, rejected = rewards / w
    return -F.logsigmoid(chosen - rejected)


def _fixed_log_probs(model: PeftModel, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of reference, margin adapter, and reference once more."""
    with model.disable_adapter():
        reference = _sequence_log_probs(model, batch)
    model.set_adapter(MARGIN)
    margin = _sequence_log_probs(model, batch)
    model.set_adapter(POLICY)
    with model.disable_adapter():
        margin_reference = _sequence_log_probs(model, batch)
    return reference, margin, margin_reference


def _pair_batch(pair: Pair, device: torch.device) -> _Batch:
    return _batch([(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)], device)


def _batch(sequences: Items[tuple[list[int], list[int]]], device: torch.device) -> _Batch:
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, mask, labels = [], [], []
    for prompt, response in sequences:
        padding = width - len(prompt) - len(response)
        ids.append(prompt + response + [END_OF_TEXT] * padding)
        mask.append([1] * (width - padding) + [0] * padding)
        labels.append([_IGNORE] * len(prompt) + response + [_IGNORE] * padding)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), torch.tensor(labels, device=device)


def _sequence_log_probs(model: PeftModel, batch: _Batch) -> torch.Tensor:
    """[batch] log p(y|x), summed in the logits' precision: at least fp32."""
    input_ids, attention_mask, labels = batch
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    if logits.dtype != torch.float64:
        logits = logits.float()
    targets = labels[:, 1:]
    is_response = targets != _IGNORE
    picked = logits[:, :-1].log_softmax(-1).gather(-1, targets.where(is_response, 0).unsqueeze(-1)).squeeze(-1)
    return (picked * is_response).sum(-1)

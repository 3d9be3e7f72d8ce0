"""Summed log-probabilities of responses: log p(y|x), the end-of-text token included.

`padded_log_probs` is the plain way: every sequence by itself, padded, all logits. `response_log_probs` computes the
same numbers from packed prompt trees and with a fused head, as far as the model allows it. That is tried out once per
model on a small tree, against the plain way.
"""

import logging
import math
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.rows import ResumableRows
from helpsteer_assets.modpo.models.loading import in_words
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.scoring.batching import Batch, collate
from helpsteer_assets.modpo.scoring.log_prob_head import find_head
from helpsteer_assets.modpo.scoring.tree_attention import TreeLayout, check_layers, require_varlen, tree_attention
from helpsteer_assets.modpo.scoring.trees import TreeBatch, pack, plan_trees, unpack

logger = logging.getLogger(__name__)

SCORING_BATCH_TOKENS = 8192
"""Tokens in one scoring batch."""

BASE = "base"
"""The name for the model with its adapters switched off."""


@dataclass(frozen=True)
class Method:
    """How a model's log-probabilities are computed."""

    kernel: str | None
    """The kernel of `tree_attention`, `varlen` or `split`; None: from padded batches, without trees."""
    fused: bool = False
    """Whether by a `LogProbHead`, where the head is frozen; else by the model's own head at the predicted positions."""

    def __str__(self) -> str:
        if self.kernel is None:
            return "from padded batches"
        return f"from prompt trees ({self.kernel} attention, {'fused' if self.fused else 'its own'} head)"


PADDED = Method(None)

_methods: WeakKeyDictionary[PreTrainedModel, Method] = WeakKeyDictionary()


def padded_log_probs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """log p(y|x) of each response, the plain way.

    Args:
        model: a causal language model.
        batch: padded sequences [batch, length].

    Returns:
        [batch] float64, in nats: the sum over the response's tokens. Token terms are computed in fp32 (fp64 for an
        fp64 model) and summed in fp64, because the loss is made of differences of such sums.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    targets = batch.response_mask[:, 1:]  # position t predicts token t + 1
    chosen = logits[:, :-1][targets]
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    token_log_probs = -F.cross_entropy(chosen, batch.input_ids[:, 1:][targets], reduction="none")
    return _sums(token_log_probs, targets.nonzero()[:, 0], len(batch.input_ids))


def response_log_probs(model: torch.nn.Module, batch: TreeBatch) -> torch.Tensor:
    """log p(y|x) of each response of the trees: [responses] float64, in nats, the numbers of `padded_log_probs`.

    Where the backward pass recomputes activations, it must run within `attention_for(model)`, too.
    """
    return log_probs_by(method_for(model), model, batch)


def attention_for(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A context in which the model attends as in `response_log_probs`."""
    by_tree = method_for(model) != PADDED
    return tree_attention(_language_model(model)) if by_tree else nullcontext()


def log_probs_by(method: Method, model: torch.nn.Module, batch: TreeBatch) -> torch.Tensor:
    """`response_log_probs` by a given method."""
    if method.kernel is None:
        return padded_log_probs(model, collate(unpack(batch), pad_id=0).to(batch.input_ids.device))
    language_model = _language_model(model)
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "tree": TreeLayout(batch, method.kernel),
    }
    head = find_head(language_model) if method.fused else None
    with tree_attention(language_model):
        if head is not None:
            hidden = language_model.base_model(**inputs).last_hidden_state[0]
            token_log_probs = head(hidden.index_select(0, batch.predictors), batch.targets)
        else:
            logits = language_model(**inputs, logits_to_keep=batch.predictors).logits[0]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            token_log_probs = -F.cross_entropy(logits, batch.targets, reduction="none")
    return _sums(token_log_probs, batch.rows, batch.responses)


def _sums(token_log_probs: torch.Tensor, rows: torch.Tensor, responses: int) -> torch.Tensor:
    sums = torch.zeros(responses, dtype=torch.float64, device=token_log_probs.device)
    return sums.index_add(0, rows, token_log_probs.double())


def method_for(model: torch.nn.Module) -> Method:
    """The fastest method that gives this model's numbers; tried out once per model."""
    language_model = _language_model(model)
    if language_model not in _methods:
        _methods[language_model] = _find_method(language_model)
    return _methods[language_model]


@torch.no_grad()
def _find_method(model: PreTrainedModel) -> Method:
    vocabulary = model.get_input_embeddings().num_embeddings
    # A prompt with three responses, one of them a single token, and a second prompt.
    ids = ((7 * np.arange(24) + 3) % vocabulary).astype(np.int32)
    sequences = [Sequence(ids[:6], ids[6:10]), Sequence(ids[:6], ids[11:12]), Sequence(ids[:6], ids[12:18])]
    sequences.append(Sequence(ids[18:21], ids[21:]))
    batch = pack(sequences)[0].to(model.device)
    in_16_bits = model.dtype in (torch.bfloat16, torch.float16)
    kernels = ("varlen", "split") if in_16_bits and model.device.type == "cuda" else ("split",)
    problems: dict[str, Method] = {}
    training = model.training
    model.eval()
    truth = log_probs_by(PADDED, model, batch)
    tolerance = (5e-2 if in_16_bits else 1e-4) * (1 + truth.abs())
    for method in (Method(kernel, fused) for kernel in kernels for fused in (True, False)):
        try:
            _require_agreement(method, model, batch, truth, tolerance)
            break
        except Exception as error:  # of any kind: a kernel or the model's own code raises it
            problems.setdefault(in_words(error), method)
    else:
        method = PADDED
    model.train(training)
    if problems:
        why = "; ".join(f"not {refused}: {problem}" for problem, refused in problems.items())
        logger.warning("%s: log-probabilities are computed %s, %s", type(model).__name__, method, why)
    return method


def _require_agreement(
    method: Method, model: PreTrainedModel, batch: TreeBatch, truth: torch.Tensor, tolerance: torch.Tensor
) -> None:
    """Raise an error unless a method gives the log-probabilities `truth` [responses], up to `tolerance`."""
    config = model.config.get_text_config()
    if method.kernel == "varlen":
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        require_varlen(model.device, model.dtype, heads, getattr(config, "num_key_value_heads", None) or heads, size)
    # A layer that does not attend by the tree may change the numbers of so small a batch too little to be noticed.
    layout = TreeLayout(batch, "split")
    with tree_attention(model):
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, tree=layout)
    check_layers(config, layout.windows)
    difference = (log_probs_by(method, model, batch) - truth).abs()
    if not bool((difference <= tolerance).all()):
        raise ValueError(f"they differ by up to {difference.max().item():.2g} nats")


def _language_model(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.inference_mode()
def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Items[Sequence],
    *,
    adapters: Items[str] = (BASE,),
    batch_tokens: int = SCORING_BATCH_TOKENS,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> dict[str, list[float]]:
    """Summed response log-probabilities of every sequence under the model with each adapter.

    Responses to one prompt are scored in one tree, and equal ones once.

    Args:
        model: the model, with `adapters` loaded where other than `BASE` is asked for.
        sequences: what to score.
        adapters: adapter names; `BASE` for the model without any.
        batch_tokens: tokens in one forward pass.
        progress: called after each batch with the sequences done.
        checkpoint: a file that keeps finished batches, from which a killed scoring goes on.

    Returns:
        per adapter one log-probability (nats) per sequence, in their order.

    Raises:
        HelpsteerError: a sequence holds a token that the model does not embed, or a log-probability is not finite.
    """
    _check_token_ids(model, sequences)
    model.eval()
    kept = ResumableRows(checkpoint)
    scored = {int(row["index"]): row["log_probs"] for row in kept.read()}
    for indices in plan_trees(sequences, batch_tokens):
        if all(index in scored for index in indices):
            continue
        batch, rows = pack(sequences[index] for index in indices)
        batch = batch.to(model.device)
        by_adapter = torch.stack([_under(model, adapter, batch) for adapter in adapters], dim=1).tolist()
        _check_finite(by_adapter, adapters, _language_model(model).dtype)
        finished = [{"index": index, "log_probs": by_adapter[row]} for index, row in zip(indices, rows, strict=True)]
        kept.append(finished)
        scored |= {row["index"]: row["log_probs"] for row in finished}
        progress(len(scored), len(sequences))
    return {
        adapter: [scored[index][column] for index in range(len(sequences))] for column, adapter in enumerate(adapters)
    }


def _check_token_ids(model: torch.nn.Module, sequences: Items[Sequence]) -> None:
    embeddings = _language_model(model).get_input_embeddings().num_embeddings
    largest = max((int(max(s.prompt_ids.max(initial=0), s.response_ids.max(initial=0))) for s in sequences), default=0)
    if largest >= embeddings:
        raise HelpsteerError(
            f"a text holds the token id {largest}, and the model embeds ids 0 to {embeddings - 1} only: its tokenizer "
            "is another model's, or was extended without the model; correct the files of model.base"
        )


def _check_finite(rows: list[list[float]], adapters: Items[str], dtype: torch.dtype) -> None:
    """`rows`: [responses][adapters], nats."""
    for name, column in zip(adapters, zip(*rows, strict=True), strict=True):
        broken = [value for value in column if not math.isfinite(value)]
        if broken:
            whose = "the model itself" if name == BASE else f"the adapter `{name}`"
            raise HelpsteerError(
                f"{len(broken)} of {len(column)} responses in a batch have the log-probability {broken[0]} under "
                f"{whose}: weights that are not finite, or activations that overflow in {dtype}. Set model.precision: "
                "fp32, or lower the learning_rate of the training that made the weights"
            )


def _under(model: PreTrainedModel | PeftModel, adapter: str, batch: TreeBatch) -> torch.Tensor:
    switched_off = nullcontext()
    if isinstance(model, PeftModel):
        if adapter == BASE:
            switched_off = model.disable_adapter()
        else:
            model.set_adapter(adapter, inference_mode=True)
    with switched_off:
        return response_log_probs(model, batch)

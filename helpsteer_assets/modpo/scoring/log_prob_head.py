"""The output layer fused with the log-probability of given tokens.

A loss over responses needs one number per token out of a row of vocabulary size. Here the logits are made for a chunk
of rows at a time, and the gradient with respect to the hidden states is made in the forward pass, while the chunk is in
memory: two matrix products per chunk, nothing recomputed, nothing of size [tokens, vocabulary] kept. This works because
all later operations, per-sequence sums and a scalar loss, multiply the gradient of each token by one number.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 2**24
"""Logits (rows times vocabulary) that are in memory at once."""


@dataclass(frozen=True)
class LogProbHead:
    """The output layer of a model: logits = softcap(scale * (h W^T + bias)) of hidden states h."""

    weight: torch.Tensor
    """[vocabulary, hidden]"""
    bias: torch.Tensor | None = None
    """[vocabulary]"""
    scale: float = 1.0
    """Multiplies the logits (Cohere's `logit_scale`; one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """c of c * tanh(logits / c) (Gemma 2's `final_logit_softcapping`)."""

    def __call__(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probability of each target, nats.

        Args:
            hidden: [tokens, hidden] last hidden states.
            targets: [tokens] token ids.

        Returns:
            [tokens] float64. Logits and probabilities are computed in fp32 (in fp64 for fp64 hidden states). The result
            is not rounded to fp32, because sums of hundreds of tokens are subtracted from each other.
        """
        return _LogProb.apply(hidden, targets, self)


def find_head(model: PreTrainedModel) -> LogProbHead | None:
    """The head of a model, or None where it is not a linear layer or is trained.

    A model may change its logits in ways that its config does not tell: the caller has to compare the results.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    config = model.config.get_text_config()
    return LogProbHead(
        layer.weight,
        layer.bias,
        scale=(getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: LogProbHead) -> torch.Tensor:
        accurate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_probs = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = min(len(hidden), max(1, CHUNK_ELEMENTS // len(head.weight)))
        # Allocated once for all chunks: the system hands out memory of this size slowly, page by page.
        memory = torch.empty(2, rows, len(head.weight), dtype=accurate, device=hidden.device)
        for start in range(0, len(hidden), max(rows, 1)):
            part = slice(start, start + rows)
            chunk, of_chunk = hidden[part], targets[part, None]
            logits, probabilities = memory[:, : len(chunk)]
            if hidden.dtype == accurate:
                torch.mm(chunk, head.weight.t(), out=logits)
            else:
                logits.copy_(chunk @ head.weight.t())
            if head.bias is not None:
                logits += head.bias
            if head.scale != 1:
                logits *= head.scale
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_()  # its slope is 1 minus its square
                slope = 1 - logits.square() if gradient is not None else None
                logits *= head.softcap
            torch.softmax(logits, dim=1, out=probabilities)
            # log sum exp = logit - log p for every token; the most probable one has the most accurate p.
            log_sum = logits.amax(1).double() - probabilities.amax(1).double().log()
            log_probs[part] = logits.gather(1, of_chunk)[:, 0].double() - log_sum
            if gradient is None:
                continue
            # d log p(target) / d logits = one-hot(target) - p
            by_logit = probabilities.neg_()
            by_logit.scatter_add_(1, of_chunk, torch.ones_like(of_chunk, dtype=accurate))
            if head.softcap is not None:
                by_logit *= slope
            if head.scale != 1:
                by_logit *= head.scale
            torch.mm(by_logit.to(hidden.dtype), head.weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None

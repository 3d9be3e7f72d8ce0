"""The least time that a training step's matrix products can take: what is above it is overhead.

With LoRA the base weights get no gradient, so that forward and backward of a linear layer of N weights cost 2 N FLOPs
a token each: `4 B T + 4 H (C + R)` FLOPs a pair, for the body's B weights on T = prompt + chosen + rejected tokens and
the head's H weights on the C + R response tokens. Attention, LoRA and everything elementwise are not counted.
"""

import statistics
from collections.abc import Sequence as Items

import torch
from transformers import PreTrainedModel

from benchmarks.pairs import Pair
from benchmarks.timing import seconds


class GemmFloor:
    """The floor of a model's training step, at a rate that is measured in turns with the step."""

    def __init__(self, base: PreTrainedModel) -> None:
        """`base`: the model; adapters in it don't count."""
        head = base.get_output_embeddings().weight
        self._device = head.device
        self._head_weights = head.numel()
        self._body_weights = sum(
            module.weight.numel()
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module.weight is not head and ".lora_" not in name
        )
        self._size, self._repeats = (2048, 2) if self._device.type == "cpu" else (8192, 20)
        self._factor = torch.randn(self._size, self._size, device=head.device, dtype=head.dtype)
        self._product = torch.empty_like(self._factor)  # taking memory is no part of the product
        self._rates: list[float] = []
        self._multiply()  # the first call finds cold caches

    def measure(self) -> None:
        """Time a large square product."""
        taken = statistics.median(seconds(self._multiply, self._device) for _ in range(self._repeats))
        self._rates.append(2 * self._size**3 / taken)

    @property
    def rate(self) -> float:
        """FLOP/s of large square products."""
        return statistics.median(self._rates)

    def flops(self, pairs: Items[Pair]) -> int:
        """FLOPs of a step on these pairs."""
        tokens, response_tokens = count_tokens(pairs)
        return 4 * (self._body_weights * tokens + self._head_weights * response_tokens)

    def _multiply(self) -> None:
        torch.mm(self._factor, self._factor.t(), out=self._product)


def count_tokens(pairs: Items[Pair]) -> tuple[int, int]:
    """Tokens of the pairs, each prompt once, and those of them in responses."""
    response_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    return response_tokens + sum(len(pair.prompt_ids) for pair in pairs), response_tokens

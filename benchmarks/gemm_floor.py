"""The least time that a training step's matrix products can take: what is above it is overhead.

With LoRA the base weights get no gradient, so that forward and backward of a linear layer of N weights cost 2 N FLOPs
a token each: `4 B T + 4 H (C + R)` FLOPs a pair, for the body's B weights on T = prompt + chosen + rejected tokens and
the head's H weights on the C + R response tokens. Attention, LoRA and everything elementwise are not counted.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from transformers import PreTrainedModel

from benchmarks.pairs import Pair
from benchmarks.timing import seconds

_HEAD_ROWS = 512
"""Rows of logits in one product: nobody makes those of all tokens at once."""


class GemmFloor:
    """The floor of a model's training step, at rates that are measured in turns with the step.

    Args:
        base: the model; adapters in it don't count.
        rows: tokens of a micro-batch.
    """

    def __init__(self, base: PreTrainedModel, rows: int) -> None:
        head = base.get_output_embeddings().weight
        body = Counter(
            tuple(module.weight.shape)
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module.weight is not head and ".lora_" not in name
        )
        self._device = head.device
        self._repeats = 2 if self._device.type == "cpu" else 20
        self._rows = rows
        self._body_weights = sum(outs * ins * count for (outs, ins), count in body.items())
        self._head_weights = head.numel()
        size = 2048 if self._device.type == "cpu" else 8192
        self._square = _Products(size, size, size, head)
        self._body = [(count, _Products(rows, outs, ins, head)) for (outs, ins), count in body.items()]
        self._head = _Products(_HEAD_ROWS, *head.shape, head)
        self._peak_rates: list[float] = []
        self._seconds_per_token: list[float] = []
        self._seconds_per_response_token: list[float] = []
        self._square()  # the first calls find cold caches

    def measure(self) -> None:
        """Time a large square product, and each of the model's own."""
        self._peak_rates.append(self._square.flops / self._seconds(self._square))
        body = sum(count * self._seconds(products) for count, products in self._body)
        self._seconds_per_token.append(body / self._rows)
        self._seconds_per_response_token.append(self._seconds(self._head) / _HEAD_ROWS)

    @property
    def peak_rate(self) -> float:
        """FLOP/s of large square products."""
        return statistics.median(self._peak_rates)

    def at_peak_rate(self, pairs: Items[Pair]) -> float:
        """Seconds of a step on these pairs, were all its products as fast as large square ones."""
        tokens, response_tokens = count_tokens(pairs)
        return 4 * (self._body_weights * tokens + self._head_weights * response_tokens) / self.peak_rate

    def at_own_rates(self, pairs: Items[Pair]) -> float:
        """Seconds of a step on these pairs, at the rates of the model's own products."""
        tokens, response_tokens = count_tokens(pairs)
        return tokens * statistics.median(self._seconds_per_token) + response_tokens * statistics.median(
            self._seconds_per_response_token
        )

    def _seconds(self, products: Callable[[], None]) -> float:
        return statistics.median(seconds(products, self._device) for _ in range(self._repeats))


def count_tokens(pairs: Items[Pair]) -> tuple[int, int]:
    """Tokens of the pairs, each prompt once, and those of them in responses."""
    response_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    return response_tokens + sum(len(pair.prompt_ids) for pair in pairs), response_tokens


class _Products:
    """Forward and backward of a linear layer, with respect to its input."""

    def __init__(self, rows: int, outs: int, ins: int, like: torch.Tensor) -> None:
        self.flops = 4 * rows * outs * ins
        shapes = (outs, ins), (rows, ins), (rows, outs)
        self._weight, self._inputs, self._outputs = (
            torch.randn(shape, device=like.device, dtype=like.dtype) for shape in shapes
        )
        self._outputs_into, self._inputs_into = torch.empty_like(self._outputs), torch.empty_like(self._inputs)

    def __call__(self) -> None:
        # Into memory that is there already: taking it is no part of the product.
        torch.mm(self._inputs, self._weight.t(), out=self._outputs_into)
        torch.mm(self._outputs, self._weight, out=self._inputs_into)

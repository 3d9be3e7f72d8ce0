"""The options of a run of the benchmarks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ACCUMULATION = 8
"""Micro-batches of one pair that make an optimizer step of the reference procedure."""


@dataclass(frozen=True)
class Setting:
    """Form and place of a run."""

    long: bool
    """The long form: every length mix and comparison, more rounds. The short form halves texts and steps."""
    device: "torch.device"
    precision: str
    """fp32 or bf16: precision of the base weights and of what is computed with them."""
    models: tuple[str, ...]
    """Names from `benchmarks.models`."""

    @property
    def max_tokens(self) -> int:
        """The longest prompt with response, in tokens."""
        return 256 if self.long else 128

    @property
    def pairs_per_step(self) -> int:
        """Pairs of an optimizer step."""
        return ACCUMULATION if self.long else ACCUMULATION // 2

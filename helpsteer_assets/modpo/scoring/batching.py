"""From token sequences to padded batches."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from helpsteer_assets.modpo.models.tokenization import Sequence


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, all tensors [batch, length]."""

    input_ids: torch.Tensor
    """Token ids, int64."""
    attention_mask: torch.Tensor
    """1 on tokens, 0 on padding, int64."""
    response_mask: torch.Tensor
    """True on the tokens of the response, told by position: the pad token may be the end-of-text token."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return Batch(*(tensor.to(device) for tensor in (self.input_ids, self.attention_mask, self.response_mask)))


def collate(sequences: Items[Sequence], pad_id: int) -> Batch:
    """Pad sequences on the right to the longest of them."""
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        end, start = len(sequence), len(sequence.prompt_ids)
        input_ids[row, :end] = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids]))
        attention_mask[row, :end] = 1
        response_mask[row, start:end] = True
    return Batch(input_ids, attention_mask, response_mask)


def plan_batches(lengths: Items[int], max_tokens: int) -> list[list[int]]:
    """Group indices into batches of similar lengths whose padded size is up to `max_tokens`.

    The longest come first, so that too little memory shows at once. An item longer than `max_tokens` makes a batch of
    its own.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches

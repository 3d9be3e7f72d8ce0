"""Prompt trees: responses to one prompt share its tokens, and nothing is padded.

A tree is a prompt followed by its different responses, each of which sees the prompt and itself:

    prompt p0 p1 p2   response a0 a1   response b0 b1 b2
    position 0 1 2             3 4              3 4 5

Several trees lie one after another in a batch of one row. A model computes each prompt once however many responses or
pairs need it, and no padding at all. With the attention of `tree_attention` the log-probabilities are those of each
sequence alone.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from helpsteer_assets.modpo.models.tokenization import Sequence


@dataclass(frozen=True)
class TreeBatch:
    """Packed prompt trees; N tokens, of which M are predicted, of `responses` responses."""

    input_ids: torch.Tensor
    """[1, N] token ids, int64."""
    position_ids: torch.Tensor
    """[1, N] place of each token in its own sequence, int64."""
    predictors: torch.Tensor
    """[M] index into N of the token that predicts each response token: the one before it in its sequence, int64."""
    targets: torch.Tensor
    """[M] the response tokens, int64, without the first token of a response to an empty prompt."""
    rows: torch.Tensor
    """[M] the response that each target belongs to, int64."""
    keys: torch.Tensor
    """[K] index into N of the keys of every segment, one segment after another, int64.

    A segment is covered by one causal attention. It is a prompt with its first response, or a further response; the
    latter's keys are its prompt's and its own.
    """
    query_bounds: torch.Tensor
    """[segments + 1] where the segments' tokens begin and end in N, int32."""
    key_bounds: torch.Tensor
    """[segments + 1] where their keys begin and end in K, int32."""
    sizes: tuple[tuple[int, ...], ...]
    """Tokens of the prompt and of each response, by tree; on the host, so that a step needs no synchronisation."""
    order: tuple[tuple[int, ...], ...]
    """The row of each response, by tree: its place among all `responses`."""

    @property
    def responses(self) -> int:
        """How many responses there are."""
        return sum(len(places) for places in self.order)

    @property
    def tokens(self) -> int:
        """N: how many tokens the model computes."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TreeBatch":
        """The batch on a device."""
        tensors = self._tensors()
        return replace(self, **{name: each.to(device, non_blocking=non_blocking) for name, each in tensors.items()})

    def pin_memory(self) -> "TreeBatch":
        """The batch in page-locked memory, from which a copy to the GPU is asynchronous; called by the data loader."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


@dataclass
class _Tree:
    prompt_ids: np.ndarray
    responses: dict[bytes, tuple[int, np.ndarray]] = field(default_factory=dict)
    """Row and token ids of each response, by the bytes of these."""


class Forest:
    """Grows prompt trees from sequences: equal prompts and equal responses are held once."""

    def __init__(self) -> None:
        self._trees: dict[bytes, _Tree] = {}
        self._responses = 0
        self.tokens = 0
        """Tokens so far."""

    def add(self, sequence: Sequence) -> int:
        """Add a sequence; returns the row of its response."""
        prompt, response = sequence.prompt_ids.tobytes(), sequence.response_ids.tobytes()
        if prompt not in self._trees:
            self._trees[prompt] = _Tree(sequence.prompt_ids)
            self.tokens += len(sequence.prompt_ids)
        responses = self._trees[prompt].responses
        if response not in responses:
            responses[response] = self._responses, sequence.response_ids
            self._responses += 1
            self.tokens += len(sequence.response_ids)
        return responses[response][0]

    def growth(self, sequences: Iterable[Sequence]) -> int:
        """Tokens that adding these sequences would add."""
        new: dict[tuple[bytes, bytes | None], int] = {}
        for sequence in sequences:
            prompt, response = sequence.prompt_ids.tobytes(), sequence.response_ids.tobytes()
            tree = self._trees.get(prompt)
            if tree is None:
                new[prompt, None] = len(sequence.prompt_ids)
            if tree is None or response not in tree.responses:
                new[prompt, response] = len(sequence.response_ids)
        return sum(new.values())

    def pack(self) -> TreeBatch:
        """The trees as one batch, in the order in which they were added."""
        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        predictors: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        segments = [(0, 0)]  # queries and keys of each
        end = 0
        for tree in self._trees.values():
            last_of_prompt, length = end + len(tree.prompt_ids) - 1, len(tree.prompt_ids)
            prompt_keys = np.arange(end, end + length)
            ids.append(tree.prompt_ids)
            positions.append(np.arange(length))
            end += length
            for place, (row, response_ids) in enumerate(tree.responses.values()):
                segment = np.concatenate([prompt_keys, np.arange(end, end + len(response_ids))])
                keys.append(segment)
                segments.append((len(segment) if place == 0 else len(response_ids), len(segment)))
                ids.append(response_ids)
                positions.append(np.arange(length, length + len(response_ids)))
                before = np.arange(end - 1, end - 1 + len(response_ids))
                before[:1] = last_of_prompt
                unpredicted = 0 if length else 1
                predictors.append(before[unpredicted:])
                targets.append(response_ids[unpredicted:])
                rows.append(np.full(len(response_ids[unpredicted:]), row))
                end += len(response_ids)
        trees = self._trees.values()
        bounds = torch.tensor(segments, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return TreeBatch(
            _tensor(ids)[None],
            _tensor(positions)[None],
            _tensor(predictors),
            _tensor(targets),
            _tensor(rows),
            _tensor(keys),
            bounds[:, 0].contiguous(),
            bounds[:, 1].contiguous(),
            sizes=tuple((len(tree.prompt_ids), *(len(ids) for _, ids in tree.responses.values())) for tree in trees),
            order=tuple(tuple(row for row, _ in tree.responses.values()) for tree in trees),
        )


def pack(sequences: Iterable[Sequence]) -> tuple[TreeBatch, list[int]]:
    """The sequences as one batch of trees, and the row of each sequence's response."""
    forest = Forest()
    rows = [forest.add(sequence) for sequence in sequences]
    return forest.pack(), rows


def unpack(batch: TreeBatch) -> list[Sequence]:
    """One sequence per response, in the order of the rows."""
    ids = batch.input_ids[0].cpu().numpy()
    unpacked: list[tuple[int, Sequence]] = []
    start = 0
    for sizes, rows in zip(batch.sizes, batch.order, strict=True):
        prompt_ids = ids[start : start + sizes[0]]
        start += sizes[0]
        for size, row in zip(sizes[1:], rows, strict=True):
            unpacked.append((row, Sequence(prompt_ids, ids[start : start + size])))
            start += size
    return [sequence for _, sequence in sorted(unpacked, key=lambda item: item[0])]


def plan_trees(sequences: Items[Sequence], max_tokens: int) -> list[list[int]]:
    """Group indices into batches of whole trees of up to `max_tokens`.

    The largest tree comes first, so that too little memory shows at once. The responses of a prompt stay together as
    far as they fit into one batch. A sequence longer than `max_tokens` makes a batch of its own.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt_ids.tobytes(), []).append(index)
    groups: list[tuple[int, list[int]]] = []  # tokens of a tree, and its sequences
    for indices in by_prompt.values():
        forest = Forest()
        group: list[int] = []
        for index in indices:
            if group and forest.tokens + forest.growth([sequences[index]]) > max_tokens:
                groups.append((forest.tokens, group))
                forest, group = Forest(), []
            forest.add(sequences[index])
            group.append(index)
        groups.append((forest.tokens, group))
    batches: list[list[int]] = []
    room = 0
    for tokens, group in sorted(groups, key=lambda item: (-item[0], item[1][0])):
        if not batches or tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1] += group
        room -= tokens
    return batches


def _tensor(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)

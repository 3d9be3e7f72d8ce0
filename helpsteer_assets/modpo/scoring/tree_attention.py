"""Attention over packed prompt trees: each response sees its prompt and itself, as if it were alone in the batch.

One function is registered with transformers, for every model that calls its attention through that registry, and is
switched on by `tree_attention` around a forward pass (and its backward, where activations are recomputed). It has two
kernels, which differ in speed alone:

    split   scaled dot-product attention per response; the prompt and its first response are one causal sequence. Any
            device and dtype, with sliding windows and soft-capping, too.
    varlen  one call of variable-length flash attention, with keys gathered so that every response has its prompt's
            before its own. CUDA, 16 bits.

Query i sees key j where both are of one tree, j is of the prompt or of i's response, pos(j) <= pos(i), and, with a
sliding window of size s, pos(i) - pos(j) < s.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.trees import Forest, TreeBatch

NAME = "prompt_tree"
VARLEN_TOLERANCE = 0.03
"""Relative difference that rounding to 16 bits explains; a key too many or too few makes a larger one."""


class TreeLayout:
    """Where prompts and responses lie in a batch, and the kernel that attends; made once for all layers."""

    def __init__(self, batch: TreeBatch, kernel: str) -> None:
        self.kernel = kernel
        self.sizes = batch.sizes
        self.batch = batch
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self.windows: list[int | None] = []
        """The sliding window of each attention layer that has used the layout."""

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(queries, keys before them) of each causal segment, in the order of the tokens.

        A prompt and its first response are one segment, with no keys before it. Each further response is a segment with
        the prompt's keys before it.
        """
        return [
            (prompt + size, 0) if place == 0 else (size, prompt)
            for prompt, *responses in self.sizes
            for place, size in enumerate(responses)
        ]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        return max(queries + before for queries, before in self.segments)

    def suffix_mask(self, queries: int, before: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[queries, before + queries]: 0 where a query sees a key, -inf elsewhere; `before` keys come first."""
        key = (queries, before, window)
        if key not in self._masks:
            query = torch.arange(before, before + queries, device=like.device)[:, None]
            distance = query - torch.arange(before + queries, device=like.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[key] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[key]


def check_layers(config: PreTrainedConfig, windows: list[int | None]) -> None:
    """Raise NotImplementedError unless every layer of a model attended through the registry, with its window.

    Some models have layers of another kind, which would carry state from response to response; some apply their window
    in the mask alone. On a small tree the numbers may be right all the same.

    Args:
        config: the model's.
        windows: the sliding window of each layer that attended.
    """
    types = getattr(config, "layer_types", None) or ()
    if other := set(types) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of type {', '.join(sorted(other))}")
    if len(windows) != config.num_hidden_layers:
        raise NotImplementedError(f"{len(windows)} of {config.num_hidden_layers} layers attend by the registry")
    window = getattr(config, "sliding_window", None)
    expected = sum(t == "sliding_attention" for t in types) if types else (window is not None) * len(windows)
    if windows.count(window if expected else None) != (expected or len(windows)):
        raise NotImplementedError("a sliding window that attention functions are not told of")


@contextmanager
def tree_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let a transformers model attend by prompt trees. Each forward pass within must be given a `tree`, a TreeLayout.

    transformers makes no mask for an attention whose name it does not know.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    own = {id(c): (c, c._attn_implementation) for c in configs if isinstance(c, PreTrainedConfig)}
    for config, _ in own.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, implementation in own.values():
            config._attn_implementation = implementation


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: TreeLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' form.

    Args:
        module: the attention layer.
        query: [1, heads, N, head size].
        key, value: [1, key-value heads, N, head size].
        attention_mask: not used, the tree takes its place.
        tree: the layout of the batch.
        scaling: factor of the scores; None: one over the root of the head size.
        dropout: probability that an attention weight is dropped.
        sliding_window: how far back a token sees, itself included; None: as far as there is text.
        softcap: c of c * tanh(scores / c); None: none.
        further: other arguments of transformers; those that would change the result are refused.

    Returns:
        [1, N, heads, head size], and None for the weights.
    """
    if further.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    tree.windows.append(sliding_window)
    if sliding_window is not None and sliding_window >= tree.longest:
        sliding_window = None
    if tree.kernel == "split" or softcap is not None or dropout:
        return _split(query, key, value, tree, scaling, sliding_window, dropout, softcap), None
    return _varlen(query, key, value, tree, scaling, sliding_window), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def _split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeLayout,
    scaling: float | None,
    window: int | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    # The backward pass of `split` is one concatenation; that of a slice would fill a tensor of zeros for each part.
    queries = query.split([queries for queries, _ in tree.segments], dim=2)
    parts = [size for sizes in tree.sizes for size in sizes]
    keys, values = iter(key.split(parts, dim=2)), iter(value.split(parts, dim=2))
    segments = iter(zip(tree.segments, queries, strict=True))
    results = []
    for sizes in tree.sizes:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in sizes[1:]:
            (length, before), part = next(segments)
            seen_key = torch.cat([prompt_key, next(keys)], dim=2)
            seen_value = torch.cat([prompt_value, next(values)], dim=2)
            if length == 0:
                continue
            causal = before == 0 and (window is None or window >= length) and softcap is None
            mask = None if causal else tree.suffix_mask(length, before, window, part)
            if softcap is None:
                attended = F.scaled_dot_product_attention(
                    part, seen_key, seen_value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=True
                )
            else:
                attended = _soft_capped(part, seen_key, seen_value, mask, dropout, scaling, softcap)
            results.append(attended)
    return torch.cat(results, dim=2).transpose(1, 2).contiguous()


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeLayout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch = tree.batch
    # Older versions of torch group queries without being told, newer ones refuse to.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _arguments(varlen_attn) else {}
    # With fewer queries than keys, flash attention aligns the causal triangle to the last query and the last key.
    attended = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, batch.keys),
        value[0].transpose(0, 1).index_select(0, batch.keys),
        batch.query_bounds,
        batch.key_bounds,
        max(queries for queries, _ in tree.segments),
        tree.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return attended[None]


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@torch.inference_mode(False)
@torch.enable_grad()
def require_varlen(device: torch.device, dtype: torch.dtype, heads: int, key_value_heads: int, head_size: int) -> None:
    """Raise RuntimeError unless `varlen` agrees with `split` on a small tree, in its results and gradients.

    The kernel has conditions on the card, the dtype and the head size, and raises errors of its own where they do not
    hold. To try it is surer than to know them.
    """
    forest = Forest()
    for prompt, *responses in ((7, 5, 3, 9), (4, 6), (3, 2, 1)):
        for response in responses:
            forest.add(Sequence(np.arange(prompt, dtype=np.int32), np.arange(response, dtype=np.int32)))
    batch = forest.pack().to(device)
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> torch.Tensor:
        made = torch.randn(1, count, batch.tokens, head_size, generator=generator)
        return made.to(device=device, dtype=dtype).requires_grad_()

    inputs = random(heads), random(key_value_heads), random(key_value_heads)
    upstream = random(heads).detach().transpose(1, 2)
    for window in (None, 5):
        results = []
        for kernel in ("varlen", "split"):
            layout = TreeLayout(batch, kernel)
            attended, _ = attend(torch.nn.Identity(), *inputs, None, tree=layout, sliding_window=window)
            results.append((attended, *torch.autograd.grad(attended, inputs, upstream)))
        for name, actual, expected in zip(
            ("result", "queries' gradient", "keys' gradient", "values' gradient"), *results, strict=True
        ):
            # Relative to the whole tensor: one element that is nearly zero may round to anything.
            difference = ((actual - expected).float().norm() / expected.float().norm()).item()
            if not difference <= VARLEN_TOLERANCE:  # so that NaN is refused, too
                raise RuntimeError(f"variable-length flash attention is off by {difference:.1%} in its {name}")

import functools
import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring import tree_attention as under_test
from helpsteer_assets.modpo.scoring.tree_attention import (
    TreeLayout,
    attend,
    require_varlen,
    tree_attention,
)
from helpsteer_assets.modpo.scoring.trees import TreeBatch, pack

HEAD_SIZE = 8
VARLEN = inspect.signature(torch.nn.attention.varlen.varlen_attn)

# Sizes of prompts and of their responses. The token ids only have to differ, for equal responses are one.
TREES = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4)), min_size=1, max_size=4
).filter(lambda trees: any(prompt + sum(responses) for prompt, responses in trees))
SOME_TREES = [(7, [5, 1, 9]), (0, [3]), (4, [6]), (1, [2, 0, 4]), (5, [0, 3])]


def batch_of(trees: list[tuple[int, list[int]]]) -> TreeBatch:
    def sequences():
        for tree, (prompt, responses) in enumerate(trees):
            for response, size in enumerate(responses):
                ids = np.arange(size) + 1000 * response
                yield Sequence(np.full(prompt, tree, np.int32), ids.astype(np.int32))

    return pack(sequences())[0]


def inputs_of(
    batch: TreeBatch, heads: int, key_value_heads: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query, key and value [1, heads, N, head size]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, batch.tokens, HEAD_SIZE) for count in (heads, key_value_heads, key_value_heads)]
    drawn = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tuple(tensor.to(device=device, dtype=dtype).requires_grad_() for tensor in drawn)


def seen_by_path(batch: TreeBatch, window: int | None) -> torch.Tensor:
    """[N, N] whether a key is seen by a query: by walking along each response from the first token of its prompt."""
    seen = torch.zeros(batch.tokens, batch.tokens, dtype=torch.bool)
    end = 0
    for prompt, *responses in batch.sizes:
        of_prompt = list(range(end, end + prompt))
        end += prompt
        for size in responses:
            path = of_prompt + list(range(end, end + size))
            end += size
            for at, query in enumerate(path):
                seen[query, path[0 if window is None else max(0, at + 1 - window) : at + 1]] = True
    return seen


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention by its definition, with a mask of 0 and -inf [N, N]; [1, N, heads, head size]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (HEAD_SIZE**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + mask.to(scores.device), dim=-1) @ value).transpose(1, 2)


def as_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)


def assert_attends_like_dense(
    batch: TreeBatch,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kernel: str,
    tolerance: float,
    *,
    window: int | None = None,
    gradients: bool = True,
    **how: Any,
) -> None:
    """Compare the result, and its gradients, with dense attention in fp64."""
    device = inputs[0].device
    layout = TreeLayout(batch.to(device), kernel)
    found, weights = attend(torch.nn.Identity(), *inputs, None, tree=layout, sliding_window=window, **how)
    assert weights is None
    assert found.shape == (1, batch.tokens, inputs[0].shape[1], HEAD_SIZE)
    assert found.dtype == inputs[0].dtype
    accurate = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = dense(*accurate, as_mask(seen_by_path(batch, window), torch.float64), **how)
    ours, theirs = [found], [expected]
    if gradients:
        upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        ours += torch.autograd.grad(found, inputs, upstream.to(found.dtype))
        theirs += torch.autograd.grad(expected, accurate, upstream)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, atol=tolerance, rtol=tolerance)


class TestSplit:
    @settings(max_examples=60, deadline=None)
    @given(
        trees=TREES,
        heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
        window=st.one_of(st.none(), st.integers(1, 20)),
        softcap=st.sampled_from([None, 1.5]),
        scaling=st.sampled_from([None, 0.7]),
        precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 2e-5)]),
        seed=st.integers(0, 9),
    )
    def test_is_dense_attention_along_each_path(self, trees, heads, window, softcap, scaling, precision, seed):
        batch, (dtype, tolerance) = batch_of(trees), precision
        inputs = inputs_of(batch, *heads, dtype, seed=seed)
        how = {"window": window, "softcap": softcap, "scaling": scaling}
        assert_attends_like_dense(batch, inputs, "split", tolerance, **how)


@functools.wraps(torch.nn.attention.varlen.varlen_attn)
def documented_varlen(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What `varlen_attn` is documented to do: causal, aligned to each sequence's last query and last key."""
    bound = VARLEN.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    assert given["query"].is_contiguous()
    assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
    left, right = given["window_size"]
    assert right == 0
    assert given["enable_gqa"] == (given["query"].shape[1] != given["key"].shape[1])
    found = torch.empty_like(given["query"])
    bounds = zip(given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist(), strict=True)
    longest_query = longest_key = 0
    for (first_query, first_key), (end_query, end_key) in pairwise(bounds):
        queries, keys = end_query - first_query, end_key - first_key
        longest_query, longest_key = max(longest_query, queries), max(longest_key, keys)
        last_seen = torch.arange(queries)[:, None] + keys - queries
        index = torch.arange(keys)
        seen = (index <= last_seen) & ((index >= last_seen - left) if left >= 0 else True)
        part = [
            tensor[first:end].transpose(0, 1)[None]
            for tensor, first, end in (
                (given["query"], first_query, end_query),
                (given["key"], first_key, end_key),
                (given["value"], first_key, end_key),
            )
        ]
        found[first_query:end_query] = dense(*part, as_mask(seen, found.dtype), scaling=given["scale"])[0]
    assert (given["max_q"], given["max_k"]) == (longest_query, longest_key)
    return found


class TestVarlen:
    """The arithmetic of its segments; the kernel itself is tried on a GPU below."""

    @settings(max_examples=40, deadline=None)
    @given(
        trees=TREES,
        heads=st.sampled_from([(4, 4), (4, 2)]),
        window=st.one_of(st.none(), st.integers(1, 20)),
        scaling=st.sampled_from([None, 0.7]),
    )
    def test_is_dense_attention_along_each_path(self, trees, heads, window, scaling):
        batch = batch_of(trees)
        inputs = inputs_of(batch, *heads, torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.attention.varlen, "varlen_attn", documented_varlen)
            assert_attends_like_dense(batch, inputs, "varlen", 1e-12, window=window, scaling=scaling)


class TestAttend:
    @pytest.mark.parametrize("how", [{"softcap": 1.5}, {"dropout": 0.5}])
    def test_what_varlen_lacks_is_left_to_split(self, monkeypatch, how):
        monkeypatch.setattr(under_test, "_varlen", None)
        batch = batch_of(SOME_TREES)
        inputs = inputs_of(batch, 2, 2, torch.float32)
        results = []
        for kernel in ("varlen", "split"):
            torch.manual_seed(0)
            results.append(attend(torch.nn.Identity(), *inputs, None, tree=TreeLayout(batch, kernel), **how)[0])
        assert torch.equal(*results)


class TestSwitch:
    def test_without_a_tree_a_forward_pass_is_an_error_and_not_something_else(self, model):
        with tree_attention(model), pytest.raises(TypeError, match="tree"):
            model(input_ids=torch.tensor([[5, 6, 7]]))


class TestRequireVarlen:
    @pytest.mark.parametrize("mistake", ["without the prompt's keys", "a window too wide by one", "NaN"])
    def test_a_kernel_that_attends_to_something_else_is_refused(self, monkeypatch, mistake):
        def mistaken(*args: Any, **kwargs: Any) -> torch.Tensor:
            query, key, value, query_bounds, _, longest, _ = args
            if mistake == "NaN":
                return documented_varlen(*args, **kwargs) * torch.nan
            if mistake == "a window too wide by one":
                left, right = kwargs["window_size"]
                kwargs["window_size"] = (left if left < 0 else left + 1, right)
                return documented_varlen(*args, **kwargs)
            rows = torch.cat([torch.arange(a, b) for a, b in pairwise(query_bounds.tolist())])
            return documented_varlen(
                query, key[rows], value[rows], query_bounds, query_bounds, longest, longest, **kwargs
            )

        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", functools.wraps(documented_varlen)(mistaken))
        with pytest.raises(RuntimeError, match=r"variable-length flash attention is off by .*% in its result"):
            require_varlen(torch.device("cpu"), torch.float32, 4, 2, HEAD_SIZE)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("window", [None, 300])
    def test_on_a_gpu_varlen_is_dense_attention(self, window):
        batch = batch_of([*SOME_TREES, (300, [200, 1, 130])])
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(
            torch.randn(1, heads, batch.tokens, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
            for heads in (8, 2, 2)
        )
        results = []
        for kernel in ("varlen", "split"):
            layout = TreeLayout(batch.to("cuda"), kernel)
            found, _ = attend(torch.nn.Identity(), *inputs, None, tree=layout, sliding_window=window)
            results.append((found, *torch.autograd.grad(found.float().square().sum(), inputs)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)

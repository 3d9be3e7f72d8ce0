"""The cost model counts what a model does: held to torch's own FLOP counter, to the trees, and to its own rules."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import Linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from helpsteer_assets.commands.cost import (
    Machine,
    Tokens,
    Work,
    decoding,
    forward,
    longest_of,
    measure_machine,
    optimizer,
    training,
    training_memory,
    tree,
)
from helpsteer_assets.experiment.settings import LoraSettings
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.models.loading import ModelSize, attach_lora, model_size
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.log_probs import method_for, response_log_probs
from helpsteer_assets.modpo.scoring.tree_attention import TreeLayout
from helpsteer_assets.modpo.scoring.trees import TreeBatch, pack

SIZE = ModelSize(
    parameters=1000,
    adapter_parameters=40,
    embeddings=50,
    body=600,
    head=400,
    layers=2,
    attention=16,
    keys_and_values=16,
    features=200,
)
MACHINE = Machine(rate=1e9, bandwidth=1e8, operation=1e-6)
TREES = ((7, (5, 9)), (12, (3, 6, 8)))
"""(prompt, responses) in tokens."""

count = st.integers(1, 500)


def batch() -> TreeBatch:
    """TREES, of different tokens."""
    ids = itertools.count(3)

    def draw(length: int) -> np.ndarray:
        return np.array([next(ids) % 250 + 3 for _ in range(length)], np.int32)

    sequences = []
    for prompt, responses in TREES:
        shared = draw(prompt)
        sequences += [Sequence(shared, draw(length)) for length in responses]
    return pack(sequences)[0]


def tokens() -> Tokens:
    return sum((tree(prompt, *responses) for prompt, responses in TREES), Tokens())


@pytest.fixture
def size(tiny_model_path: Path) -> ModelSize:
    # Flash attention's products are not counted by torch on a CPU, so they are left out here, and held to the trees.
    return replace(model_size(tiny_model_path, LoraSettings(r=4)), attention=0)


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_scoring_takes_the_flops_that_torch_counts(model: PreTrainedModel, size: ModelSize) -> None:
    method_for(model)  # tried out before, so that the trial is not counted
    with torch.no_grad():
        found = counted(lambda: response_log_probs(model, batch()))

    expected = forward(size, tokens(), bytes_each=4, passes=1, adapter=False).flops
    assert expected == pytest.approx(found, rel=0.01)  # norms have weights and no products


def test_a_training_step_takes_the_flops_that_torch_counts(model: PreTrainedModel, size: ModelSize) -> None:
    policy = with_plain_lora(model)
    method_for(policy)
    found = counted(lambda: response_log_probs(policy.train(), batch()).sum().backward())

    expected = training(size, tokens(), bytes_each=4, passes=1, checkpointing=False).flops
    # What enters the first layer wants no gradient: of two layers that is some, of thirty little.
    assert expected == pytest.approx(found, rel=0.12)
    assert expected > found


def test_checkpointing_computes_the_body_once_more(size: ModelSize) -> None:
    kept, again = (
        training(size, tokens(), bytes_each=4, passes=1, checkpointing=checkpointing).flops
        for checkpointing in (False, True)
    )
    assert again - kept == 2 * (size.body + size.adapter_parameters) * tokens().read


def with_plain_lora(model: PreTrainedModel) -> PeftModel:
    """peft's own layers: torch counts no product that is added in place, as our fused ones do."""
    policy = attach_lora(model, LoraSettings(r=4), 0)
    for module in policy.modules():
        if isinstance(module, Linear):
            module.__class__ = Linear
    return policy


def test_decoding_takes_the_flops_that_torch_counts(model: PreTrainedModel, size: ModelSize) -> None:
    prompts, response = {0: [5, 6, 7, 8], 1: [9, 10, 11, 12]}, 6
    how = Decoding(max_new_tokens=response, end_id=-1, max_batch_tokens=1000)
    with torch.inference_mode():
        found = counted(lambda: list(decode(model, prompts, how)))

    work = decoding(
        size,
        prompts=2,
        prompt_tokens=4,
        response_tokens=response - 1,  # the prompt's last token predicts the first
        steps=response - 1,
        bytes_each=4,
        prefills=1,
        sampled=False,
    )
    assert work.flops == pytest.approx(found, rel=0.01)


def test_tokens_of_a_tree_are_those_that_the_model_reads_and_sees() -> None:
    packed = batch()
    every = torch.arange(packed.tokens)
    seen = TreeLayout(packed, "split").visible(every[:, None], every[None])

    assert tokens() == Tokens(packed.tokens, len(packed.targets), int(seen.sum()), packed.responses)


@given(prompt=count, responses=st.lists(count, min_size=1, max_size=4), more=count)
def test_work_grows_with_every_size(prompt: int, responses: list[int], more: int) -> None:
    less = tree(prompt, *responses)
    for larger in (tree(prompt + more, *responses), tree(prompt, *responses, more)):
        assert cost(SIZE, larger) > cost(SIZE, less)
    for name in ("body", "head", "adapter_parameters", "layers", "attention", "features", "embeddings"):
        assert cost(replace(SIZE, **{name: getattr(SIZE, name) + more}), less) > cost(SIZE, less), name


def cost(size: ModelSize, read: Tokens) -> float:
    return training(size, read, bytes_each=4, passes=1, checkpointing=False).seconds(MACHINE)


@given(times=st.integers(1, 100), prompt=count, response=count)
def test_so_many_times_the_tokens_are_so_many_times_the_work(times: int, prompt: int, response: int) -> None:
    once = forward(SIZE, tree(prompt, response), bytes_each=4, passes=1, adapter=True)
    often = forward(SIZE, tree(prompt, response) * times, bytes_each=4, passes=times, adapter=True)

    assert often.seconds(MACHINE) == pytest.approx((once * times).seconds(MACHINE))


@given(prompt=count, responses=st.lists(count, min_size=2, max_size=6))
def test_a_shared_prompt_is_never_dearer_than_one_for_each_response(prompt: int, responses: list[int]) -> None:
    shared = tree(prompt, *responses)
    apart = sum((tree(prompt, length) for length in responses), Tokens())

    assert shared.predicted == apart.predicted and shared.responses == apart.responses
    assert shared.read == apart.read - prompt * (len(responses) - 1)
    assert shared.attended < apart.attended


@given(lengths=st.lists(count, min_size=1, max_size=50), together=st.integers(1, 50))
def test_the_longest_of_some_lies_between_mean_and_maximum(lengths: list[int], together: int) -> None:
    found = longest_of(lengths, together)

    assert longest_of(lengths, 1) == pytest.approx(sum(lengths) / len(lengths))
    assert min(lengths) - 1e-9 <= found <= max(lengths) + 1e-9
    assert longest_of(lengths, together + 1) >= found - 1e-9


def test_rows_beside_each_other_share_the_reading_of_the_weights() -> None:
    how = {"prompts": 32, "prompt_tokens": 10, "response_tokens": 20, "bytes_each": 4, "prefills": 1}
    together, alone = (decoding(SIZE, **how, steps=steps, sampled=False) for steps in (20, 20 * 32))

    assert together.flops == alone.flops
    assert alone.moved - together.moved == 20 * 31 * (SIZE.body + SIZE.head) * 4
    assert decoding(SIZE, **how, steps=20, sampled=True).moved > together.moved


def test_an_optimizer_step_costs_by_the_adapter_alone() -> None:
    assert optimizer(SIZE, 3).moved == 3 * optimizer(SIZE, 1).moved
    assert optimizer(SIZE, 3).operations > optimizer(SIZE, 1).operations
    assert optimizer(SIZE, 1).flops == 0
    assert optimizer(replace(SIZE, body=10**9), 1) == optimizer(SIZE, 1)


@given(micro_batch=st.integers(1, 10**5))
def test_memory_holds_weights_and_optimizer_and_grows_with_the_micro_batch(micro_batch: int) -> None:
    def peak(tokens: int, checkpointing: bool = False) -> float:
        return training_memory(SIZE, tokens=tokens, bytes_each=4, checkpointing=checkpointing)

    assert peak(0) > SIZE.parameters * 4 + SIZE.adapter_parameters * 16
    assert peak(micro_batch + 1) > peak(micro_batch) >= peak(micro_batch, checkpointing=True)


def test_work_adds_up() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
    assert Work(1, 2, 3) * 2 == Work(2, 4, 6)
    assert Work(operations=10**6).seconds(MACHINE) == 1


def test_a_machine_is_measured_and_left_with_its_threads() -> None:
    torch.set_num_threads(2)
    found = measure_machine("cpu", "fp32")

    assert torch.get_num_threads() == 2
    assert found.rate > 1e8 and found.bandwidth > 1e7 and 0 < found.operation < 1e-2

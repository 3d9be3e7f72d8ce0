"""What computing with a model costs: floating-point operations, bytes moved, operations started, and so seconds.

A model is known by its sizes alone (`ModelSize`), a text by its tokens. Work is counted, never timed; a `Machine` turns
it into seconds:

    seconds = FLOPs / (GEMM_SHARE * rate) + bytes moved / bandwidth + operations started * seconds of one

The first term is the matrix products and rules large models, the second what passes through memory beside them (norms,
activations, the softmax over the vocabulary, and in decoding the weights themselves), the third what starting
operations takes, which rules tiny models and decoding. The machine's three numbers are measured in a moment
(`measure_machine`); the coefficients below were fitted once, and docs/scaling.md says to what and how well they hold.

Imports no torch until a machine is measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from helpsteer_assets.modpo.models.loading import ModelSize

GEMM_SHARE = 0.93
"""Rate of a model's own matrix products, as a share of that of large square ones."""
FORWARD_PASSES = 4.0
"""Times that the inputs and outputs of a layer's matrices pass through memory in a forward, beside the products."""
BACKWARD_PASSES = 6.0
"""The same in a backward pass."""
HEAD_PASSES = 8.0
"""Times that a row of logits passes through memory in the fused head."""
SAMPLING_PASSES = 40.0
"""Times that a row of logits, 8 bytes a number, passes through memory where a token is drawn by hashed Gumbel noise."""
LAYER_OPERATIONS = 200.0
"""Operations that a layer starts in a forward pass, counted in the smallest there are."""
SEGMENT_OPERATIONS = 45.0
"""Operations that a layer starts for each response of a batch of prompt trees (`tree_attention`)."""
BACKWARD_OPERATIONS = 1.5
"""Operations of a backward pass for each of the forward."""
STEP_OPERATIONS = 300.0
"""Operations per layer of an optimizer step, clipping included."""
TRAINER_OPERATIONS = 5000.0
"""Operations of a step beside the model: data loader, collator, callbacks, logs."""
TRAINING_OPERATIONS = 3e6
"""Operations of a training beside its steps: trainer, checkpoints with their digests, loss curve, model card."""
STAGE_OPERATIONS = 1e6
"""Operations of a stage beside its model: manifest, digests, tokenizer, Parquet, warehouse, Dagster's records."""
ACTIVATION_PASSES = 1.32
"""Activations kept for the backward pass, in inputs and outputs of the body's matrices: of the two peaks measured in
docs/performance.md (body8: 400 MiB of 1024 tokens, SmolLM2: 1586 MiB; the head's logits taken off)."""
LOGIT_BYTES = 2 * 4 * 2**24
"""Of the fused head's chunk of logits and probabilities in fp32 (`log_prob_head.CHUNK_ELEMENTS`)."""
TRAINED_BYTES = 16
"""Per trained number, all fp32: weight, gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Machine:
    """What a device does in a second; of a CPU, one thread."""

    rate: float
    """FLOP/s of a large square matrix product in the precision of the model."""
    bandwidth: float
    """Bytes/s, read and written, of copying what fits no cache."""
    operation: float
    """Seconds that one operation on a tiny tensor takes."""


@dataclass(frozen=True)
class Work:
    """What there is to do; adds up."""

    flops: float = 0.0
    """A multiplication and an addition are two. LoRA and attention are counted."""
    moved: float = 0.0
    """Bytes through memory beside the matrix products."""
    operations: float = 0.0
    """Operations started."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved, self.operations + other.operations)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.moved * times, self.operations * times)

    def seconds(self, machine: Machine) -> float:
        """CPU seconds of one thread, or a GPU's."""
        return (
            self.flops / (GEMM_SHARE * machine.rate)
            + self.moved / machine.bandwidth
            + self.operations * machine.operation
        )


@dataclass(frozen=True)
class Tokens:
    """What passes through a model; counts may be means, and add up."""

    read: float = 0.0
    """T: tokens of prompts and responses, a prompt that responses share once."""
    predicted: float = 0.0
    """Tokens whose log-probability is asked for, or that are chosen: rows of logits."""
    attended: float = 0.0
    """Pairs of a token and one that it sees, itself included."""
    responses: float = 0.0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Tokens":
        return Tokens(*(value * times for value in vars(self).values()))


def tree(prompt: float, *responses: float) -> Tokens:
    """Tokens of a prompt tree (`modpo/trees.py`): each response sees the prompt and itself.

    P (P + 1) / 2 pairs of the prompt, and P R + R (R + 1) / 2 of each response.
    """
    total = sum(responses)
    own = prompt * (prompt + 1) / 2 + sum(prompt * length + length * (length + 1) / 2 for length in responses)
    return Tokens(prompt + total, total, own, len(responses))


def longest_of(lengths: Sequence[int], count: int) -> float:
    """Expected length of the longest of `count` texts drawn at random: what a padded batch pads to.

    The i-th shortest of n is the longest of k draws with probability (i/n)^k - ((i-1)/n)^k.
    """
    if not len(lengths):
        return 0.0
    shares = (np.arange(len(lengths) + 1) / len(lengths)) ** count
    return float(np.sort(np.asarray(lengths)) @ np.diff(shares))


def forward(size: "ModelSize", tokens: Tokens, *, bytes_each: int, passes: float, adapter: bool) -> Work:
    """A forward pass without gradients.

    2 FLOPs per weight and token: of the body's B weights and, where an adapter is active and not merged, the LoRA's L
    on all T tokens, of the head's H on those predicted. Attention: 4 a FLOPs per visible pair (scores and their use),
    a the width of the queries, summed over layers.

    Args:
        size: the model's.
        tokens: what it reads, in all.
        bytes_each: of a number, by precision.
        passes: forward passes that this is done in.
        adapter: whether a LoRA is active.
    """
    weights = size.body + adapter * size.adapter_parameters
    return Work(
        2 * weights * tokens.read + 2 * size.head * tokens.predicted + 4 * size.attention * tokens.attended,
        bytes_each * FORWARD_PASSES * size.features * tokens.read
        + 4 * HEAD_PASSES * size.embeddings * tokens.predicted,
        size.layers * (LAYER_OPERATIONS * passes + SEGMENT_OPERATIONS * tokens.responses),
    )


def training(size: "ModelSize", tokens: Tokens, *, bytes_each: int, passes: float, checkpointing: bool) -> Work:
    """Forward and backward passes of a LoRA training, without the optimizer's steps.

    The frozen weights get no gradient, so a backward pass takes 2 FLOPs per weight and token again: `4 B T + 4 H M` in
    all (M tokens predicted; the GEMM floor of docs/performance.md), and the LoRA's weights 6. Attention's backward pass
    computes the scores anew: 10 a FLOPs per visible pair. Checkpointing computes the body's forward once more.
    """
    once = forward(size, tokens, bytes_each=bytes_each, passes=passes, adapter=True)
    backward = Work(
        2 * size.body * tokens.read
        + 4 * size.adapter_parameters * tokens.read
        + 2 * size.head * tokens.predicted
        + 10 * size.attention * tokens.attended,
        bytes_each * BACKWARD_PASSES * size.features * tokens.read,
        BACKWARD_OPERATIONS * once.operations,
    )
    body = Tokens(tokens.read, 0.0, tokens.attended, tokens.responses)
    again = forward(size, body, bytes_each=bytes_each, passes=passes, adapter=True)
    return once + backward + again * checkpointing


def optimizer(size: "ModelSize", steps: float) -> Work:
    """A training beside its passes: in each step AdamW with clipping reads and writes the LoRA and its moments."""
    started = TRAINING_OPERATIONS + steps * (TRAINER_OPERATIONS + size.layers * STEP_OPERATIONS)
    return Work(0.0, steps * 3 * TRAINED_BYTES * size.adapter_parameters, started)


def decoding(
    size: "ModelSize",
    *,
    prompts: float,
    prompt_tokens: float,
    response_tokens: float,
    steps: float,
    bytes_each: int,
    prefills: float,
    sampled: bool,
) -> Work:
    """Responses to prompts, by a model with its adapter merged.

    Each prompt is read once (its last token predicts); then each further token is a forward pass of one token, which
    reads the keys and values of all before it. Each step reads all weights, whatever the rows of its batch.

    Args:
        size: the model's.
        prompts: how many are answered.
        prompt_tokens: P, mean length of a prompt.
        response_tokens: R, mean length of a response.
        steps: decoding steps, each of which advances every row of its batch.
        bytes_each: of a number, by precision.
        prefills: forward passes that read prompts.
        sampled: whether tokens are drawn, rather than the likeliest taken.
    """
    tokens = prompts * response_tokens
    read = Tokens(prompts * prompt_tokens, prompts, prompts * prompt_tokens * (prompt_tokens + 1) / 2)
    seen = tokens * (prompt_tokens + response_tokens / 2)
    one_by_one = forward(size, Tokens(tokens, tokens, seen), bytes_each=bytes_each, passes=steps, adapter=False)
    memory = steps * (size.body + size.head) * bytes_each + seen * size.keys_and_values * bytes_each
    drawn = sampled * 8 * SAMPLING_PASSES * size.embeddings * tokens
    prefill = forward(size, read, bytes_each=bytes_each, passes=prefills, adapter=False)
    return prefill + one_by_one + Work(0.0, memory + drawn, 0.0)


def training_memory(size: "ModelSize", *, tokens: float, bytes_each: int, checkpointing: bool) -> float:
    """Bytes at the peak of a preference training: weights, the LoRA with its optimizer, activations, a chunk of logits.

    Args:
        size: the model's.
        tokens: of a micro-batch.
        bytes_each: of a number, by precision.
        checkpointing: whether one layer's activations are kept at a time, and else only what enters a layer.
    """
    kept = ACTIVATION_PASSES * size.features * (1 / size.layers if checkpointing else 1)
    if checkpointing:
        kept += size.attention  # about the hidden size of each layer
    fixed = size.parameters * bytes_each + size.adapter_parameters * TRAINED_BYTES + LOGIT_BYTES
    return fixed + tokens * kept * bytes_each


def measure_machine(device: str, precision: str) -> Machine:
    """Measure a device, in a fraction of a second: CPU seconds of one thread; on a GPU seconds.

    Args:
        device: `cpu` or `cuda`.
        precision: fp32 or bf16.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    cuda = torch.device(device).type == "cuda"
    size, elements, operations, rounds = (8192, 2**28, 2000, 3) if cuda else (1024, 2**24, 2000, 3)
    square = torch.ones(3, size, size, device=device, dtype=dtype)
    source, target = torch.ones(2, elements, device=device, dtype=dtype)
    tiny = torch.ones(16, device=device, dtype=dtype)

    def clock() -> float:
        if not cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(work: Callable[[], object]) -> float:
        work()  # the first finds cold caches
        begun = clock()
        for _ in range(rounds):
            work()
        return (clock() - begun) / rounds

    def small() -> None:
        for _ in range(operations):
            tiny + tiny

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Machine(
            rate=2 * size**3 / seconds(lambda: torch.mm(square[0], square[1], out=square[2])),
            bandwidth=2 * source.nbytes / seconds(lambda: target.copy_(source)),
            operation=seconds(small) / operations,
        )
    finally:
        torch.set_num_threads(threads)

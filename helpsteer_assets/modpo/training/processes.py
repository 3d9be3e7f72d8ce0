"""The processes that train one model together, and what they have to agree on.

Each process holds the whole model and computes its share of every optimizer step. Once a step the gradients and losses
of all shares are added up, and all processes make the same step. transformers and accelerate see each process as a
training of its own: only the code below deals out batches and gathers losses.
"""

import hashlib
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel

from helpsteer_assets.errors import HelpsteerError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a training, as one of them sees them.

    Methods that exchange data have to be called in all processes.
    """

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    sharded: bool = False
    """Whether each holds a part of the frozen weights only; then all have to make the same number of passes."""

    @property
    def alone(self) -> bool:
        """Whether one process trains."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def deal(self, lengths: Items[int]) -> list[list[int]]:
        """Divide items among the processes, with about equally many tokens for each.

        Args:
            lengths: tokens of each item.

        Returns:
            by rank the ascending indices of the items.
        """
        if self.alone:
            return [list(range(len(lengths)))]
        hands: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            least = loads.index(min(loads))
            loads[least] += lengths[index]
            hands[least].append(index)
        return [sorted(hand) for hand in hands]

    def own(self, passes: list[list[T]], idle: Callable[[], T]) -> list[T]:
        """The passes of this process, from the passes of each rank.

        Where weights are sharded, passes made by `idle` follow until their number is that of the busiest process.
        """
        mine = passes[self.rank]
        return mine + [idle() for _ in range(max(map(len, passes)) - len(mine))] if self.sharded else mine

    def shard(self, model: PeftModel, device: torch.device) -> PeftModel:
        """Keep a part of each layer's frozen weights, and gather a layer's weights while it computes (FSDP).

        Trained weights, embeddings, norms and head stay whole. Returns the model, moved to the device.

        Raises HelpsteerError where the model does not say which of its modules are its layers.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        base = model.get_base_model()
        names = set(base._no_split_modules or ())
        layers = [module for module in base.base_model.modules() if type(module).__name__ in names]
        sharded = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
        if not sharded:
            raise HelpsteerError(
                f"run.fsdp: {type(base).__name__} does not say which of its modules are layers; set run.fsdp: false"
            )
        mesh = init_device_mesh(device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
        # The outer module has no weights left to divide; it fetches the next layer while one computes.
        fully_shard(base.base_model, mesh=mesh, ignored_params=set(base.base_model.parameters()) - sharded)
        return model.to(device)

    def seed_step(self, seed: int, step: int) -> None:
        """Seed the random numbers of a step (for dropout).

        They differ between processes, and are the same when a resumed training repeats the step.
        """
        if not self.alone:
            torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0]))

    def sum_step(self, model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """Give every process the sum of all processes' gradients; returns the sum of their losses."""
        if self.alone:
            return loss
        trained = [p for p in model.parameters() if p.requires_grad]
        # A parameter has no gradient where the last batch was too short to give this process a share.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        sums = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for parameter, gradient, total in zip(
            trained, gradients, sums.split([p.numel() for p in trained]), strict=True
        ):
            parameter.grad = gradient.copy_(total.view_as(gradient))
        return self.sum(loss)

    def sum(self, number: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.alone:
            return number
        total = number.detach().clone()
        dist.all_reduce(total)
        return total

    def joined(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.alone:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def check_equal(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raise RuntimeError unless all processes have the same tensors, bit for bit."""
        if not self.alone:
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
            if len(set(self.joined(digest.hexdigest()))) > 1:
                raise RuntimeError(f"the {self.size} processes of a training no longer hold the same weights")

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if not self.alone:
            dist.barrier()


ALONE = World()

"""The optimizer of all contenders, and how their weights are put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

LEARNING_RATE = 1e-4
MAX_GRADIENT_NORM = 1.0


def lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Optimizer:
    """AdamW with clipping on the LoRA that is trained."""

    def __init__(self, model: PeftModel) -> None:
        self._parameters = list(lora_parameters(model).values())
        self._adamw = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        """Clip, step, and forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._adamw.step()
        self._adamw.zero_grad()


def take_gradient(model: PeftModel) -> torch.Tensor:
    """All LoRA gradients as one fp64 vector, on the CPU; they are forgotten."""
    parameters = lora_parameters(model)
    flat = torch.cat([parameters[name].grad.double().flatten().cpu() for name in sorted(parameters)])
    for parameter in parameters.values():
        parameter.grad = None
    return flat


@contextmanager
def weights_put_back(model: PeftModel) -> Iterator[None]:
    """Whatever is trained inside, the LoRA's weights are as before afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in lora_parameters(model).items():
                parameter.copy_(before[name])
                parameter.grad = None

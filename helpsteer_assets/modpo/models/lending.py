"""Lend a loaded model to code that changes it, and restore it afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from helpsteer_assets.modpo.models.loading import load_adapters


class Snapshot:
    """A model's modules, parameters, hooks, modes and configuration, but not the values of its parameters.

    peft and trainers replace modules, freeze parameters, attach hooks and set attributes. All of this is kept in the
    modules' own dictionaries, so restoring the dictionaries undoes it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())
        configs = {
            id(value): value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, PreTrainedConfig | GenerationConfig)
        }
        self._classes = [(module, type(module)) for module in modules]
        self._contents = [(part, _copied(vars(part))) for part in (*modules, *configs.values())]
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Bring the model back to its state at the snapshot."""
        for module, kind in self._classes:
            module.__class__ = kind
        for part, contents in self._contents:
            vars(part).clear()
            vars(part).update(_copied(contents))
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _copied(contents: dict[str, Any]) -> dict[str, Any]:
    """A copy with its own containers: modules, parameters and hooks are kept in containers."""
    return {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value for name, value in contents.items()
    }


@contextmanager
def merged(model: PreTrainedModel, adapter: Path) -> Iterator[PreTrainedModel]:
    """The policy of an adapter: within the context, the adapter is merged into the model's weights.

    The original weights are kept in the host's memory and put back: subtracting the adapter leaves rounding errors.
    """
    snapshot = Snapshot(model)
    peft_model = load_adapters(model, {"policy": adapter})
    weights = [module.get_base_layer().weight for module in peft_model.modules() if isinstance(module, LoraLayer)]
    originals = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        yield peft_model.merge_and_unload()
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        snapshot.restore()

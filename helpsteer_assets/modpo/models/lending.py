"""Lending a loaded model to work that changes it, and having it back as it was."""

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
    """What a model is made of: its modules, parameters, hooks, modes and configuration, but not the parameters' values.

    peft, trainers and compilation replace modules, freeze parameters, attach hooks and set attributes. All of these
    stand in the modules' own dictionaries, so that putting those back undoes them, whoever did it.
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
        """Make the model what it was."""
        for module, kind in self._classes:
            module.__class__ = kind
        for part, contents in self._contents:
            vars(part).clear()
            vars(part).update(_copied(contents))
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _copied(contents: dict[str, Any]) -> dict[str, Any]:
    """With containers of its own: modules, parameters and hooks stand in such."""
    return {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value for name, value in contents.items()
    }


@contextmanager
def merged(model: PreTrainedModel, adapter: Path) -> Iterator[PreTrainedModel]:
    """The policy of an adapter: the model with the adapter merged into its weights, for as long as the context lasts.

    The weights are kept in the host's memory and put back, for subtracting what was added would leave rounding.
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

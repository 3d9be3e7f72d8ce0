import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from helpsteer_assets.modpo.models.lending import Snapshot, merged
from helpsteer_assets.modpo.models.loading import attach_lora, load_adapters, load_model
from helpsteer_assets.modpo.settings import Lora
from helpsteer_assets_tests.conftest import make_model

INPUTS = torch.tensor([[5, 9, 17, 4]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(INPUTS).logits


def description(model: PreTrainedModel) -> dict[str, Any]:
    """All that could differ, but for the values of parameters."""
    return {
        "modules": [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "implementation": model.config._attn_implementation,
    }


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """The model ends as it began, to the bit."""
    before, values = description(model), copy.deepcopy(model.state_dict())
    answers = logits(model)
    yield
    assert description(model) == before
    after = model.state_dict()
    assert list(after) == list(values)
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert torch.equal(logits(model), answers)


class TestMerged:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_puts_the_weights_back_to_the_bit_even_after_an_error(self, tiny_model_path, adapter, precision):
        model = load_model(tiny_model_path, precision=precision)
        with unchanged(model):
            plain = logits(model)
            for _ in range(3):  # subtracting would leave a little more each time
                with pytest.raises(RuntimeError, match="no memory"), merged(model, adapter) as policy:
                    assert not torch.equal(logits(policy), plain)
                    assert not any(isinstance(module, BaseTunerLayer) for module in policy.modules())
                    raise RuntimeError("no memory")

    def test_is_the_policy(self, tiny_model_path, adapter, model):
        attached = load_adapters(load_model(tiny_model_path, precision="fp32"), {"policy": adapter})
        with merged(model, adapter) as policy:
            torch.testing.assert_close(logits(policy), logits(attached), rtol=1e-4, atol=1e-4)


class TestSnapshot:
    def test_undoes_a_training(self, model):
        with unchanged(model):
            snapshot = Snapshot(model)
            policy = attach_lora(model, Lora(r=4, alpha=8), seed=1).train()
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.config.use_cache = False
            model.config.pad_token_id = 7
            model.generation_config.max_length = 3
            optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
            for _ in range(2):
                policy(INPUTS, labels=INPUTS).loss.backward()
                optimizer.step()
            snapshot.restore()

    def test_restores_as_often_as_asked_and_tied_weights_stay_tied(self):
        model = make_model(50, tied=True)
        with unchanged(model):
            snapshot = Snapshot(model)
            for _ in range(2):
                attach_lora(model, Lora(r=4, alpha=8), seed=1)
                snapshot.restore()
        assert model.lm_head.weight is model.model.embed_tokens.weight

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from transformers import PreTrainedModel

from helpsteer_assets.modpo.models import fused_lora
from helpsteer_assets.modpo.models.fused_lora import FusedLoraLinear, fuse_lora
from helpsteer_assets.modpo.models.loading import attach_lora, load_adapters, load_model
from helpsteer_assets.modpo.settings import Lora
from helpsteer_assets_tests.conftest import make_model

IDS = torch.randint(3, 290, (3, 7), generator=torch.Generator().manual_seed(0))
LAYERS = 14
"""Linear layers below the head of the tiny model."""


def both(
    model: PreTrainedModel, *, adapters: tuple[str, ...] = ("default",), **changes: Any
) -> tuple[PeftModel, PeftModel]:
    """The same model with LoRA as in the midst of training, fused and as peft has it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    peft_model = get_peft_model(model, config, adapter_name=adapters[0], autocast_adapter_dtype=False)
    for name in adapters[1:]:
        peft_model.add_adapter(name, config, autocast_adapter_dtype=False)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft_model.eval()
    return fuse_lora(deepcopy(peft_model)), peft_model


def with_biases() -> PreTrainedModel:
    model = make_model(300, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def layers(model: PeftModel) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of every trained tensor of a loss that reads them all."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    torch.log_softmax(logits.double(), dim=-1).gather(2, IDS[..., None]).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


def assert_same(fused: PeftModel, peft_model: PeftModel, tolerance: float = 1e-11) -> None:
    (logits, gradients), (expected, expected_gradients) = run(fused), run(peft_model)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, name
        assert gradients[name].dtype == gradient.dtype
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs for which the fused function was called."""
    calls: list[torch.Size] = []
    apply = fused_lora._LoraLinear.apply

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(x.shape)
        return apply(x, *args)

    monkeypatch.setattr(fused_lora._LoraLinear, "apply", counted)
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_gradients_are_those_of_peft(dtype, tolerance, biases, fused_calls):
    fused, peft_model = both((with_biases() if biases else make_model(300)).to(dtype))
    assert_same(fused, peft_model, tolerance)
    assert len(fused_calls) == len(layers(fused)) == LAYERS


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_model_has_pefts_results_up_to_its_rounding(model, adapter_dtype, fused_calls):
    fused, peft_model = both(model.bfloat16())
    for lora_model in (fused, peft_model):
        for name, parameter in lora_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    accurate = deepcopy(peft_model).double()
    (_, found), (_, expected), (_, truth) = run(fused), run(peft_model), run(accurate)
    assert len(fused_calls) == LAYERS
    assert all(gradient.dtype == adapter_dtype for gradient in found.values())

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return sum((gradients[name] - truth[name]).norm() ** 2 for name in truth) ** 0.5

    size = sum(gradient.norm() ** 2 for gradient in truth.values()) ** 0.5
    assert error(found) < 0.05 * size
    assert error(found) < 1.5 * error(expected)


class TestWhatIsActive:
    @pytest.fixture
    def pair(self, model) -> tuple[PeftModel, PeftModel]:
        return both(model.double(), adapters=("one", "two"))

    def test_the_adapter_that_is_set(self, pair, fused_calls):
        found = []
        for name in ("two", "one", "two"):
            for lora_model in pair:
                lora_model.set_adapter(name)
            assert_same(*pair)
            found.append(logits(pair[0]))
        assert torch.equal(found[0], found[2])
        assert (found[0] - found[1]).abs().max() > 0.1
        assert len(fused_calls) == 3 * LAYERS * 2


class TestFallsBack:
    def test_to_peft_where_dropout_draws(self, model, fused_calls):
        results = []
        for lora_model in both(model, lora_dropout=0.3):
            torch.manual_seed(11)
            results.append(run(lora_model.train()))
        assert fused_calls == []
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    @pytest.mark.parametrize(
        ("how", "fused_layers"),
        [({"use_dora": True}, 0), ({"lora_bias": True}, 0), ({"bias": "all"}, 0), ({"use_rslora": True}, LAYERS)],
        ids=["DoRA", "bias of B", "bias of the layer", "another scaling"],
    )
    def test_to_peft_where_the_adapter_is_more_than_a_b(self, fused_calls, how, fused_layers):
        fused, peft_model = both(with_biases().double(), **how)
        assert_same(fused, peft_model)
        assert len(fused_calls) == fused_layers


def test_the_adapter_saves_and_loads_to_the_same(tiny_model_path: Path, tmp_path: Path):
    fused = attach_lora(load_model(tiny_model_path, precision="fp32"), Lora(r=4, alpha=8), 0)
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    fused.save_pretrained(tmp_path)
    loaded = load_adapters(load_model(tiny_model_path, precision="fp32"), {"policy": tmp_path})
    plain = PeftModel.from_pretrained(load_model(tiny_model_path, precision="fp32"), tmp_path)
    assert {type(layer) for layer in (*layers(loaded), *layers(fused))} == {FusedLoraLinear}
    assert {type(layer) for layer in layers(plain)} == {Linear}
    assert torch.equal(logits(loaded), logits(fused.eval()))
    torch.testing.assert_close(logits(plain), logits(fused), atol=1e-5, rtol=1e-5)

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import LoraSettings
from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.training.compilation import compiled_layers
from helpsteer_assets.modpo.training.preference import PairCollator, PreferencePair, pair_losses


@pytest.fixture
def model(tiny_model_path: Path) -> PeftModel:
    model = attach_lora(load_model(tiny_model_path, precision="fp32"), LoraSettings(r=4, alpha=8), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def gradients(model: PeftModel, pairs: list[PreferencePair]) -> dict[str, torch.Tensor]:
    for inputs in PairCollator(200)(pairs)["micro_batches"]:  # several passes of different lengths
        pair_losses(model, inputs, w=0.5, beta=0.1).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients_and_are_put_back(
    model: PeftModel, pairs: list[PreferencePair]
) -> None:
    expected = gradients(model, pairs[:6])
    with compiled_layers(model):
        layer = model.get_base_model().model.layers[0]
        assert "forward" in vars(layer.mlp) and "forward" in vars(layer.input_layernorm)
        found = gradients(model, pairs[:6])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.linalg.vector_norm(found[name] - gradient) <= 1e-5 * torch.linalg.vector_norm(gradient), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_a_compiler_it_says_so(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HelpsteerError, match=r"run\.compile needs a C\+\+ compiler"), compiled_layers(model):
        pass


def test_not_enabled_it_changes_nothing(model: PeftModel) -> None:
    with compiled_layers(model, enabled=False):
        assert not any("forward" in vars(module) for module in model.modules())

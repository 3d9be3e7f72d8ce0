"""What tests of models and of generation share: an adapter on disk, and a model that ends some responses."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.settings import Lora

EOS = 2


@pytest.fixture(scope="session")
def adapter(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every linear layer of the tiny model that changes much. Don't write into it."""
    model = attach_lora(load_model(tiny_model_path, precision="fp32"), Lora(r=4, alpha=4), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path


@pytest.fixture
def ending_model(model: PreTrainedModel) -> PreTrainedModel:
    """The tiny model, made to end some of its responses at once and not others."""
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5
    return model

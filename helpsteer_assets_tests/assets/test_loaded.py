"""One loaded model for all stages of a process."""

import gc
import shutil
import weakref
from pathlib import Path

import torch

from helpsteer_assets.assets.loaded import LoadedModels
from helpsteer_assets.experiment.settings import LoraSettings
from helpsteer_assets.modpo.models.loading import attach_lora

CPU = torch.device("cpu")


def test_a_model_is_loaded_once_and_lent_again(tiny_model_path: Path) -> None:
    models = LoadedModels()
    with models.lend(tiny_model_path, precision="fp32", device=CPU) as model:
        first = id(model.get_input_embeddings().weight)
        attach_lora(model, LoraSettings(r=4, alpha=8), seed=1).train()
    with models.lend(tiny_model_path, precision="fp32", device="cpu") as again:
        assert again is model
        assert id(again.get_input_embeddings().weight) == first
        assert not any("lora" in name for name, _ in again.named_modules())
        assert not again.training and all(parameter.requires_grad for parameter in again.parameters())


def test_another_path_or_precision_is_another_model_and_frees_the_first(tiny_model_path: Path, tmp_path: Path) -> None:
    models = LoadedModels()
    with models.lend(tiny_model_path, precision="fp32", device=CPU) as model:
        first = weakref.ref(model)
    del model
    assert first() is not None
    with models.lend(tiny_model_path, precision="bf16", device=CPU) as model:
        assert model.dtype == torch.bfloat16
        assert first() is None, "two models in memory"
    other = Path(shutil.copytree(tiny_model_path, tmp_path / "other"))
    with models.lend(other, precision="bf16", device=CPU) as another:
        assert another is not model


def test_a_model_is_lent_once_at_a_time_and_released_at_the_end_of_a_run(tiny_model_path: Path) -> None:
    models = LoadedModels()
    models.release()
    with models.lend(tiny_model_path, precision="fp32", device=CPU) as model:
        kept = weakref.ref(model)
        with models.lend(tiny_model_path, precision="fp32", device=CPU) as other:
            assert model is not other
    del model, other
    gc.collect()
    assert kept() is not None
    models.release()
    assert kept() is None

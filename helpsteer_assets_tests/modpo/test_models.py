import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment import LoraSettings, ModelSettings, RunSettings
from helpsteer_assets.modpo.models import (
    attach_lora,
    check_lengths,
    choose_device,
    context_length,
    load_adapters,
    load_model,
    load_tokenizer,
)
from helpsteer_assets_tests.conftest import make_model, make_tokenizer


@pytest.fixture
def copy(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


class TestChooseDevice:
    def test_refuses_cuda_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(HelpsteerError, match=r"run\.device is cuda, and torch sees no CUDA device"):
            choose_device(RunSettings(device="cuda"), "fp32")

    def test_refuses_bf16_on_a_gpu_without_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
        with pytest.raises(HelpsteerError, match=r"is bf16, which Old GPU .* set model.precision: fp32"):
            choose_device(RunSettings(device="auto"), "bf16")
        assert choose_device(RunSettings(device="auto"), "fp32").type == "cuda"

    def test_auto_is_the_cpu_where_there_is_no_gpu_and_cpu_is_the_cpu_always(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device(RunSettings(device="auto"), "bf16").type == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose_device(RunSettings(device="cpu"), "bf16").type == "cpu"

    def test_sets_the_stated_number_of_threads(self):
        choose_device(RunSettings(device="cpu", threads=2), "fp32")
        assert torch.get_num_threads() == 2

    def test_rounds_denormals_to_zero(self):
        choose_device(RunSettings(device="cpu"), "fp32")
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0


class TestLoading:
    def test_a_folder_without_a_model_is_named(self, tmp_path: Path):
        with pytest.raises(HelpsteerError, match=f"no causal language model can be loaded from {tmp_path}"):
            load_model(tmp_path, precision="fp32")
        with pytest.raises(HelpsteerError, match=f"no tokenizer can be loaded from {tmp_path}"):
            load_tokenizer(tmp_path)
        with pytest.raises(HelpsteerError, match=f"no model config can be read from {tmp_path}"):
            context_length(tmp_path)

    def test_damaged_weights_are_named(self, copy: Path):
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
        with pytest.raises(HelpsteerError, match=f"no causal language model can be loaded from {copy}"):
            load_model(copy, precision="fp32")

    def test_missing_weights_are_refused_and_not_made_up(self, copy: Path):
        weights = load_file(copy / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HelpsteerError, match=r"lacks weights of a causal language model \(lm_head.weight"):
            load_model(copy, precision="fp32")

    def test_a_head_tied_to_the_embeddings_is_not_missing(self, tmp_path: Path):
        tied = make_model(290, tied=True)
        tied.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        loaded = load_model(tmp_path, precision="fp32")
        assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight)

    @pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_precision_is_the_stated_one_and_dropout_is_off(self, tiny_model_path: Path, precision, dtype):
        loaded = load_model(tiny_model_path, precision=precision)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert not loaded.training

    def test_a_tokenizer_without_pad_token_pads_with_its_end_of_text_token(self, tmp_path: Path):
        make_tokenizer(pad=False).save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.pad_token_id == loaded.eos_token_id == 2


class TestCheckLengths:
    settings = ModelSettings(base="embedded", precision="fp32")

    def test_passes_up_to_the_models_context(self, tiny_model_path: Path):
        assert context_length(tiny_model_path) == 128
        check_lengths(self.settings, tiny_model_path, 128, "model.max_length")

    def test_names_key_model_and_limit_beyond_it(self, tiny_model_path: Path):
        with pytest.raises(HelpsteerError, match=r"model.max_length ask\(s\) for 129 tokens .* embedded has 128"):
            check_lengths(self.settings, tiny_model_path, 129, "model.max_length")

    def test_passes_where_the_config_names_no_limit(self, tmp_path: Path):
        BloomConfig().save_pretrained(tmp_path)
        assert context_length(tmp_path) is None
        check_lengths(self.settings, tmp_path, 10**6, "model.max_length")


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


class TestAttachLora:
    def attached(self, path: Path, seed: int, **lora: object) -> dict[str, torch.Tensor]:
        return lora_weights(attach_lora(load_model(path, precision="fp32"), LoraSettings(r=4, **lora), seed))

    def test_initial_weights_depend_on_the_seed_alone(self, tiny_model_path: Path):
        torch.manual_seed(1)
        first = self.attached(tiny_model_path, 5)
        torch.manual_seed(2)
        torch.rand(100)
        second = self.attached(tiny_model_path, 5)
        other = self.attached(tiny_model_path, 6)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_targets_all_linear_layers_but_the_head(self, tiny_model_path: Path):
        names = {name.split(".lora_")[0].rpartition(".")[2] for name in self.attached(tiny_model_path, 0)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_targets_the_named_layers_only(self, tiny_model_path: Path):
        found = self.attached(tiny_model_path, 0, target_modules=["q_proj", "mlp.up_proj"])
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in found} == {"q_proj", "up_proj"}

    @pytest.mark.parametrize("names", [["query"], ["q_proj", "query"], ["proj"], ["q_proj", "lm_head"]])
    def test_a_name_that_fits_no_layer_is_refused_even_beside_one_that_does(self, model, names):
        message = rf"lora.target_modules: {names[-1]}: .* \(there are down_proj, gate_proj"
        with pytest.raises(HelpsteerError, match=message):
            attach_lora(model, LoraSettings(target_modules=names), 0)

    def test_leaves_what_the_model_says_unchanged_at_first(self, model):
        tokens = torch.arange(3, 30)[None]
        with torch.no_grad():
            before = model(tokens).logits
            after = attach_lora(model, LoraSettings(), 0)(tokens).logits
        assert torch.equal(before, after)


def test_load_adapters_gives_each_its_own_weights(tiny_model_path: Path, tmp_path: Path):
    for seed, name in enumerate(("one", "two")):
        peft_model = attach_lora(load_model(tiny_model_path, precision="fp32"), LoraSettings(r=4), seed)
        peft_model.save_pretrained(tmp_path / name)
    loaded = load_adapters(
        load_model(tiny_model_path, precision="fp32"), {"a": tmp_path / "one", "b": tmp_path / "two"}
    )
    weights = lora_weights(loaded)
    for name, folder in (("a", "one"), ("b", "two")):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        for key, weight in saved.items():
            assert torch.equal(weights[key.replace(".weight", f".{name}.weight")], weight)
    assert not loaded.training

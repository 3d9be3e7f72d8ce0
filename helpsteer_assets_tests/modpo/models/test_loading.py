import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, LlamaConfig, LlamaForCausalLM

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import (
    attach_lora,
    check_lengths,
    check_vocabulary,
    choose_device,
    context_length,
    load_adapters,
    load_model,
    load_tokenizer,
    model_size,
    require_safetensors,
)
from helpsteer_assets.modpo.settings import Compute, Lora
from helpsteer_assets_tests.conftest import make_model, make_tokenizer


@pytest.fixture
def copy(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


class TestChooseDevice:
    def test_refuses_cuda_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(HelpsteerError, match=r"run\.device is cuda, and torch sees no CUDA device"):
            choose_device(Compute(device="cuda"), "fp32")

    def test_refuses_bf16_on_a_gpu_without_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
        with pytest.raises(HelpsteerError, match=r"is bf16, which Old GPU .* set model.precision: fp32"):
            choose_device(Compute(device="auto"), "bf16")
        assert choose_device(Compute(device="auto"), "fp32").type == "cuda"

    def test_auto_is_the_cpu_where_there_is_no_gpu_and_cpu_is_the_cpu_always(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device(Compute(device="auto"), "bf16").type == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose_device(Compute(device="cpu"), "bf16").type == "cpu"

    def test_sets_the_stated_number_of_threads(self):
        choose_device(Compute(device="cpu", threads=2), "fp32")
        assert torch.get_num_threads() == 2

    def test_rounds_denormals_to_zero(self):
        choose_device(Compute(device="cpu"), "fp32")
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0


class TestLoading:
    def test_a_folder_without_a_model_is_named(self, tmp_path: Path):
        with pytest.raises(HelpsteerError, match=f"{tmp_path} holds no weights"):
            load_model(tmp_path, precision="fp32")
        with pytest.raises(HelpsteerError, match=f"no model config can be read from {tmp_path}"):
            model_size(tmp_path, Lora())
        with pytest.raises(HelpsteerError, match=f"no tokenizer can be loaded from {tmp_path}"):
            load_tokenizer(tmp_path)
        with pytest.raises(HelpsteerError, match=f"no model config can be read from {tmp_path}"):
            context_length(tmp_path)

    def test_a_config_that_makes_no_sense_is_said_in_one_line(self, copy: Path):
        (copy / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
        for load in (lambda: load_model(copy, precision="fp32"), lambda: model_size(copy, Lora())):
            with pytest.raises(HelpsteerError, match=f"from {copy}: .*hidden_size.*expected int, got str") as raised:
                load()
            assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_damaged_tokenizer_is_named(self, copy: Path, file: str):
        (copy / file).write_text("{")
        with pytest.raises(HelpsteerError, match=f"no tokenizer can be loaded from {copy}"):
            load_tokenizer(copy)

    @pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b[:-1], lambda b: b"", lambda b: b"\0" + b[1:]])
    def test_weights_cut_short_or_damaged_are_named_without_reading_them(
        self, copy: Path, damage: Callable[[bytes], bytes]
    ):
        file = copy / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        for load in (require_safetensors, lambda folder: load_model(folder, precision="fp32")):
            with pytest.raises(HelpsteerError, match=f"{file} is damaged or incomplete .*; get it again"):
                load(copy)

    def test_a_missing_part_of_the_weights_is_named(self, copy: Path):
        whole = load_model(copy, precision="fp32")
        (copy / "model.safetensors").unlink()
        whole.save_pretrained(copy, max_shard_size="40KB")
        again = load_model(copy, precision="fp32")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        part = next(copy.glob("model-00002-of-*.safetensors"))
        part.unlink()
        with pytest.raises(HelpsteerError, match=f"{part} is missing"):
            load_model(copy, precision="fp32")
        (copy / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        with pytest.raises(HelpsteerError, match=r"model.safetensors.index.json is damaged"):
            load_model(copy, precision="fp32")

    def test_pickled_weights_are_never_read(self, copy: Path):
        (copy / "model.safetensors").unlink()
        # Reading this as a pickle would be an error of its own.
        (copy / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
        with pytest.raises(HelpsteerError, match=r"weights as pickles only \(pytorch_model.bin\).* save_pretrained"):
            load_model(copy, precision="fp32")

    def test_weights_of_another_model_than_the_config_describes_are_refused(self, copy: Path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
        message = r"are of different models: lm_head.weight has the shape .*, and by the config \[400, 32\] \(2 such"
        with pytest.raises(HelpsteerError, match=message):
            load_model(copy, precision="fp32")

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_weights_that_are_not_finite_are_refused_and_named(self, copy: Path, value: float):
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"][3] = value
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HelpsteerError, match=r"1 weight\(s\) .* not finite in fp32 \(the first: model.norm.weight"):
            load_model(copy, precision="fp32")

    def test_an_adapter_is_no_model_even_where_a_model_lies_beside_it(self, copy: Path, model, tmp_path: Path):
        attach_lora(model, Lora(r=4), 0).save_pretrained(tmp_path / "adapter")
        shutil.copy(tmp_path / "adapter" / "adapter_config.json", copy)
        for folder in (tmp_path / "adapter", copy):
            for load in (
                lambda path: load_model(path, precision="fp32"),
                lambda path: model_size(path, Lora()),
            ):
                with pytest.raises(HelpsteerError, match=f"{folder} holds an adapter .*merge_and_unload"):
                    load(folder)

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

    def test_a_tokenizer_without_end_of_text_token_is_refused(self, tmp_path: Path):
        make_tokenizer(eos=False, pad=False).save_pretrained(tmp_path)
        with pytest.raises(HelpsteerError, match=f"{tmp_path} has no end-of-text token .* set eos_token"):
            load_tokenizer(tmp_path)


class TestVocabulary:
    def test_every_token_within_the_embeddings_passes(self):
        tokenizer = make_tokenizer()
        check_vocabulary(tokenizer, len(tokenizer))

    def test_ordinary_tokens_beyond_the_embeddings_are_counted_and_the_first_named(self):
        tokenizer = make_tokenizer()
        first = tokenizer.convert_ids_to_tokens(len(tokenizer) - 2)
        message = rf"has 2 token\(s\) that the model does not embed .*{re.escape(repr(first))}, id {len(tokenizer) - 2}"
        with pytest.raises(HelpsteerError, match=message):
            check_vocabulary(tokenizer, len(tokenizer) - 2)

    def test_a_pad_token_that_was_added_without_the_model_is_refused_and_other_added_tokens_are_not(self):
        tokenizer = make_tokenizer(pad=False)
        embeddings = len(tokenizer)
        tokenizer.add_tokens(["<image>"])
        check_vocabulary(tokenizer, embeddings)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        with pytest.raises(HelpsteerError, match=r"has 1 token\(s\) .*'\[PAD\]'"):
            check_vocabulary(tokenizer, embeddings)


class TestCheckLengths:
    def test_passes_up_to_the_models_context(self, tiny_model_path: Path):
        assert context_length(tiny_model_path) == 128
        check_lengths(tiny_model_path, 128, "model.max_length", base="embedded")

    def test_names_key_model_and_limit_beyond_it(self, tiny_model_path: Path):
        with pytest.raises(HelpsteerError, match=r"model.max_length ask\(s\) for 129 tokens .* embedded has 128"):
            check_lengths(tiny_model_path, 129, "model.max_length", base="embedded")

    def test_passes_where_the_config_names_no_limit(self, tmp_path: Path):
        BloomConfig().save_pretrained(tmp_path)
        assert context_length(tmp_path) is None
        check_lengths(tmp_path, 10**6, "model.max_length", base="embedded")


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


class TestAttachLora:
    def attached(self, path: Path, seed: int, **lora: object) -> dict[str, torch.Tensor]:
        return lora_weights(attach_lora(load_model(path, precision="fp32"), Lora(r=4, **lora), seed))

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
            attach_lora(model, Lora(target_modules=names), 0)

    @pytest.mark.parametrize("modules", ["all-linear", ["v_proj", "q_proj"]])
    def test_is_saved_in_one_order_of_the_modules(self, model, tmp_path: Path, modules):
        attach_lora(model, Lora(target_modules=modules), 0).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        assert len(saved) > 1 and saved == sorted(saved)

    def test_leaves_what_the_model_says_unchanged_at_first(self, model):
        tokens = torch.arange(3, 30)[None]
        with torch.no_grad():
            before = model(tokens).logits
            after = attach_lora(model, Lora(), 0)(tokens).logits
        assert torch.equal(before, after)


def test_load_adapters_gives_each_its_own_weights(tiny_model_path: Path, tmp_path: Path):
    for seed, name in enumerate(("one", "two")):
        peft_model = attach_lora(load_model(tiny_model_path, precision="fp32"), Lora(r=4), seed)
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


class TestAdaptersThatDoNotFit:
    def adapter(self, folder: Path, **config: int) -> Path:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        other = LlamaForCausalLM(LlamaConfig(vocab_size=290, num_key_value_heads=2, **shape | config))
        attach_lora(other, Lora(r=4, target_modules=["q_proj", "up_proj"]), 0).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("config", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 64}])
    @pytest.mark.parametrize("beside_another", [False, True])
    def test_one_of_another_model_is_refused(self, model, tmp_path: Path, config: dict[str, int], beside_another: bool):
        adapters = {"good": self.adapter(tmp_path / "good")} if beside_another else {}
        other = self.adapter(tmp_path / "other", **config)
        with pytest.raises(HelpsteerError, match=f"the adapter {other} .* trained on another base model"):
            load_adapters(model, adapters | {"other": other})

    def test_damaged_and_pickled_ones_are_refused(self, model, tmp_path: Path):
        folder = self.adapter(tmp_path / "adapter")
        weights = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights[:-1])
        with pytest.raises(HelpsteerError, match=f"{folder}/adapter_model.safetensors is damaged or incomplete"):
            load_adapters(model, {"a": folder})
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(b"cposix\nsystem\n")
        with pytest.raises(HelpsteerError, match=f"{folder}/adapter_model.safetensors is missing"):
            load_adapters(model, {"a": folder})
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(HelpsteerError, match=f"the adapter {folder} cannot be loaded onto the model"):
            load_adapters(model, {"a": folder})


def test_a_model_is_measured_by_its_config_alone(tiny_model_path: Path, tmp_path: Path):
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    measured = model_size(tmp_path, Lora(r=4))
    whole = load_model(tiny_model_path, precision="fp32")
    assert measured.parameters == whole.num_parameters()
    assert measured.embeddings == whole.get_input_embeddings().num_embeddings
    looked_up = whole.get_input_embeddings().weight.numel()
    assert whole.config.tie_word_embeddings is False
    assert measured.weights_per_token == whole.num_parameters() - looked_up
    trained = lora_weights(attach_lora(whole, Lora(r=4), 0))
    assert measured.adapter_parameters == sum(weight.numel() for weight in trained.values())

import json
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

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


class TestChooseDevice:
    def test_takes_a_gpu_where_there_is_one_and_it_is_wanted(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(HelpsteerError, match=r"run\.device is cuda, and torch sees no CUDA device"):
            choose_device(Compute(device="cuda"), "fp32")
        assert choose_device(Compute(device="auto"), "bf16").type == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
        with pytest.raises(HelpsteerError, match=r"is bf16, which Old GPU .* set model.precision: fp32"):
            choose_device(Compute(device="auto"), "bf16")
        assert choose_device(Compute(device="auto"), "fp32").type == "cuda"
        assert choose_device(Compute(device="cpu"), "bf16").type == "cpu"


def changed_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    # Reading this as a pickle would be an error of its own.
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")


def another_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model holds no weights in safetensors"),
    "pickles": (only_pickles, r"weights as pickles only \(pytorch_model.bin\).* save_pretrained"),
    "another model's config": (
        another_config,
        r"are of different models: lm_head.weight has the shape .*, and by the config \[400, 32\] \(2 such",
    ),
    "missing weight": (
        changed_weights(lambda weights: weights.pop("lm_head.weight")),
        r"lacks weights of a causal language model \(lm_head.weight",
    ),
    "infinity": (
        changed_weights(lambda weights: weights["model.norm.weight"][3:4].fill_(float("-inf"))),
        r"1 weight\(s\) .* not finite in fp32 \(the first: model.norm.weight",
    ),
}


class TestLoading:
    @pytest.mark.parametrize("name", BROKEN)
    def test_a_model_that_cannot_work_is_refused_in_one_line(self, copy: Path, name: str):
        damage, message = BROKEN[name]
        damage(copy)
        with pytest.raises(HelpsteerError, match=message) as raised:
            load_model(copy, precision="fp32")
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"\0" + b[1:]])
    def test_weights_cut_short_or_damaged_are_named_without_reading_them(
        self, copy: Path, damage: Callable[[bytes], bytes]
    ):
        file = copy / WEIGHTS
        file.write_bytes(damage(file.read_bytes()))
        for load in (require_safetensors, lambda folder: load_model(folder, precision="fp32")):
            with pytest.raises(HelpsteerError, match=f"{file} is damaged or incomplete .*; get it again"):
                load(copy)

    def test_a_missing_part_of_the_weights_is_named(self, copy: Path):
        whole = load_model(copy, precision="fp32")
        (copy / WEIGHTS).unlink()
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

    def test_an_adapter_is_no_model_even_where_a_model_lies_beside_it(self, copy: Path, model):
        attach_lora(model, Lora(r=4), 0).save_pretrained(copy)
        for load in (lambda path: load_model(path, precision="fp32"), lambda path: model_size(path, Lora())):
            with pytest.raises(HelpsteerError, match=f"{copy} holds an adapter .*merge_and_unload"):
                load(copy)

    def test_a_folder_without_config_is_named(self, tmp_path: Path):
        for load in (lambda path: model_size(path, Lora()), context_length):
            with pytest.raises(HelpsteerError, match=f"no model config can be read from {tmp_path}"):
                load(tmp_path)

    def test_a_head_tied_to_the_embeddings_is_not_missing(self, tmp_path: Path):
        tied = make_model(290, tied=True)
        tied.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
        loaded = load_model(tmp_path, precision="fp32")
        assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight)

    @pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
    def test_precision_is_the_stated_one_and_dropout_is_off(self, tiny_model_path: Path, precision, dtype):
        loaded = load_model(tiny_model_path, precision=precision)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert not loaded.training


class TestTokenizer:
    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_damaged_one_is_named(self, copy: Path, file: str):
        (copy / file).write_text("{")
        with pytest.raises(HelpsteerError, match=f"no tokenizer can be loaded from {copy}"):
            load_tokenizer(copy)

    def test_one_without_pad_token_pads_with_its_end_of_text_token_and_needs_that(self, tmp_path: Path):
        make_tokenizer(pad=False).save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.pad_token_id == loaded.eos_token_id == 2
        make_tokenizer(eos=False, pad=False).save_pretrained(tmp_path)
        with pytest.raises(HelpsteerError, match=f"{tmp_path} has no end-of-text token .* set eos_token"):
            load_tokenizer(tmp_path)

    def test_a_pad_token_that_was_added_without_the_model_is_refused_and_other_added_tokens_are_not(self):
        tokenizer = make_tokenizer(pad=False)
        embeddings = len(tokenizer)
        tokenizer.add_tokens(["<image>"])
        check_vocabulary(tokenizer, embeddings)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        with pytest.raises(HelpsteerError, match=r"has 1 token\(s\) .*'\[PAD\]'"):
            check_vocabulary(tokenizer, embeddings)


def test_lengths_beyond_the_models_context_are_refused(tiny_model_path: Path, tmp_path: Path):
    check_lengths(tiny_model_path, 128, "model.max_length", base="embedded")
    with pytest.raises(HelpsteerError, match=r"model.max_length ask\(s\) for 129 tokens .* embedded has 128"):
        check_lengths(tiny_model_path, 129, "model.max_length", base="embedded")
    BloomConfig().save_pretrained(tmp_path)  # names no limit
    check_lengths(tmp_path, 10**6, "model.max_length", base="embedded")


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


class TestAttachLora:
    def test_initial_weights_depend_on_the_seed_alone_and_change_nothing(self, tiny_model_path: Path):
        tokens = torch.arange(3, 30)[None]
        weights = []
        for torch_seed, seed in ((1, 5), (2, 5), (2, 6)):
            model = load_model(tiny_model_path, precision="fp32")
            before = model(tokens).logits
            torch.manual_seed(torch_seed)
            policy = attach_lora(model, Lora(r=4), seed)
            assert torch.equal(policy(tokens).logits, before)
            weights.append(lora_weights(policy))
        first, second, other = weights
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    @pytest.mark.parametrize(
        ("modules", "targets"),
        [
            ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
            (["v_proj", "mlp.up_proj", "q_proj"], ["q_proj", "up_proj", "v_proj"]),
        ],
    )
    def test_targets_the_named_layers_and_never_the_head_and_is_saved_in_one_order(
        self, model, tmp_path: Path, modules, targets
    ):
        policy = attach_lora(model, Lora(r=4, target_modules=modules), 0)
        assert sorted({name.split(".lora_")[0].rpartition(".")[2] for name in lora_weights(policy)}) == targets
        policy.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        assert len(saved) > 1 and saved == sorted(saved)

    @pytest.mark.parametrize("names", [["q_proj", "query"], ["q_proj", "lm_head"]])
    def test_a_name_that_fits_no_layer_is_refused_even_beside_one_that_does(self, model, names):
        message = rf"lora.target_modules: {names[-1]}: .* \(there are down_proj, gate_proj"
        with pytest.raises(HelpsteerError, match=message):
            attach_lora(model, Lora(target_modules=names), 0)


def save_adapter(folder: Path, seed: int = 0, **config: int) -> Path:
    """An adapter of the tiny model, or of one of another shape."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=290, num_key_value_heads=2, **shape | config))
    attach_lora(model, Lora(r=4, target_modules=["q_proj", "up_proj"]), seed).save_pretrained(folder)
    return folder


class TestLoadAdapters:
    def test_gives_each_its_own_weights(self, model, tmp_path: Path):
        adapters = {name: save_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
        loaded = load_adapters(model, adapters)
        weights = lora_weights(loaded)
        for name, folder in adapters.items():
            for key, weight in load_file(folder / "adapter_model.safetensors").items():
                assert torch.equal(weights[key.replace(".weight", f".{name}.weight")], weight)
        assert not torch.equal(*(w for n, w in weights.items() if "layers.0.self_attn.q_proj.lora_A" in n))
        assert not loaded.training

    @pytest.mark.parametrize("config", [{"num_hidden_layers": 1}, {"hidden_size": 64}])
    @pytest.mark.parametrize("beside_another", [False, True])
    def test_one_of_another_model_is_refused(self, model, tmp_path: Path, config: dict[str, int], beside_another: bool):
        adapters = {"good": save_adapter(tmp_path / "good")} if beside_another else {}
        other = save_adapter(tmp_path / "other", **config)
        with pytest.raises(HelpsteerError, match=f"the adapter {other} .* trained on another base model"):
            load_adapters(model, adapters | {"other": other})

    def test_damaged_and_pickled_ones_are_refused(self, model, tmp_path: Path):
        folder = save_adapter(tmp_path / "adapter")
        file = folder / "adapter_model.safetensors"
        weights = file.read_bytes()
        file.write_bytes(weights[:-1])
        with pytest.raises(HelpsteerError, match=f"{file} is damaged or incomplete"):
            load_adapters(model, {"a": folder})
        file.unlink()
        (folder / "adapter_model.bin").write_bytes(b"cposix\nsystem\n")
        with pytest.raises(HelpsteerError, match=f"{file} is missing"):
            load_adapters(model, {"a": folder})
        file.write_bytes(weights)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(HelpsteerError, match=f"the adapter {folder} cannot be loaded onto the model"):
            load_adapters(model, {"a": folder})


def test_a_model_is_measured_by_its_config_alone(tiny_model_path: Path, tmp_path: Path):
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    measured = model_size(tmp_path, Lora(r=4))
    whole = load_model(tiny_model_path, precision="fp32")
    embeddings = whole.get_input_embeddings()
    assert (measured.parameters, measured.embeddings) == (whole.num_parameters(), embeddings.num_embeddings)
    assert whole.config.tie_word_embeddings is False
    assert measured.weights_per_token == whole.num_parameters() - embeddings.weight.numel()
    trained = lora_weights(attach_lora(whole, Lora(r=4), 0))
    assert measured.adapter_parameters == sum(weight.numel() for weight in trained.values())

from collections.abc import Callable
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
TOLERANCES = [(torch.float64, 1e-11), (torch.float32, 1e-5)]


def with_lora(model: PreTrainedModel, *, adapters: tuple[str, ...] = ("default",), **changes: Any) -> PeftModel:
    """A model with peft's LoRA as in the midst of training."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    peft_model = get_peft_model(model, config, adapter_name=adapters[0], autocast_adapter_dtype=False)
    for name in adapters[1:]:
        peft_model.add_adapter(name, config, autocast_adapter_dtype=False)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model.eval()


def both(model: PreTrainedModel, **how: Any) -> tuple[PeftModel, PeftModel]:
    """The same LoRA model, fused and as peft has it."""
    peft_model = with_lora(model, **how)
    return fuse_lora(deepcopy(peft_model)), peft_model


def layers(model: PeftModel) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of every trained tensor of a loss that reads them all."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    torch.log_softmax(logits.double(), dim=-1).gather(2, IDS[..., None]).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


def assert_same(fused: PeftModel, peft_model: PeftModel, tolerance: float) -> None:
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


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_gradients_are_those_of_peft(dtype, tolerance, biases, fused_calls):
    model = make_model(300, attention_bias=biases, mlp_bias=biases).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    fused, peft_model = both(model)
    assert_same(fused, peft_model, tolerance)
    assert len(fused_calls) == len(layers(fused)) == 14


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (2, 5), (4, 2)))
    bias = torch.randn(4, dtype=torch.float64)
    trained = [tensor.requires_grad_() for tensor in (x, a, b)]
    for some_bias in (None, bias):
        assert torch.autograd.gradcheck(
            lambda x, a, b, bias=some_bias: fused_lora._LoraLinear.apply(x, weight, bias, a, b, 0.7), trained
        )


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_model_has_pefts_results_up_to_its_rounding(model, adapter_dtype, fused_calls):
    fused, peft_model = both(model.bfloat16())
    for lora_model in (fused, peft_model):
        for name, parameter in lora_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    accurate = deepcopy(peft_model).double()
    (_, found), (_, expected), (_, truth) = run(fused), run(peft_model), run(accurate)
    assert len(fused_calls) == 14
    assert all(gradient.dtype == adapter_dtype for gradient in found.values())

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return sum((gradients[name] - truth[name]).norm() ** 2 for name in truth) ** 0.5

    size = sum(gradient.norm() ** 2 for gradient in truth.values()) ** 0.5
    assert error(found) < 0.05 * size
    assert error(found) < 1.5 * error(expected)


def test_inputs_of_any_shape_and_layout():
    fused, peft_model = both(make_model(300).double())
    ours, theirs = layers(fused)[0], layers(peft_model)[0]
    torch.manual_seed(0)
    drawn = torch.randn(3, 32, 5, dtype=torch.float64)
    for x in (drawn.mT, drawn.mT[0], drawn.mT[0, 0], drawn.mT[:, ::2], drawn.mT[:, None]):
        results = []
        for layer in (ours, theirs):
            given = x.detach().requires_grad_()
            y = layer(given)
            (gradient,) = torch.autograd.grad(y.square().sum(), given)
            results.append((y, gradient))
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, atol=1e-12, rtol=1e-12)


def test_the_first_layers_inputs_need_no_gradient(model):
    fused = layers(both(model)[0])[0]
    x = torch.randn(2, 32)
    fused(x).sum().backward()
    assert x.grad is None
    assert fused.lora_B["default"].weight.grad is not None


class TestWhatIsActive:
    @pytest.fixture
    def pair(self, model) -> tuple[PeftModel, PeftModel]:
        return both(model.double(), adapters=("one", "two"))

    def switched(self, pair: tuple[PeftModel, PeftModel], act: Callable[[PeftModel], Any]) -> None:
        for lora_model in pair:
            act(lora_model)

    def logits(self, lora_model: PeftModel) -> torch.Tensor:
        with torch.no_grad():
            return lora_model(input_ids=IDS).logits

    def test_the_adapter_that_is_set(self, pair, fused_calls):
        found = []
        for name in ("two", "one", "two"):
            self.switched(pair, lambda lora_model, name=name: lora_model.set_adapter(name))
            assert_same(*pair, 1e-11)
            found.append(self.logits(pair[0]))
        assert torch.equal(found[0], found[2])
        assert (found[0] - found[1]).abs().max() > 0.1
        assert len(fused_calls) == 3 * 14 * 2

    def test_none(self, pair, model, fused_calls):
        with pair[0].disable_adapter():
            without = self.logits(pair[0])
        assert fused_calls == []
        assert torch.equal(without, make_like(model, pair[0]))
        assert (self.logits(pair[0]) - without).abs().max() > 0.1

    def test_two_at_once_are_pefts_matter(self, pair, fused_calls):
        self.switched(pair, lambda lora_model: lora_model.base_model.set_adapter(["one", "two"]))
        assert torch.equal(self.logits(pair[0]), self.logits(pair[1]))
        assert fused_calls == []

    def test_merged_and_unmerged(self, pair, fused_calls):
        before = self.logits(pair[0])
        fused_calls.clear()
        pair[0].merge_adapter()
        torch.testing.assert_close(self.logits(pair[0]), before, atol=1e-10, rtol=0)
        assert fused_calls == []
        pair[0].unmerge_adapter()
        torch.testing.assert_close(self.logits(pair[0]), before, atol=1e-10, rtol=0)
        assert len(fused_calls) == 14

    def test_merged_for_good(self, pair):
        before = self.logits(pair[0])
        merged = pair[0].merge_and_unload()
        assert layers(merged) == []
        torch.testing.assert_close(self.logits(merged), before, atol=1e-10, rtol=0)


def make_like(model: PreTrainedModel, of: PeftModel) -> torch.Tensor:
    """Logits of a fresh copy of the model below a LoRA."""
    plain = make_model(model.config.vocab_size).double()
    weights = {name.replace("base_layer.", ""): value for name, value in of.get_base_model().state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    with torch.no_grad():
        return plain(input_ids=IDS).logits


class TestFallsBack:
    def test_to_peft_where_dropout_draws(self, model, fused_calls):
        fused, peft_model = both(model, lora_dropout=0.3)
        results = []
        for lora_model in (fused, peft_model):
            torch.manual_seed(11)
            results.append(run(lora_model.train()))
        assert fused_calls == []
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())

    def test_not_where_dropout_is_off(self, model, fused_calls):
        fused, peft_model = both(model.double(), lora_dropout=0.3)
        assert_same(fused.eval(), peft_model.eval(), 1e-11)
        assert len(fused_calls) == 14

    def test_not_in_training_without_dropout(self, model, fused_calls):
        fused, peft_model = both(model.double())
        assert_same(fused.train(), peft_model.train(), 1e-11)
        assert len(fused_calls) == 14

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    @pytest.mark.parametrize("how", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias of B"])
    def test_to_peft_where_the_adapter_is_more_than_a_b(self, model, fused_calls, how):
        fused, peft_model = both(model.double(), **how)
        assert_same(fused, peft_model, 1e-11)
        assert fused_calls == []

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_where_the_layers_own_bias_is_trained(self, bias):
        model = make_model(300, attention_bias=True).double()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        fused, peft_model = both(model, bias=bias, target_modules=["q_proj", "v_proj"])
        assert any(name.endswith("bias") for name in run(peft_model)[1])
        assert_same(fused, peft_model, 1e-11)

    def test_where_the_layers_own_weight_is_trained(self, model, fused_calls):
        fused, peft_model = both(model.double())
        for lora_model in (fused, peft_model):
            layers(lora_model)[3].base_layer.weight.requires_grad_(True)
        assert_same(fused, peft_model, 1e-11)
        assert len(fused_calls) == 13

    def test_rank_stabilised_scaling_is_fused_and_right(self, model, fused_calls):
        fused, peft_model = both(model.double(), use_rslora=True)
        assert_same(fused, peft_model, 1e-11)
        assert len(fused_calls) == 14


class TestOnDisk:
    def test_the_adapter_saves_and_loads_to_the_same(self, tiny_model_path: Path, tmp_path: Path):
        fused = attach_lora(load_model(tiny_model_path, precision="fp32"), Lora(r=4, alpha=8), 0)
        with torch.no_grad():
            for name, parameter in fused.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        fused.save_pretrained(tmp_path / "adapter")
        expected = fused.eval()(input_ids=IDS).logits
        loaded = load_adapters(load_model(tiny_model_path, precision="fp32"), {"policy": tmp_path / "adapter"})
        plain = PeftModel.from_pretrained(load_model(tiny_model_path, precision="fp32"), tmp_path / "adapter")
        assert (
            {type(layer) for layer in layers(loaded)} == {type(layer) for layer in layers(fused)} == {FusedLoraLinear}
        )
        assert {type(layer) for layer in layers(plain)} == {Linear}
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)

    def test_an_adapter_added_to_fused_layers_is_fused_too(self, model, fused_calls):
        fused, _ = both(model.double(), adapters=("one",))
        fused.add_adapter("later", fused.peft_config["one"])
        fused.set_adapter("later")
        run(fused)
        assert len(fused_calls) == 14

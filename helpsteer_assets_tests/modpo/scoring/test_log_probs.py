import logging
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import attach_lora
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring import log_probs
from helpsteer_assets.modpo.scoring.batching import collate
from helpsteer_assets.modpo.scoring.log_prob_head import LogProbHead
from helpsteer_assets.modpo.scoring.log_probs import (
    BASE,
    PADDED,
    Method,
    method_for,
    padded_log_probs,
    response_log_probs,
    score_sequences,
)
from helpsteer_assets.modpo.scoring.trees import pack
from helpsteer_assets.modpo.settings import Lora
from helpsteer_assets_tests.modpo.scoring.test_trees import sequence

PAD, EOS = 0, 2
LORA = Lora(r=4, alpha=8)


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)

    def tokens(longest: int) -> list[int]:
        return [draw.randrange(3, 290) for _ in range(draw.randint(1, longest))]

    return [sequence(tokens(20), [*tokens(25), EOS]) for _ in range(count)]


def make_trees(vocabulary: int, longest: int = 20, seed: int = 0) -> list[Sequence]:
    """Prompts with one to four responses: one of a single token, equal ones, ones that begin alike, an empty prompt."""
    draw = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return draw.integers(3, vocabulary, draw.integers(1, most + 1)).tolist()

    sequences = [sequence(prompt, tokens(longest)) for prompt in (tokens(longest) for _ in range(3)) for _ in range(2)]
    long_prompt, long_response = tokens(longest) * 2, tokens(longest) * 2
    for response in (long_response, long_response[:1], long_response, [*long_response, 5, 6], [*long_response, 7]):
        sequences.append(sequence(long_prompt, response))
    return [*sequences, sequence([], tokens(longest)), sequence([], [4, 5]), sequence(tokens(longest), [])]


def one_token_at_a_time(model: torch.nn.Module, sequence: Sequence) -> float:
    """log p(y|x) by its definition: each token's probability given those before it, in a forward pass of its own."""
    total, seen = 0.0, list(sequence.prompt_ids)
    for token in sequence.response_ids:
        logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += (logits[token] - torch.logsumexp(logits, 0)).item()
        seen.append(token)
    return total


def randomize(model: PeftModel, std: float = 0.2) -> PeftModel:
    """A LoRA as in the midst of training: at first, with B = 0, half of its gradients vanish."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def two_adapters(model: torch.nn.Module) -> PeftModel:
    """Random LoRA adapters `first` and `second` that do something."""
    peft_model = attach_lora(model, LORA, seed=0)
    for name in ("first", "second"):
        peft_model.add_adapter(name, peft_model.peft_config["default"])
    return randomize(peft_model)


class TestPaddedLogProbs:
    # Llama's norms compute in fp32 even in an fp64 model.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 1e-4)])
    @torch.no_grad()
    def test_equal_a_loop_over_the_tokens(self, model, dtype, tolerance):
        model.to(dtype)
        sequences = make_sequences(6)
        found = padded_log_probs(model, collate(sequences, PAD))
        assert found.dtype == torch.float64
        expected = [one_token_at_a_time(model, sequence) for sequence in sequences]
        torch.testing.assert_close(found, torch.tensor(expected).double(), atol=tolerance, rtol=0)

    @torch.no_grad()
    def test_count_the_end_of_text_token_where_it_is_the_pad_token_too(self, model):
        model.double()
        sequences = make_sequences(8)
        with_own_pad = padded_log_probs(model, collate(sequences, PAD))
        with_eos_as_pad = padded_log_probs(model, collate(sequences, EOS))
        torch.testing.assert_close(with_own_pad, with_eos_as_pad, atol=1e-10, rtol=0)


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
# A window of 7 is shorter than most of the texts here.
TREE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied embeddings, biases": (
        "Llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2, windows in some layers": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "mistral, window": ("Mistral", SMALL | {"sliding_window": 7}),
    "gemma": ("Gemma", SMALL | {"head_dim": 16}),
    "gemma2, window, soft-capping": (
        "Gemma2",
        SMALL
        | {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 1.0,
        },
    ),
    "gemma3, window": ("Gemma3Text", SMALL | {"head_dim": 16, "sliding_window": 7, "num_hidden_layers": 3}),
    "cohere": ("Cohere", SMALL | {"logit_scale": 0.3}),
    "granite": (
        "Granite",
        SMALL
        | {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
        },
    ),
    "phi3, window": ("Phi3", SMALL | {"sliding_window": 7}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "experts_implementation": "eager"}),
    "smollm3": ("SmolLM3", SMALL),
}


def make_family(config: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A random model; its weights are large, so that what it reads changes what it says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{config}Config")(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_lora(model: PreTrainedModel) -> PeftModel:
    return randomize(attach_lora(model, LORA, 0), std=0.05).eval()


class InDoublePrecision(TorchFunctionMode):
    """Casts to fp32 become casts to fp64.

    Models compute norms, rotations and softmaxes in fp32 even where all else is fp64: their rounding, which amplifies
    the last bit of what goes in, would hide errors of less than 1e-7.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def values_and_gradients(
    model: torch.nn.Module, log_probs_of: Callable[[], torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    values = log_probs_of()
    (values * weights).sum().backward()
    return values.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_trees_equal_padded(
    model: torch.nn.Module, sequences: list[Sequence], value_tolerance: float, gradient_tolerance: float
) -> None:
    """Compare log-probabilities (nats) and the gradient of every trained tensor (relative to its norm)."""
    batch, rows = pack(sequences)
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with InDoublePrecision() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        expected, expected_gradients = values_and_gradients(
            model, lambda: padded_log_probs(model, collate(sequences, PAD)), weights
        )
        found, gradients = values_and_gradients(model, lambda: response_log_probs(model, batch)[rows], weights)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=value_tolerance, rtol=value_tolerance)
    assert gradients.keys() == expected_gradients.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # A floor for tensors whose true gradient is zero, as a key's bias has it under the softmax.
        size = max(gradient.norm(), 1e-3 * largest)
        assert (gradients[name] - gradient).norm() <= gradient_tolerance * size, name


class TestTrees:
    """`response_log_probs`, from trees with a fused head, against `padded_log_probs`."""

    @pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match", "ignore:fan_in_fan_out")
    @pytest.mark.parametrize("family", TREE_FAMILIES)
    def test_equal_padded_sequences(self, family, caplog):
        sequences = make_trees(97)
        model = with_lora(make_family(*TREE_FAMILIES[family]).double())
        assert method_for(model) == Method("split", fused=True)
        assert uses_fused_head(model)
        assert_trees_equal_padded(model, sequences, 1e-10, 1e-9)
        assert caplog.records == []

    TOKENS = st.lists(st.integers(3, 8), max_size=6)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        sequences=st.lists(st.builds(sequence, TOKENS, TOKENS), min_size=1, max_size=8).filter(
            lambda sequences: sum(map(len, sequences))
        ),
        tied=st.booleans(),
        query_groups=st.sampled_from([1, 2, 4]),
    )
    def test_equal_padded_sequences_whatever_these_are(self, sequences, tied, query_groups):
        config = SMALL | {"tie_word_embeddings": tied, "num_key_value_heads": 4 // query_groups}
        model = make_family("Llama", config).double()
        assert_trees_equal_padded(with_lora(model), sequences, 1e-10, 1e-9)


def uses_fused_head(model: torch.nn.Module) -> bool:
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        fused = LogProbHead.__call__
        patch.setattr(LogProbHead, "__call__", lambda *inputs: (calls.append(1), fused(*inputs))[1])
        method_for(model)
        calls.clear()
        response_log_probs(model, pack([Sequence(np.array([3, 4]), np.array([5]))])[0])
    return calls == [1]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("helpsteer_assets")]


class TestMethods:
    """What becomes of models that trees or the fused head do not fit."""

    FALLBACKS = {  # noqa: RUF012
        "an attention of its own": (
            "Falcon",
            {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            "TypeError: ",
        ),
        "position biases": ("Bloom", GPT, "0 of 2 layers attend by the registry"),
        "attention sinks": (
            "GptOss",
            SMALL | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 7},
            "attention sinks",
        ),
        "a convolution": ("Lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    }

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", FALLBACKS)
    def test_a_fallback_is_right_and_says_once_why(self, kind, caplog):
        family, config, reason = self.FALLBACKS[kind]
        model = with_lora(make_family(family, config))
        sequences = make_trees(97)[:6]
        assert_trees_equal_padded(model, sequences, 1e-5, 1e-5)
        assert_trees_equal_padded(model, sequences, 1e-5, 1e-5)
        assert method_for(model) == PADDED
        (line,) = logged(caplog)
        name = type(model.get_base_model()).__name__
        assert line.startswith(f"{name}: log-probabilities are computed from padded batches, not from prompt trees")
        assert caplog.records[-1].levelno == logging.WARNING
        assert reason in line

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("family", ["Bloom", "Lfm2", "Mamba", "Qwen3Next"])
    def test_a_model_with_more_than_plain_attention_is_noticed_however_little_that_shows(self, family):
        config = {"Bloom": GPT, "Lfm2": SMALL | {"layer_types": ["conv", "full_attention"]}}.get(family, SMALL)
        model = make_family(family, {k: v for k, v in config.items() if family != "Mamba" or "intermediate" not in k})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.2)
        assert method_for(model.bfloat16()) == PADDED

    @pytest.mark.parametrize("change", ["trained", "under a lora"])
    def test_a_head_that_changed_since_the_method_was_found_is_right_too(self, model, change):
        model = with_lora(model.double())
        assert uses_fused_head(model)
        if change == "trained":
            model.get_output_embeddings().requires_grad_(True)
        else:
            config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
            base = model.unload()
            model = randomize(get_peft_model(base, config, autocast_adapter_dtype=False)).eval()
        assert_trees_equal_padded(model, make_trees(290), 1e-10, 1e-9)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("family", ["Qwen2Moe", "Llama4Text"])
    def test_a_window_that_a_model_keeps_from_its_attention_function_is_not_overlooked(self, family):
        """These apply it in the mask alone, which tree attention does without."""
        windows = {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 0, "attention_chunk_size": 13}
        experts = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "intermediate_size_mlp": 16}
        model = make_family(family, SMALL | windows | experts | {"shared_expert_intermediate_size": 16})
        sequences = make_trees(97)
        batch, rows = pack(sequences)
        with torch.no_grad():
            found = response_log_probs(model, batch)[rows]
            torch.testing.assert_close(found, padded_log_probs(model, collate(sequences, PAD)), atol=1e-3, rtol=1e-4)

    def test_logits_that_a_model_changes_in_a_way_of_its_own_are_not_overlooked(self):
        class Capped(transformers.LlamaForCausalLM):
            def forward(self, **inputs: Any) -> Any:
                output = super().forward(**inputs)
                return replace(output, logits=20 * torch.tanh(output.logits / 20))

        torch.manual_seed(0)
        model = Capped(transformers.LlamaConfig(**SMALL)).requires_grad_(False).eval()
        model.lm_head.weight.data *= 60  # logits of some 12
        assert not uses_fused_head(model)


class TestScoreSequences:
    @pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
    def test_keep_the_order_of_the_sequences_whatever_the_batches(self, model, batch_tokens):
        model.double()
        sequences = make_trees(290) + make_sequences(8)
        with torch.no_grad():
            expected = [padded_log_probs(model, collate([each], PAD)).item() for each in sequences]
        order = random.Random(1).sample(range(len(sequences)), len(sequences))
        scored = score_sequences(model, [sequences[index] for index in order], batch_tokens=batch_tokens)[BASE]
        assert scored == pytest.approx([expected[index] for index in order], abs=1e-9)

    def test_score_each_adapter_and_the_model_without_any(self, model):
        sequences = make_sequences(6)
        base = score_sequences(model, sequences)[BASE]
        peft_model = two_adapters(model)
        seen: list[tuple[int, int]] = []
        scored = score_sequences(
            peft_model,
            sequences,
            adapters=("second", BASE, "first"),
            progress=lambda done, total, **_: seen.append((done, total)),
        )
        assert seen == [(6, 6)]
        assert list(scored) == ["second", BASE, "first"]
        assert scored[BASE] == pytest.approx(base, abs=1e-5)
        for name in ("first", "second"):
            peft_model.set_adapter(name)
            with torch.no_grad():
                expected = [padded_log_probs(peft_model, collate([s], PAD)).item() for s in sequences]
            assert scored[name] == pytest.approx(expected, abs=1e-4)
            assert abs(scored[name][0] - base[0]) > 0.1

    def test_go_on_from_a_file_that_a_death_cut_with_identical_numbers(self, model, tmp_path: Path, monkeypatch):
        batches: list[int] = []
        monkeypatch.setattr(
            log_probs,
            "response_log_probs",
            lambda model, batch: batches.append(batch.responses) or response_log_probs(model, batch),
        )
        sequences, file = make_sequences(15), tmp_path / "new" / "log_probs.jsonl"
        how = {"adapters": (BASE, "first"), "batch_tokens": 100}
        model = two_adapters(model)
        whole = score_sequences(model, sequences, **how)
        assert score_sequences(model, sequences, **how, checkpoint=file) == whole
        content = file.read_bytes()
        batches.clear()
        assert score_sequences(model, sequences, **how, checkpoint=file) == whole
        assert batches == []
        for size, computed in ((len(content) - 1, 2), (len(content) // 2, None), (1, None)):
            file.write_bytes(content[:size])
            batches.clear()
            assert score_sequences(model, sequences, **how, checkpoint=file) == whole
            assert computed in (None, len(batches)), "one batch, under two adapters"

    def test_of_a_broken_adapter_are_refused_and_not_kept(self, model, tmp_path: Path):
        sequences, file = make_sequences(6), tmp_path / "log_probs.jsonl"
        peft_model = two_adapters(model)
        weight = next(w for name, w in peft_model.named_parameters() if "lora_B.second" in name)
        with torch.no_grad():
            weight[0] = math.nan
        whole = score_sequences(peft_model, sequences, adapters=(BASE, "first"))
        # One reads no key but its own.
        message = r"5 of 6 responses .* nan under the adapter `second`: .*float32. Set model.precision: fp32, or lower"
        with pytest.raises(HelpsteerError, match=message):
            score_sequences(peft_model, sequences, adapters=(BASE, "first", "second"), checkpoint=file)
        assert not file.exists()
        assert score_sequences(peft_model, sequences, adapters=(BASE, "first"), checkpoint=file) == whole

    def test_of_tokens_that_the_model_does_not_embed_are_refused(self, model):
        embeddings = model.get_input_embeddings().num_embeddings
        score_sequences(model, [sequence([5], [embeddings - 1, EOS])])
        for beyond in (sequence([5], [embeddings, EOS]), sequence([embeddings], [5, EOS])):
            with pytest.raises(HelpsteerError, match=f"token id {embeddings}, and the model embeds ids 0 to"):
                score_sequences(model, [*make_sequences(3), beyond])

"""Reward models made here, one stock and one with code of its own as ArmoRM has."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.scoring.raters import RewardModelRater
from helpsteer_assets.modpo.settings import RewardModel

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
PROMPTS = ["What is a kettle?", "Name a colour.", "Why?", "Say something long, please.", "Hm?"]
RESPONSES = ["It boils water.", "Blue", "Because of the many reasons that there are.", "x" * 60, ""]
HEADS = {"helpfulness": 0, "verbosity": 4}

ARMO_CODE = '''
"""A tiny model of ArmoRM's kind: heads in `rewards`, a gate that looks for the assistant's turn, old names."""
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward


@dataclass
class TinyArmoOutput(ModelOutput):
    rewards: torch.FloatTensor = None
    logits: torch.FloatTensor = None


class TinyArmo(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.post_init()
        self.gating = nn.Linear(config.hidden_size, config.num_objectives)

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        hidden = self.model(input_ids, attention_mask=attention_mask, return_dict=return_dict)[0]
        length = input_ids.shape[-1]
        last = (torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1) % length
        rows = torch.arange(len(input_ids))
        rewards = self.regression_layer(hidden[rows, last])
        turn = self.config.assistant_turn
        starts = []
        for ids in input_ids.tolist():
            found = [i for i in range(length) if ids[i : i + len(turn)] == turn]
            if not found:
                raise ValueError("no assistant turn in the text")
            starts.append(found[-1])
        gate = torch.softmax(self.gating(hidden[rows, starts]), dim=-1)
        return TinyArmoOutput(rewards=rewards, logits=(gate * rewards).sum(-1))
'''


@pytest.fixture(scope="module", autouse=True)
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models' own code is copied into a cache, here a temporary one."""
    cache = str(tmp_path_factory.mktemp("modules"))
    loaded_before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in set(sys.modules) - loaded_before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "num_labels": 5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    return LlamaConfig(**settings | changes)


def save_classifier(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    torch.manual_seed(0)
    LlamaForSequenceClassification(config(**changes)).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def rater_of(folder: Path, **changes: Any) -> RewardModelRater:
    return RewardModelRater(folder, RewardModel(**{"heads": HEADS, "max_length": 200} | changes))


def rate(folder: Path, **changes: Any) -> dict[str, list[float | None]]:
    return rater_of(folder, **changes)(PROMPTS, RESPONSES)


@torch.inference_mode()
def last_token_states(folder: Path, texts: list[str], keep: int = 200) -> torch.Tensor:
    """The independent way: the bare decoder on one unpadded text after the other, its last hidden state."""
    weights = {
        name.removeprefix("model."): value
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith("model.")
    }
    decoder = LlamaModel(LlamaConfig.from_pretrained(folder))
    decoder.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    states = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][-keep:]
        states.append(decoder.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
    return torch.stack(states)


def chats() -> list[str]:
    return [f"<user>{p}</s><assistant>{r}</s>" for p, r in zip(PROMPTS, RESPONSES, strict=True)]


# A stock sequence-classification model


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_ratings_are_the_heads_at_the_last_token_scaled_and_shifted(tmp_path: Path, template: str | None) -> None:
    folder = save_classifier(tmp_path, template)
    heads = load_file(folder / "model.safetensors")["score.weight"]
    texts = chats() if template else [f"{p}\n\n{r}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = 2.0 * (last_token_states(folder, texts) @ heads.T) + 0.25
    rated = rate(folder, scale=2.0, shift=0.25)
    assert list(rated) == ["helpfulness", "verbosity"]
    assert rated["helpfulness"] == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    assert rated["verbosity"] == pytest.approx(expected[:, 4].tolist(), abs=1e-4)
    assert max(rated["helpfulness"]) - min(rated["helpfulness"]) > 0.1


@pytest.mark.parametrize("pad_token_id", [None, 256])
def test_the_batch_size_changes_no_rating(tmp_path: Path, pad_token_id: int | None) -> None:
    folder = save_classifier(tmp_path, pad_token_id=pad_token_id)
    one, three = rate(folder, batch_size=1), rate(folder, batch_size=3)
    for name in HEADS:
        assert three[name] == pytest.approx(one[name], abs=1e-4)


def test_long_texts_keep_their_last_tokens(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    heads = load_file(folder / "model.safetensors")["score.weight"]
    expected = (last_token_states(folder, chats(), keep=20) @ heads.T)[:, 0]
    assert rate(folder, max_length=20)["helpfulness"] == pytest.approx(expected.tolist(), abs=1e-4)


# What is refused


def test_a_language_model_is_refused_for_its_missing_heads(tmp_path: Path) -> None:
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(HelpsteerError, match=r"has no weights for score.weight: it is a language model, not a reward"):
        rate(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"helpfulness": 0, "coherence": 5}}, r"evaluation.rater.heads.coherence is 5.*has 5 heads, 0 to 4"),
        ({"output": "rewards"}, r"no `rewards`.*found: logits.*evaluation.rater.output"),
        ({"max_length": 4096}, r"max_length is 4096.*reads 256 tokens; set it to 256"),
    ],
)
def test_settings_that_the_model_does_not_fit_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(HelpsteerError, match=message):
        rate(save_classifier(tmp_path), **changes)


def test_a_rating_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HelpsteerError, match=r"rates helpfulness as nan"):
        rate(folder)


# A model with code of its own


@pytest.fixture(scope="module")
def armo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-armo")
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(1)
    base = config(pad_token_id=259, num_labels=1)
    weights = {f"model.{name}": value for name, value in LlamaModel(base).state_dict().items()}
    weights |= {
        "regression_layer.weight": torch.randn(19, 32) * 0.2,
        "gating.weight": torch.randn(19, 32),
        "gating.bias": torch.zeros(19),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = base.to_dict() | {
        "architectures": ["TinyArmo"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_tiny.TinyArmo"},
        "num_objectives": 19,
        "assistant_turn": tokenizer("<assistant>", add_special_tokens=False)["input_ids"],
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "modeling_tiny.py").write_text(ARMO_CODE)
    return folder


ARMO: dict[str, Any] = {
    "heads": {name: head for head, name in enumerate(ATTRIBUTES)},
    "output": "rewards",
    "scale": 5.0,
    "shift": -0.5,
    "trust_remote_code": True,
}


def test_a_model_of_armorms_kind_rates_all_attributes_on_helpsteers_scale(armo: Path) -> None:
    heads = load_file(armo / "model.safetensors")["regression_layer.weight"]
    expected = 5 * (last_token_states(armo, chats()) @ heads.T) - 0.5
    for batch_size in (1, 4):
        rated = rate(armo, batch_size=batch_size, **ARMO)
        assert list(rated) == list(ATTRIBUTES)
        for head, name in enumerate(ATTRIBUTES):
            assert rated[name] == pytest.approx(expected[:, head].tolist(), abs=2e-4)


def test_a_models_own_code_runs_only_where_it_is_trusted(armo: Path) -> None:
    with pytest.raises(HelpsteerError, match=r"code of its own \(modeling_tiny.TinyArmo\).*trust_remote_code: true"):
        rate(armo, **ARMO | {"trust_remote_code": False})


def test_the_single_score_of_such_a_model_is_not_taken_for_heads(armo: Path) -> None:
    with pytest.raises(HelpsteerError, match=r"no `logits` of shape \[responses, heads\].*logits of shape \[4\]"):
        rate(armo, **ARMO | {"output": "logits", "batch_size": 4})

"""What tests share: one torch thread, and a tiny random model on disk."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

torch.set_num_threads(1)

SENTENCES = (
    "How do I fold a shirt?",
    "Lay it flat, fold the sleeves to the back, then fold it in half.",
    "Ask somebody else, please.",
    "Human: Assistant: What is the best way to clean a kettle?",
    "Boil some water with vinegar in it, then rinse it twice.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE, eos: bool = True, pad: bool = True) -> FastTokenizer:
    """A byte-level BPE of some 290 tokens; without a pad token of its own where `pad` is false."""
    specials = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = FastTokenizer(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(vocabulary: int, *, tied: bool = False, **config: object) -> LlamaForCausalLM:
    """A random Llama of two layers; its initial weights are large, so that what it reads changes what it says."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **config,
        )
    ).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread gives the same bytes in every run, whatever a test changed before."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with its tokenizer (chat template, pad token of its own). Don't write into it."""
    path = tmp_path_factory.mktemp("tiny_model")
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer. Don't change it."""
    from helpsteer_assets.modpo.models import load_tokenizer

    return load_tokenizer(tiny_model_path)


@pytest.fixture
def model(tiny_model_path: Path) -> PreTrainedModel:
    """The tiny model, fp32, a copy for each test."""
    from helpsteer_assets.modpo.models import load_model

    return load_model(tiny_model_path, precision="fp32")

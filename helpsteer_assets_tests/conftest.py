"""What tests share: one torch thread, a tiny random model on disk, pairs to train it on, and sudden death."""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

if TYPE_CHECKING:
    from helpsteer_assets.modpo.models.tokenization import Sequence
    from helpsteer_assets.modpo.training.preference import PreferencePair
    from helpsteer_assets_tests.finished import Finished

torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork
# In the background of a script Ctrl-C is ignored; Dagster would make that of SIGTERM, and children inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """What a module's tests, or the programs they run in this process, set in the environment ends with the module."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
    from helpsteer_assets.modpo.models.loading import load_tokenizer

    return load_tokenizer(tiny_model_path)


@pytest.fixture
def model(tiny_model_path: Path) -> PreTrainedModel:
    """The tiny model, fp32, a copy for each test."""
    from helpsteer_assets.modpo.models.loading import load_model

    return load_model(tiny_model_path, precision="fp32")


def make_sequences(tokenizer: PreTrainedTokenizerBase, count: int) -> "list[Sequence]":
    """Short prompts and responses of differing lengths as token ids, always the same ones."""
    from helpsteer_assets.modpo.models.tokenization import Sequence, encode_prompt, encode_response

    words = [word for sentence in SENTENCES for word in sentence.split()]
    texts = [(" ".join(words[i : i + 3]), " ".join(words[2 * i : 2 * i + 1 + i % 5])) for i in range(count)]
    return [Sequence(encode_prompt(tokenizer, p, 40)[0], encode_response(tokenizer, r, 40)[0]) for p, r in texts]


@pytest.fixture(scope="session")
def pairs(tiny_model_path: Path, tokenizer: PreTrainedTokenizerBase) -> "list[PreferencePair]":
    """Twenty preference pairs with the tiny model's log-probabilities as reference and margins of some size."""
    from helpsteer_assets.modpo.models.loading import load_model
    from helpsteer_assets.modpo.models.tokenization import Sequence
    from helpsteer_assets.modpo.scoring.log_probs import BASE, score_sequences
    from helpsteer_assets.modpo.training.preference import PreferencePair

    chosen = make_sequences(tokenizer, 20)
    rejected = [
        Sequence(s.prompt_ids, other.response_ids) for s, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
    ]
    model = load_model(tiny_model_path, precision="fp32")
    reference = score_sequences(model, chosen + rejected)[BASE]
    return [
        PreferencePair(chosen[i], rejected[i], reference[i], reference[20 + i], 0.3 * (i % 3), -0.2 * (i % 4))
        for i in range(20)
    ]


@pytest.fixture(scope="session")
def finished_home(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A home in which the small experiment `quick` was run, once for all workers. Don't change it: see `copied`."""
    from helpsteer_assets_tests.finished import run_once

    folder = tmp_path_factory.getbasetemp()
    return run_once((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished")


@pytest.fixture
def copied(finished_home: "Finished", tmp_path: Path) -> "Callable[..., Finished]":
    """A copy of the finished home, with an experiment that differs as the arguments say."""
    from helpsteer_assets_tests.finished import Finished, write_experiment

    def copy(**changes: Any) -> Finished:
        if not (tmp_path / "home").exists():
            shutil.copytree(finished_home.home, tmp_path / "home")
        return Finished(write_experiment(tmp_path, **changes), tmp_path / "home")

    return copy


def run_to_its_death(work: Callable[[], object]) -> None:
    """Do the work in a process of its own, which must end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die() -> NoReturn:
    """End this process as a power cut or the out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


@pytest.fixture(autouse=True)
def _keep_denormals() -> Iterator[None]:
    """Training flushes denormal numbers to zero, for the whole process; what comes next wants ordinary arithmetic."""
    yield
    torch.set_flush_denormal(False)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


EXIT_STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once: DuckDB 2's bindings print pages about harmless leaks while an interpreter is torn down."""
    if EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])

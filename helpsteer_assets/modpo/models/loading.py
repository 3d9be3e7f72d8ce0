"""Loading models and tokenizers, and attaching LoRA adapters. Weights are read from safetensors, never from pickles."""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.fused_lora import fuse_lora
from helpsteer_assets.modpo.models.tokenization import end_of_text_id
from helpsteer_assets.modpo.settings import Compute, Lora

# A progress bar for each loaded checkpoint would hide the progress of the work.
transformers_logging.disable_progress_bar()
# peft still uses a name that transformers warns about; the user cannot change that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def choose_device(run: Compute, precision: str) -> torch.device:
    """The device to compute on, with the thread count set.

    Raises HelpsteerError where the device is missing or lacks the stated precision.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise HelpsteerError("run.device is cuda, and torch sees no CUDA device here; set run.device: auto or cpu")
    device = torch.device("cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise HelpsteerError(
            f"model.precision is bf16, which {torch.cuda.get_device_name()} does not have; set model.precision: fp32"
        )
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    # Saturated logits lead to denormal numbers, which slow a CPU down by an order of magnitude.
    torch.set_flush_denormal(True)
    return device


def batch_tokens(run: Compute, device: torch.device) -> int:
    """Tokens in one forward and backward pass.

    A CPU needs few tokens to be busy, and slows down where activations outgrow its caches.
    """
    return run.batch_tokens or (4096 if device.type == "cuda" else 1024)


def scoring_batch_tokens(run: Compute, device: torch.device) -> int:
    """Tokens in one forward pass without gradients: more than in training, for no activations are kept."""
    return 4 * batch_tokens(run, device)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token (the end-of-text token where it has none of its own).

    Raises HelpsteerError where there is none, or one that cannot be used.
    """
    with _errors_in_words(f"no tokenizer can be loaded from {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if "strftime_now" in str(tokenizer.chat_template or ""):
        raise HelpsteerError(
            f"the chat template of {path} writes today's date into every prompt, so that tomorrow's tokens would "
            "differ from today's; copy the model to a folder and put a fixed date into its chat template"
        )
    end_of_text_id(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise HelpsteerError where ordinary text or the special tokens have token ids that a model does not embed.

    Other added tokens may have larger ids: some models ship with tokens that occur in no text (Gemma 3's images).
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    added = set(tokenizer.added_tokens_decoder) - set(special)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    used = sorted((number, token) for token, number in beyond.items() if number not in added)
    if used:
        number, token = used[0]
        raise HelpsteerError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(used)} token(s) that the model does not embed (the "
            f"first: {token!r}, id {number}; the model embeds ids 0 to {embeddings - 1}): it is another model's, or "
            "was extended without the model; put the model's own tokenizer beside it, or save the model after "
            "resize_token_embeddings"
        )


def require_whole_model(folder: Path) -> None:
    """Raise HelpsteerError where a folder holds an adapter: transformers would load the base model that it names."""
    if (folder / ADAPTER_CONFIG).exists():
        raise HelpsteerError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), and a whole model is needed: merge the adapter into its "
            "base (PeftModel.merge_and_unload), save that to a folder of its own by save_pretrained, and give that "
            "folder; or, if the model beside the adapter is meant, move the adapter away"
        )


def require_safetensors(folder: Path) -> None:
    """Raise HelpsteerError unless a model folder's weights are complete safetensors files.

    Only their headers are read. Pickled weights are refused, because reading a pickle runs the code in it.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HelpsteerError(f"{index} is damaged ({in_words(error)}); get the model's files again") from error
    elif pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise HelpsteerError(
            f"{folder} holds its weights as pickles only ({pickles[0]}), which run code when they are read and are "
            "never loaded. Take a version of the model with safetensors, or, if you trust this one, convert it once: "
            "load it in transformers by from_pretrained, and save model and tokenizer to another folder by "
            "save_pretrained"
        )
    else:
        raise HelpsteerError(
            f"{folder} holds no weights in safetensors (model.safetensors): get the model's files again"
        )
    for file in files:
        _require_intact(file)


def _require_intact(file: Path) -> None:
    """Raise HelpsteerError where a safetensors file is missing, cut short, or has no readable header."""
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (OSError, SafetensorError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged or incomplete ({in_words(error)})"
        raise HelpsteerError(f"{file} is {reason}; get it again") from error


def load_model(
    path: Path, *, precision: str, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a folder, in the stated precision and in evaluation mode.

    Raises HelpsteerError where there is none, or weights are missing or not finite.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    require_whole_model(path)
    require_safetensors(path)
    with _errors_in_words(f"no causal language model can be loaded from {path}"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, there, expected = mismatched[0]
        raise HelpsteerError(
            f"config.json and weights in {path} are of different models: {name} has the shape {list(there)}, and by "
            f"the config {list(expected)} ({len(mismatched)} such weights); get the model's files again"
        )
    if loading["missing_keys"]:
        # transformers only warns, and fills them with random numbers.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise HelpsteerError(
            f"the model in {path} lacks weights of a causal language model ({missing}, ...: "
            f"{len(loading['missing_keys'])} in all); choose a checkpoint that has them"
        )
    model = model.to(device).eval()
    if broken := non_finite(model.named_parameters()):
        raise HelpsteerError(
            f"{len(broken)} weight(s) of the model in {path} hold numbers that are not finite in {precision} (the "
            f"first: {broken[0]}); get the model's files again, or choose another checkpoint"
        )
    return model


def non_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    return [name for name, parameter in parameters if not bool(torch.isfinite(parameter).all())]


def _read_config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    with _errors_in_words(f"no model config can be read from {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


@contextmanager
def _errors_in_words(what_failed: str) -> Iterator[None]:
    """Make a HelpsteerError of an error of any kind: libraries, files and a model's own code raise it."""
    try:
        yield
    except Exception as error:
        raise HelpsteerError(f"{what_failed}: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """A library's error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


@dataclass(frozen=True)
class ModelSize:
    """A model with a LoRA, in numbers of parameters."""

    parameters: int
    """Without the LoRA's."""
    adapter_parameters: int
    embeddings: int
    """Token ids that it embeds."""
    weights_per_token: int
    """Weights that each token is multiplied by: all but the input embeddings, which are only looked up. A mixture of
    experts counts with all of its weights, though a token passes through few."""


def model_size(path: Path, lora: Lora, *, trust_remote_code: bool = False) -> ModelSize:
    """The size of a model with a LoRA, from the model folder's config alone: no weights are read or allocated.

    Raises HelpsteerError where the folder describes no causal language model, or the LoRA does not fit the model.
    """
    require_whole_model(path)
    config = _read_config(path, trust_remote_code)
    with torch.device("meta"):  # shapes without memory
        with _errors_in_words(f"{path} describes no causal language model"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        policy = attach_lora(model, lora, 0)
    adapter_parameters = sum(weight.numel() for name, weight in policy.named_parameters() if ".lora_" in name)
    parameters = policy.num_parameters() - adapter_parameters
    embedded, output = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = 0 if output is None or output.weight is embedded.weight else embedded.weight.numel()
    return ModelSize(parameters, adapter_parameters, embedded.num_embeddings, parameters - looked_up)


def context_length(path: Path, *, trust_remote_code: bool = False) -> int | None:
    """The longest text of the model in tokens, None where its config does not say."""
    return getattr(_read_config(path, trust_remote_code).get_text_config(), "max_position_embeddings", None)


def check_lengths(path: Path, needed: int, key: str, *, base: str, trust_remote_code: bool = False) -> None:
    """Raise HelpsteerError where the setting `key` needs more tokens than the context of the model `base` has."""
    limit = context_length(path, trust_remote_code=trust_remote_code)
    if limit is not None and needed > limit:
        raise HelpsteerError(
            f"{key} ask(s) for {needed} tokens of context, and {base} has {limit}; lower {key} or choose a "
            "base model with a longer context"
        )


def attach_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """A new LoRA on every targeted linear layer; its initial weights depend on the seed alone."""
    set_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if isinstance(lora.target_modules, list):
        # peft ignores a name that fits no layer, as long as another name fits one.
        head = model.get_output_embeddings()
        layers = [
            n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
        ]
        unknown = [n for n in lora.target_modules if not any(f".{layer}".endswith(f".{n}") for layer in layers)]
        if unknown:
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise HelpsteerError(
                f"lora.target_modules: {', '.join(unknown)}: no linear layer below the output layer is called so "
                f"(there are {known})"
            )
    peft_model = get_peft_model(model, config)
    (attached,) = peft_model.peft_config.values()
    # It is a set, and each process would save it in another order.
    attached.target_modules = sorted(attached.target_modules)
    return fuse_lora(peft_model)


def load_adapters(model: PreTrainedModel, adapters: dict[str, Path]) -> PeftModel:
    """Load adapters, given by name, onto a model for scoring.

    Raises HelpsteerError where an adapter is damaged or was trained on a model of another shape.
    """
    peft_model: PeftModel | None = None
    for name, path in adapters.items():
        _require_intact(path / ADAPTER_WEIGHTS)
        try:
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                peft_model.load_adapter(path, adapter_name=name)
        except Exception as error:  # of any kind: peft and torch raise many
            raise HelpsteerError(
                f"the adapter {path} cannot be loaded onto the model: {in_words(error)}. It is damaged, or was "
                "trained on another base model"
            ) from error
        # peft does not complain: missing weights keep their initial values, and unknown ones are ignored.
        expected = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False).keys()
        with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        if wrong := sorted(stored ^ set(expected)):
            raise HelpsteerError(
                f"the adapter {path} does not fit the model: it was trained on another base model ({len(wrong)} "
                f"weights stand on one side only, the first: {wrong[0]})"
            )
    assert peft_model is not None  # callers name at least one adapter
    return fuse_lora(peft_model).eval()

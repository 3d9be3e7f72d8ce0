"""Loading models and tokenizers, and attaching LoRA adapters."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.fused_lora import fuse_lora

if TYPE_CHECKING:
    from helpsteer_assets.experiment import LoraSettings, ModelSettings, RunSettings

# A bar per loaded checkpoint drowns the progress that matters.
transformers_logging.disable_progress_bar()


def choose_device(run: "RunSettings", precision: str) -> torch.device:
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
    # Saturated logits make denormal numbers, on which CPU steps are an order of magnitude slower.
    torch.set_flush_denormal(True)
    return device


def batch_tokens(run: "RunSettings", device: torch.device) -> int:
    """Tokens in one forward and backward pass.

    A CPU is busy with few, and slows down where activations outgrow its caches.
    """
    return run.batch_tokens or (4096 if device.type == "cuda" else 1024)


def scoring_batch_tokens(run: "RunSettings", device: torch.device) -> int:
    """Tokens in one forward pass without gradients, which keeps no activations."""
    return 4 * batch_tokens(run, device)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token (the end-of-text token where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise HelpsteerError(f"no tokenizer can be loaded from {path}: {error}") from error
    if "strftime_now" in str(tokenizer.chat_template or ""):
        raise HelpsteerError(
            f"the chat template of {path} writes today's date into every prompt, so that tomorrow's tokens would "
            "differ from today's; copy the model to a folder and put a fixed date into its chat template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: Path, *, precision: str, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a folder, in the stated precision, in evaluation mode."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise HelpsteerError(f"no causal language model can be loaded from {path}: {error}") from error
    if loading["missing_keys"]:
        # transformers would make them up at random, with a warning.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise HelpsteerError(
            f"the model in {path} lacks weights of a causal language model ({missing}, ...: "
            f"{len(loading['missing_keys'])} in all); choose a checkpoint that has them"
        )
    return model.to(device).eval()


def context_length(path: Path, *, trust_remote_code: bool = False) -> int | None:
    """Tokens that the model can attend to, None where its config does not say."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise HelpsteerError(f"no model config can be read from {path}: {error}") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_lengths(settings: "ModelSettings", path: Path, needed: int, key: str) -> None:
    """Raise HelpsteerError where a stage asks for more tokens than the model's context holds."""
    limit = context_length(path, trust_remote_code=settings.trust_remote_code)
    if limit is not None and needed > limit:
        raise HelpsteerError(
            f"{key} ask(s) for {needed} tokens of context, and {settings.base} has {limit}; lower {key} or choose a "
            "base model with a longer context"
        )


def attach_lora(model: PreTrainedModel, lora: "LoraSettings", seed: int) -> PeftModel:
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
        # peft passes over a name that fits nothing as long as another does.
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
    with _peft_uses_an_old_name():
        return fuse_lora(get_peft_model(model, config))


def load_adapters(model: PreTrainedModel, adapters: dict[str, Path]) -> PeftModel:
    """Load adapters by name onto a model, for scoring."""
    names = iter(adapters.items())
    first, path = next(names)
    with _peft_uses_an_old_name():
        peft_model = PeftModel.from_pretrained(model, path, adapter_name=first)
        for name, path in names:
            peft_model.load_adapter(path, adapter_name=name)
    return fuse_lora(peft_model).eval()


@contextmanager
def _peft_uses_an_old_name() -> Iterator[None]:
    """transformers warns about a name that peft still uses: nothing that who runs this can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield

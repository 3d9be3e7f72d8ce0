"""The model in an exported folder: weights, tokenizer and generation settings, as other software reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.durable import size_in_words
from helpsteer_assets.store.artifacts import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_FOLDER = "base_model"
"""Folder of an adapter's SFT model, in an exported folder."""


def write_model(
    experiment: Experiment,
    artifacts: dict[str, Artifact],
    folder: Path,
    merged: bool,
    announce: Callable[[str], None],
) -> str | None:
    """Write weights, tokenizer and generation settings to an empty folder.

    `artifacts` has `sft_model` and, for a weight, `modpo_models`: its adapter is merged into the SFT model, or written
    beside it. Returns the template that prompts are put into; None: the written tokenizer's chat template.
    """
    from helpsteer_assets.modpo.models.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_model, load_tokenizer

    sft, policy = artifacts["sft_model"], artifacts.get("modpo_models")
    settings, trust = experiment.model, experiment.model.trust_remote_code
    whole_model = folder if policy is None or merged else folder / BASE_FOLDER
    size = size_in_words(sum(entry["bytes"] for entry in sft.manifest["files"].values()))
    if policy is not None and merged:
        announce(f"loading the SFT model ({size}) and merging the adapter into it")
        model = load_model(sft.path / "model", precision=settings.precision, trust_remote_code=trust)
        model = merge_exactly(model, policy.path / "adapter")
        announce("writing the merged model")
        model.save_pretrained(whole_model)
    else:
        announce(f"copying the SFT model ({size})")
        shutil.copytree(sft.path / "model", whole_model, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if policy is not None and not merged:
        shutil.copyfile(policy.path / "adapter" / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        shutil.copyfile(policy.path / "adapter" / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        # A path and no id: loaded from elsewhere it fails, where an id could be somebody's model.
        _change_json(folder / ADAPTER_CONFIG, base_model_name_or_path=f"./{BASE_FOLDER}")
    # Training had switched the cache of keys and values off.
    _change_json(whole_model / "config.json", use_cache=True)
    tokenizer = load_tokenizer(sft.path / "model", trust_remote_code=trust)
    prompt_template = give_chat_template(tokenizer)
    for place in {folder, whole_model}:
        tokenizer.save_pretrained(place)
        _generation_config(experiment, tokenizer).save_pretrained(place)
    return prompt_template


def _change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def merge_exactly(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """The model with an adapter merged into its weights: added in fp32, and rounded once to the model's precision."""
    import torch
    from peft.tuners.lora import LoraLayer

    from helpsteer_assets.modpo.models.loading import load_adapters

    peft_model = load_adapters(model, {"policy": adapter})
    with torch.no_grad():
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(weight.float() + module.get_delta_weight("policy").float())
    return peft_model.unload()


def _generation_config(experiment: Experiment, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The experiment's generation settings as transformers reads them."""
    from transformers import GenerationConfig

    settings = experiment.generation
    # Without top_k: 0, some versions sample from the fifty likeliest tokens.
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.do_sample else {}
    return GenerationConfig(
        do_sample=settings.do_sample,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def give_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Make the tokenizer's chat template render prompts as in training. Returns the plain template where it cannot.

    A tokenizer with a chat template is left as it is. One without gets the template of training, unless its tokens
    would differ: some tokenizers split a text in another way behind a begin-of-text token that is written out.
    """
    from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE, encode_prompt

    if tokenizer.chat_template:
        return None
    trial = "Why is the sky blue?"
    expected = encode_prompt(tokenizer, trial, 1000)[0].tolist()
    before, after = (json.dumps(part) for part in FALLBACK_TEMPLATE.split("{prompt}"))
    begin = "{{ bos_token }}" if expected[0] == tokenizer.bos_token_id else ""
    tokenizer.chat_template = (
        f"{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {after} + message['content'] + eos_token }}}}"
        f"{{% else %}}{{{{ {before} + message['content'] }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {after} }}}}{{% endif %}}"
    )
    messages = [{"role": "user", "content": trial}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if rendered == expected:
        return None
    tokenizer.chat_template = None
    return FALLBACK_TEMPLATE

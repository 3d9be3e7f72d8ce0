"""Raters give attribute ratings to generated responses.

A rater is a function of prompts and responses. The embedded one applies the demo generator's own rules. A reward model
is a sequence-classification checkpoint with outputs that are mapped to attributes; its weights are read from
safetensors, never from pickles.
"""

import json
import math
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama import modeling_llama

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import in_words, require_safetensors, require_whole_model
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import RewardModel


class Rater(Protocol):
    """Gives attribute ratings to responses."""

    def __call__(
        self, prompts: list[str], responses: list[str], progress: Progress = silent
    ) -> dict[str, list[float | None]]:
        """Rate `responses[i]` as an answer to `prompts[i]`: by attribute one rating (or None) per response."""
        ...


class RewardModelRater:
    """A sequence-classification reward model as a rater: rating = scale * output + shift.

    `path` is a local folder. On a CPU the model runs in fp32, and ratings do not depend on `batch_size`; on another
    device it runs in the precision that its checkpoint states. ArmoRM-Llama3-8B (Wang et al., "Interpretable
    Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts", 2024) has HelpSteer's attributes as heads
    0 to 4 of its `rewards`, and its model card gives their scale: 5 * reward - 0.5.

    Raises HelpsteerError where the folder holds no reward model that these settings can use.
    """

    def __init__(self, path: Path, settings: RewardModel, device: str = "cpu") -> None:
        """Load the model and its tokenizer; nothing is fetched."""
        self._path, self._settings, self._device = path, settings, torch.device(device)
        _require_trust(path, settings.trust_remote_code)
        self._tokenizer = _load_tokenizer(path, settings.trust_remote_code)
        self._model = _load_model(path, settings.trust_remote_code, self._device)
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and settings.max_length > positions:
            raise HelpsteerError(
                f"evaluation.rater.max_length is {settings.max_length}, and the reward model {path} reads {positions} "
                f"tokens; set it to {positions} or less"
            )

    @torch.inference_mode()
    def __call__(
        self, prompts: list[str], responses: list[str], progress: Progress = silent
    ) -> dict[str, list[float | None]]:
        """Rate each response on the attributes in `heads`. A text keeps its last `max_length` tokens."""
        rows = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        rated: dict[str, list[float | None]] = {name: [None] * len(rows) for name in self._settings.heads}
        # The longest come first: there is little padding, and too little memory shows at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self._settings.batch_size):
            batch = order[start : start + self._settings.batch_size]
            outputs = self._forward([rows[index] for index in batch])
            for name, head in self._settings.heads.items():
                for index, value in zip(batch, outputs[:, head].tolist(), strict=True):
                    rated[name][index] = self._rating(name, value, prompts[index])
            progress(min(start + len(batch), len(rows)), len(rows))
        return rated

    def _encode(self, prompt: str, response: str) -> list[int]:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # of any kind: the template is code
                raise HelpsteerError(
                    f"the chat template of the reward model {self._path} fails: {in_words(error)}; mend it "
                    "(chat_template.jinja, or chat_template in tokenizer_config.json)"
                ) from error
            # The template writes the special tokens; the tokenizer would add a second beginning-of-text token.
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(f"{prompt}\n\n{response}")["input_ids"]
        return ids[-self._settings.max_length :]

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        """Outputs [B, heads] in fp32 of token rows, padded on the right."""
        config = self._model.config.get_text_config()
        # A decoder's head reads the last token that is not padding, which it tells by the padding id. The checkpoint's
        # own padding id is used, as in its training. Where it states none, or one that cannot be embedded (-1 in the
        # first Llamas), padding gets an id that no row holds.
        stated = config.pad_token_id
        usable = stated is not None and 0 <= stated < config.vocab_size
        padding = stated if usable else min(set(range(config.vocab_size)).difference(*rows))
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        config.pad_token_id = padding
        try:
            output = self._model(input_ids=ids, attention_mask=mask)
        except ValueError as error:
            raise HelpsteerError(
                f"the reward model {self._path} refused a batch of {len(rows)} texts of up to {width} tokens: {error}. "
                f"Texts keep their last {self._settings.max_length} tokens (evaluation.rater.max_length); raise it if "
                "the model misses a text's beginning"
            ) from error
        finally:
            config.pad_token_id = stated
        outputs = getattr(output, self._settings.output, None)
        if outputs is None or outputs.ndim != 2:
            there = ", ".join(output) if outputs is None else f"{self._settings.output} of shape {list(outputs.shape)}"
            raise HelpsteerError(
                f"the reward model {self._path} has no `{self._settings.output}` of shape [responses, heads] in its "
                f"output (found: {there}); set evaluation.rater.output to `logits` or `rewards`"
            )
        for name, head in self._settings.heads.items():
            if not 0 <= head < outputs.shape[1]:
                raise HelpsteerError(
                    f"evaluation.rater.heads.{name} is {head}, and `{self._settings.output}` of the reward model "
                    f"{self._path} has {outputs.shape[1]} heads, 0 to {outputs.shape[1] - 1}; choose one of them"
                )
        return outputs.float().cpu()

    def _rating(self, attribute: str, value: float, prompt: str) -> float:
        if not math.isfinite(value):
            raise HelpsteerError(
                f"the reward model {self._path} rates {attribute} as {value} for a response to the prompt "
                f"{prompt[:80]!r}; its weights or its precision do not suit this device: try run.device: cpu"
            )
        return self._settings.scale * value + self._settings.shift


def _require_trust(path: Path, trusted: bool) -> None:
    try:
        named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
        code = named.get("AutoModelForSequenceClassification") or named.get("AutoConfig")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise HelpsteerError(
            f"evaluation.rater.model: {path} is not a folder with a model ({in_words(error)}); give the folder of a "
            "sequence-classification checkpoint, or its id on the hub"
        ) from None
    # Without it, transformers takes its own class of that model type, which has other outputs than the authors meant.
    if code and not trusted:
        raise HelpsteerError(
            f"the reward model {path} comes with modelling code of its own ({code}), which this machine would run; "
            "read it, then set evaluation.rater.trust_remote_code: true"
        )


def _load_tokenizer(path: Path, trusted: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # of any kind: files and the model's own code raise it
        raise HelpsteerError(
            f"the tokenizer of the reward model {path} cannot be loaded: {in_words(error)}; put the tokenizer's files "
            "into the folder"
        ) from error


def _load_model(path: Path, trusted: bool, device: torch.device) -> PreTrainedModel:
    require_whole_model(path)
    require_safetensors(path)
    # Modelling code written for transformers 4, such as ArmoRM's, imports a docstring that 5 no longer has.
    vars(modeling_llama).setdefault("LLAMA_INPUTS_DOCSTRING", "")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            trust_remote_code=trusted,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of any kind: files and the model's own code raise it
        raise HelpsteerError(
            f"the reward model {path} cannot be loaded as a sequence-classification model: {in_words(error)}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise HelpsteerError(
            f"the checkpoint {path} has no weights for {shown}: it is a language model, not a reward model (they "
            "would be random numbers); give a sequence-classification checkpoint in evaluation.rater.model"
        )
    return model.to(device).eval()

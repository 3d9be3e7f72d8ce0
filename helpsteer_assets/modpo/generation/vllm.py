"""Decoding by vLLM (the extra `vllm`): one engine for the SFT model, a LoRARequest per policy.

It gets prompts as our own token ids, and responses end by our own rules, so that its records have the form of the other
engine's. It was written from vLLM's documentation and has never run: there was no GPU.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpsteer_assets.errors import HelpsteerError

if TYPE_CHECKING:
    from helpsteer_assets.modpo.generation.decoding import Decoding
    from helpsteer_assets.modpo.generation.responses import Engine

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can reserve memory for."""


def require_vllm(precision: str, lora_rank: int) -> None:
    """Raise HelpsteerError where vLLM is not installed or cannot serve adapters of this precision and rank."""
    if find_spec("vllm") is None:
        raise HelpsteerError(
            "generation.engine is vllm, which is not installed; pip install 'helpsteer_assets[vllm]' on a machine with "
            "a GPU, or set generation.engine: transformers"
        )
    if precision != "bf16":
        raise HelpsteerError(
            f"generation.engine is vllm, whose LoRA kernels know no {precision}; set model.precision: bf16, or "
            "generation.engine: transformers"
        )
    if lora_rank > LORA_RANKS[-1]:
        raise HelpsteerError(
            f"generation.engine is vllm, which serves LoRA of rank {LORA_RANKS[-1]} at most, and lora.r is {lora_rank}"
        )


class VllmEngine:
    """vLLM on a base model with any number of its adapters. While it sleeps, the GPU's memory is free for others.

    Raises HelpsteerError where vLLM is missing or cannot serve such adapters.
    """

    def __init__(
        self, base: Path, *, precision: str, max_length: int, lora_rank: int, trust_remote_code: bool = False
    ) -> None:
        """
        Args:
            base: folder of the SFT model.
            precision: precision of its weights, `bf16`.
            max_length: most tokens of a prompt with its response.
            lora_rank: rank of the adapters.
            trust_remote_code: run the modelling code that comes with the model.
        """
        require_vllm(precision, lora_rank)
        from vllm import LLM

        self._llm = LLM(
            model=str(base),
            dtype="bfloat16",
            max_model_len=max_length,
            enable_lora=True,
            max_lora_rank=next(rank for rank in LORA_RANKS if rank >= lora_rank),
            trust_remote_code=trust_remote_code,
            generation_config="vllm",  # the model's own would change how policies decode
            enable_sleep_mode=True,
        )
        self._adapters: dict[Path, int] = {}

    def sleep(self) -> None:
        """Free the GPU's memory for others."""
        self._llm.sleep(level=1)

    def wake(self) -> None:
        """Take the GPU's memory back."""
        self._llm.wake_up()

    def policy(self, adapter: Path | None) -> "Engine":
        """The engine of one policy. `adapter` None: the base model itself."""

        def decode(prompts: dict[int, list[int]], how: "Decoding") -> Iterator[list[tuple[int, list[int]]]]:
            from vllm import SamplingParams
            from vllm.lora.request import LoRARequest

            request = None
            if adapter is not None:
                number = self._adapters.setdefault(adapter, len(self._adapters) + 1)
                request = LoRARequest(f"policy{number}", number, str(adapter))
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts.values()],
                [SamplingParams(**sampling_arguments(how, index)) for index in prompts],
                lora_request=request,
                use_tqdm=False,
            )
            completions = [output.outputs[0] for output in outputs]
            yield [
                (index, response_ids(completion.token_ids, completion.finish_reason, how.end_id))
                for index, completion in zip(prompts, completions, strict=True)
            ]

        return decode


def sampling_arguments(how: "Decoding", index: int) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for the prompt of this index."""
    choice: dict[str, Any] = {"temperature": 0.0}
    if how.do_sample:
        seed = int(np.random.SeedSequence([how.seed, index]).generate_state(1)[0])
        choice = {"temperature": how.temperature, "top_p": how.top_p, "seed": seed}
    return choice | {
        "max_tokens": how.max_new_tokens,
        # Only `end_id` ends a response, whatever other tokens the model's files name.
        "ignore_eos": True,
        "stop_token_ids": [how.end_id],
        "repetition_penalty": how.repetition_penalty,
        "detokenize": False,
    }


def response_ids(token_ids: "list[int] | tuple[int, ...]", finish_reason: str | None, end_id: int) -> list[int]:
    """The response's tokens with the one that ended it, which vLLM may leave out."""
    ids = list(token_ids)
    return [*ids, end_id] if finish_reason == "stop" and ids[-1:] != [end_id] else ids

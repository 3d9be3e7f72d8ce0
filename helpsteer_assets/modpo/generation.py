"""Responses of a policy to the evaluation prompts."""

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from helpsteer_assets.modpo.batching import plan_batches
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.resumable import ResumableRows
from helpsteer_assets.modpo.tokenization import encode_prompt, end_of_text_id

if TYPE_CHECKING:
    from helpsteer_assets.experiment import GenerationSettings


@dataclass(frozen=True)
class Generation:
    """One response."""

    response: str
    token_ids: list[int]
    """Generated tokens, the end-of-text token included where the response ended."""
    finish_reason: str
    """`eos`: the policy ended it; `length`: cut at max_new_tokens."""
    prompt_truncated: bool


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Items[str],
    settings: "GenerationSettings",
    *,
    seed: int,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[Generation]:
    """One response per prompt, in the order of the prompts.

    Batches hold prompts of similar length within a cap of padded tokens; in fp32 a greedy response does not depend on
    the batch it was made in.

    Args:
        model: the policy, its adapter merged.
        tokenizer: its tokenizer.
        prompts: the prompts as text.
        settings: how to decode.
        seed: seed of sampling, per batch.
        progress: called after each batch with the prompts done.
        checkpoint: a file that keeps finished batches, from which a killed generation goes on.
    """
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt, settings.max_prompt_length) for prompt in prompts]
    rows = ResumableRows(checkpoint)
    found = {row.pop("index"): Generation(**row) for row in rows.read()}
    for number, indices in enumerate(_plan([len(ids) for ids, _ in encoded], settings)):
        if all(index in found for index in indices):
            continue
        set_seed((seed + number) % 2**32)
        batch = _generate_batch(model, tokenizer, [encoded[index][0] for index in indices], settings)
        finished = {
            index: Generation(
                response=tokenizer.decode(token_ids, skip_special_tokens=True),
                token_ids=token_ids,
                finish_reason="eos" if token_ids[-1] == end_of_text_id(tokenizer) else "length",
                prompt_truncated=encoded[index][1],
            )
            for index, token_ids in zip(indices, batch, strict=True)
        }
        rows.append([{"index": index, **asdict(generation)} for index, generation in finished.items()])
        found |= finished
        progress(len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


def _plan(prompt_lengths: list[int], settings: "GenerationSettings") -> list[list[int]]:
    """Indices of the prompts of each batch."""
    if settings.no_repeat_ngram_size == 0:
        groups = [list(range(len(prompt_lengths)))]
    else:
        # It counts the padding as text (a pad token that is the end-of-text token would keep responses from ending),
        # so that a batch must need none.
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, length in enumerate(prompt_lengths):
            by_length[length].append(index)
        groups = list(by_length.values())
    return [
        [group[place] for place in places]
        for group in groups
        for places in plan_batches(
            [prompt_lengths[index] + settings.max_new_tokens for index in group], settings.max_batch_tokens
        )
    ]


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """generate() fills what a given config leaves open from the model's generation_config.json: here it holds nothing.

    Else what comes with a base model (suppressed tokens, a shortest length, ...) would change how policies decode.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: "GenerationSettings"
) -> list[list[int]]:
    width = max(len(ids) for ids in prompts)
    pad_id, end_id = tokenizer.pad_token_id, end_of_text_id(tokenizer)
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.do_sample else {}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        pad_token_id=pad_id,
        eos_token_id=end_id,
        **sampling,
    )
    with _without_own_defaults(model):
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return [_until_end(ids, end_id) for ids in output[:, width:].tolist()]


def _until_end(token_ids: list[int], end_id: int) -> list[int]:
    return token_ids[: token_ids.index(end_id) + 1] if end_id in token_ids else token_ids

"""Responses of a policy to the evaluation prompts."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpsteer_assets.files.rows import ResumableRows
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.models.tokenization import encode_prompts, end_of_text_id
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import Sampling

SHARE_OF_PROMPTS = 256
"""Prompts that are decoded together. Where rounding depends on the batch, a killed generation begins a share anew."""

Engine = Callable[[dict[int, list[int]], Decoding], Iterator[list[tuple[int, list[int]]]]]
"""Decodes prompts (token ids by index); yields lists of (index, token ids of the response), in any order."""


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
    settings: Sampling,
    *,
    seed: int,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[Generation]:
    """One response per prompt, in the order of the prompts.

    In fp32 a response depends neither on the prompts beside it nor on `max_batch_tokens`.

    Args:
        model: the policy, its adapter merged.
        tokenizer: its tokenizer.
        prompts: the prompts as text.
        settings: how to decode.
        seed: seed of sampling; it and the place of its prompt decide a response.
        progress: called with the number of finished responses.
        checkpoint: a file for finished responses, from which a killed generation resumes.
    """
    model.eval()

    return generate_by(
        lambda encoded, how: decode(model, encoded, how),
        tokenizer,
        prompts,
        settings,
        seed=seed,
        exact=model.dtype == torch.float32,
        progress=progress,
        checkpoint=checkpoint,
    )


def generate_by(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Items[str],
    settings: Sampling,
    *,
    seed: int,
    exact: bool,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[Generation]:
    """`generate` with any engine: prompts have the same tokens, responses end by the same rules.

    `exact` says whether a response does not depend on the prompts that are decoded beside it.
    """
    end_id = end_of_text_id(tokenizer)
    how = Decoding(**asdict(settings), end_id=end_id, seed=seed)
    encoded = encode_prompts(tokenizer, list(prompts), settings.max_prompt_length)
    longest_first = sorted(range(len(prompts)), key=lambda index: (-len(encoded[index][0]), index))
    kept = ResumableRows(checkpoint)
    finished = {row.pop("index"): Generation(**row) for row in kept.read()}
    for start in range(0, len(longest_first), SHARE_OF_PROMPTS):
        share = longest_first[start : start + SHARE_OF_PROMPTS]
        missing = [index for index in share if index not in finished]
        if not missing:
            continue
        if not exact:
            # Beside fewer prompts a response could be another one, so the whole share begins anew.
            missing = share
        for decoded in engine({index: encoded[index][0].tolist() for index in missing}, how):
            made = {
                index: Generation(
                    response=tokenizer.decode(token_ids, skip_special_tokens=True),
                    token_ids=token_ids,
                    finish_reason="eos" if token_ids[-1] == end_id else "length",
                    prompt_truncated=encoded[index][1],
                )
                for index, token_ids in decoded
            }
            kept.append([{"index": index, **asdict(generation)} for index, generation in made.items()])
            finished |= made
            progress(len(finished), len(prompts))
    return [finished[index] for index in range(len(prompts))]

"""The one tokenization, used alike in training, scoring and generation.

Prompt and response are tokenized separately, so that a prompt has the same tokens whatever response follows it: no
token can merge across the boundary. Text beyond the limits is cut by one rule, the same for every response of a
prompt: the prompt keeps its last `max_prompt_length` tokens; a response is cut at its end, and a cut response gets no
end-of-text token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError

FALLBACK_TEMPLATE = "\n\nHuman:\n{prompt}\n\nAssistant:\n"
"""The described pipeline's template, for a tokenizer that has no chat template."""


@dataclass(frozen=True)
class Sequence:
    """A prompt and a response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool = False
    """Whether prompt or response was cut."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the model reads it, up to where the response begins."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return FALLBACK_TEMPLATE.format(prompt=prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of the rendered prompt, its last `max_length` ones, and whether it was cut."""
    # A chat template writes its own begin-of-text token; the fallback template leaves that to the tokenizer.
    ids = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return ids[-max_length:], len(ids) > max_length


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of the response with its end-of-text token, cut to `max_length` (then without it), and whether cut."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [end_of_text_id(tokenizer)]
    return (ids, False) if len(ids) <= max_length else (ids[:-1][:max_length], True)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a response. Raises HelpsteerError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise HelpsteerError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token), so that no response "
            "could ever end; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: pa.Table, max_length: int, max_prompt_length: int
) -> dict[str, Sequence]:
    """Token ids by response_id of a table with columns prompt_id, response_id, prompt, response.

    A response gets what its prompt leaves of `max_length`: the same room for every response of a prompt.
    """
    prompts: dict[str, tuple[list[int], bool]] = {}
    encoded: dict[str, Sequence] = {}
    for row in _rows(responses, ("prompt_id", "response_id", "prompt", "response")):
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = encode_prompt(tokenizer, row["prompt"], max_prompt_length)
        prompt_ids, prompt_cut = prompts[row["prompt_id"]]
        response_ids, response_cut = encode_response(tokenizer, row["response"], max_length - len(prompt_ids))
        encoded[row["response_id"]] = Sequence(prompt_ids, response_ids, prompt_cut or response_cut)
    return encoded


def count_response_tokens(tokenizer: PreTrainedTokenizerBase, responses: pa.Table) -> dict[str, int]:
    """Tokens of every uncut response, its end-of-text token included, by response_id."""
    return {
        row["response_id"]: len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) + 1
        for row in _rows(responses, ("response_id", "response"))
    }


def _rows(table: pa.Table, columns: tuple[str, ...]) -> Iterable[Mapping[str, str]]:
    for batch in table.select(list(columns)).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()

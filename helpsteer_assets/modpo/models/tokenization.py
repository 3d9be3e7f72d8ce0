"""The tokenization, which is the same in training, scoring and generation.

Prompt and response are tokenized separately: no token can merge across the boundary, so a prompt has the same tokens
before any response. Long texts are cut by one rule for every response of a prompt: the prompt keeps its last
`max_prompt_length` tokens; a response is cut at its end, and a cut response gets no end-of-text token.

Many texts at a time go to the tokenizer, and one with a Rust backend spreads them over threads. The token ids of a data
set are kept in flat arrays of 4 bytes a token.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError

if TYPE_CHECKING:
    import pyarrow as pa

FALLBACK_TEMPLATE = "\n\nHuman:\n{prompt}\n\nAssistant:\n"
"""The prompt's template for a tokenizer that has no chat template."""

_BATCH_TEXTS = 2048

TokenIds = np.ndarray[tuple[int], np.dtype[np.int32]]
"""One-dimensional."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """A prompt and a response as token ids."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    truncated: bool = False
    """Whether prompt or response was cut."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return (
            np.array_equal(self.prompt_ids, other.prompt_ids)
            and np.array_equal(self.response_ids, other.response_ids)
            and self.truncated == other.truncated
        )


class EncodedResponses(Mapping[str, Sequence]):
    """Sequences by response_id, in the order of their table. The sequences of one prompt share its token ids.

    The arrays are views of one that holds all token ids, and must not be written to.
    """

    def __init__(self) -> None:
        self._prompts = _TokenLists()
        self._responses = _TokenLists()
        self._prompt_numbers: dict[str, int] = {}
        self._response_numbers: dict[str, int] = {}
        self._prompt_of = array("q")
        self._prompt_cut = bytearray()
        self._truncated = bytearray()

    def __getitem__(self, response_id: str) -> Sequence:
        number = self._response_numbers[response_id]
        return Sequence(self._prompts[self._prompt_of[number]], self._responses[number], bool(self._truncated[number]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._response_numbers)

    def __len__(self) -> int:
        return len(self._response_numbers)

    def _extend(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, list[str]],
        max_length: int,
        max_prompt_length: int,
    ) -> None:
        """Encode rows, which are given as columns."""
        new: dict[str, str] = {}
        for prompt_id, prompt in zip(rows["prompt_id"], rows["prompt"], strict=True):
            if prompt_id not in self._prompt_numbers:
                new.setdefault(prompt_id, prompt)
        for prompt_id, whole in zip(new, _prompt_tokens(tokenizer, list(new.values())), strict=True):
            self._prompt_numbers[prompt_id] = len(self._prompt_cut)
            self._prompts.append(whole[-max_prompt_length:])
            self._prompt_cut.append(len(whole) > max_prompt_length)
        end = end_of_text_id(tokenizer)
        encoded = _tokens(tokenizer, rows["response"])
        for response_id, prompt_id, whole in zip(rows["response_id"], rows["prompt_id"], encoded, strict=True):
            number = self._prompt_numbers[prompt_id]
            ids, cut = _cut_response(whole, end, max_length - self._prompts.length(number))
            self._response_numbers[response_id] = len(self._truncated)
            self._responses.append(ids)
            self._prompt_of.append(number)
            self._truncated.append(cut or self._prompt_cut[number])


class _TokenLists:
    """Lists of token ids, stored one after another in one array."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._bounds = array("q", [0])

    def append(self, ids: list[int]) -> None:
        self._ids.fromlist(ids)
        self._bounds.append(len(self._ids))

    def length(self, number: int) -> int:
        return self._bounds[number + 1] - self._bounds[number]

    def __getitem__(self, number: int) -> TokenIds:
        return np.frombuffer(self._ids, np.int32)[self._bounds[number] : self._bounds[number + 1]]


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that the model reads before the response: the prompt in its template."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of any kind: the template is code
            raise HelpsteerError(
                f"the chat template of {tokenizer.name_or_path} fails: {type(error).__name__}: {error}; mend it "
                "(chat_template.jinja, or chat_template in tokenizer_config.json)"
            ) from error
    return FALLBACK_TEMPLATE.format(prompt=prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> tuple[TokenIds, bool]:
    """`encode_prompts` for one prompt."""
    return encode_prompts(tokenizer, [prompt], max_length)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int
) -> list[tuple[TokenIds, bool]]:
    """For each prompt the last `max_length` token ids of the rendered prompt, and whether it was cut."""
    return [
        (np.array(ids[-max_length:], np.int32), len(ids) > max_length) for ids in _prompt_tokens(tokenizer, prompts)
    ]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, max_length: int) -> tuple[TokenIds, bool]:
    """Token ids of the response and its end-of-text token, and whether they were cut to `max_length` (without it)."""
    (whole,) = _tokens(tokenizer, [response])
    ids, cut = _cut_response(whole, end_of_text_id(tokenizer), max_length)
    return np.array(ids, np.int32), cut


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a response. Raises HelpsteerError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise HelpsteerError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token), so that no response "
            "could ever end; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: "pa.Table", max_length: int, max_prompt_length: int
) -> EncodedResponses:
    """Token ids by response_id, of a table with columns prompt_id, response_id, prompt, response.

    A response gets the tokens of `max_length` that its prompt leaves: every response of a prompt has the same room.
    """
    encoded = EncodedResponses()
    for rows in _batches(responses, ("prompt_id", "response_id", "prompt", "response")):
        encoded._extend(tokenizer, rows, max_length, max_prompt_length)
    return encoded


def count_response_tokens(tokenizer: PreTrainedTokenizerBase, responses: "pa.Table") -> dict[str, int]:
    """Number of tokens of every uncut response, its end-of-text token included, by response_id."""
    counts: dict[str, int] = {}
    for rows in _batches(responses, ("response_id", "response")):
        encoded = _tokens(tokenizer, rows["response"])
        counts |= zip(rows["response_id"], (len(ids) + 1 for ids in encoded), strict=True)
    return counts


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    # A chat template writes its own begin-of-text token; the fallback template leaves that to the tokenizer.
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    return _tokens(tokenizer, rendered, add_special_tokens=not tokenizer.chat_template)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each whole text."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _BATCH_TEXTS):
        # A verbose tokenizer warns about texts longer than the model's context; they are cut afterwards.
        ids += tokenizer(
            texts[start : start + _BATCH_TEXTS],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    return ids


def _cut_response(ids: list[int], end: int, max_length: int) -> tuple[list[int], bool]:
    return ([*ids, end], False) if len(ids) < max_length else (ids[:max_length], True)


def _batches(table: "pa.Table", columns: tuple[str, ...]) -> Iterator[dict[str, list[str]]]:
    for batch in table.select(list(columns)).to_batches(max_chunksize=_BATCH_TEXTS):
        yield batch.to_pydict()

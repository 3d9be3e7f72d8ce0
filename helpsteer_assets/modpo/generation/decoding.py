"""Decoding many prompts at once, each at the cost of its own tokens.

Rows of a batch share the columns of one key-value cache and end at the same column: a row that joins is written so
that its last token lies where the others have theirs, and one that is finished gives its place to the last row. So a
finished response costs nothing more, a waiting prompt takes the room it leaves, and a step writes its own keys and
values only, where a cache that grows by concatenation copies all of them.
"""

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, islice

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from helpsteer_assets.modpo.scoring.batching import plan_batches

_log = logging.getLogger(__name__)

PREFILL_TOKENS = 1024
"""Padded prompt tokens of one prefill forward: enough to fill a matrix product, and little padding."""

SPARE_COLUMNS = 64
"""Columns by which a full cache grows: it is copied once in so many steps."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when a response ends."""

    max_new_tokens: int
    """Longest response, its end-of-text token included."""
    end_id: int
    """The token that ends a response."""
    max_batch_tokens: int
    """Tokens for which the key-value cache has room: rows times the longest that one of them may become."""
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0
    """Of sampling."""


@dataclass
class _Row:
    """A prompt under way."""

    index: int
    """Its place among the prompts: with the seed it decides what is sampled."""
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """The response so far."""

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


def decode(
    model: PreTrainedModel, prompts: dict[int, list[int]], how: Decoding
) -> Iterator[list[tuple[int, list[int]]]]:
    """Responses as they are finished: lists of (index, token ids), the end-of-text token included where one ended.

    In fp32 a response depends on its prompt, and where it is sampled on its index and the seed, but not on the prompts
    that are decoded beside it. In bf16 it may, through rounding; the same prompts then give the same responses.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids by index.
        how: how to decode.
    """
    choose = _Choice(how)
    rows = sorted(
        (_Row(index, ids) for index, ids in prompts.items()), key=lambda row: (-len(row.prompt_ids), row.index)
    )
    if not keeps_all_keys(model):
        _log.info("%s keeps more than keys and values: transformers' generate() decodes it", type(model).__name__)
        yield from _decode_by_generate(model, rows, how, choose)
        return
    waiting, live = deque(rows), list[_Row]()
    cache = RowCache()
    while waiting or live:
        joining = _admit(waiting, live, how)
        if joining:
            live += joining
            logits = _prefill(model, joining, cache, room=len(live))
        else:
            logits = _step(model, live, cache)
        advanced = joining or live
        for row, token in zip(advanced, choose(advanced, logits), strict=True):
            row.token_ids.append(token)
        finished = [row.token_ids[-1] == how.end_id or len(row.token_ids) == how.max_new_tokens for row in live]
        if any(finished):
            yield [(row.index, row.token_ids) for row, done in zip(live, finished, strict=True) if done]
            live = [live[place] for place in cache.drop(finished)]
        cache.trim(max((row.cached for row in live), default=0))


def _admit(waiting: deque[_Row], live: list[_Row], how: Decoding) -> list[_Row]:
    """Prompts for which there is room, taken from those that wait; none while too few fit to be worth a forward."""
    if not waiting:
        return []
    # The longest prompts go first, so that memory that does not suffice fails at once, and none that joins is wider.
    widest = max(len(row.prompt_ids) for row in (*live, waiting[0])) + how.max_new_tokens
    places = max(1, how.max_batch_tokens // widest)
    fitting = min(places - len(live), len(waiting))
    if live and fitting < min(len(waiting), places / 4):
        return []
    return [waiting.popleft() for _ in range(fitting)]


class RowCache(Cache):
    """Keys and values of rows that come and go."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_RowLayer)

    def join(self, prefilled: Cache, room: int) -> None:
        """Add the rows of another cache, none longer than the longest here; make room for `room` rows in all."""
        for number, layer in enumerate(prefilled.layers):
            if len(self.layers) <= number:
                self.layers.append(_RowLayer())
            self.layers[number].join(layer.keys, layer.values, room)

    def drop(self, finished: list[bool]) -> list[int]:
        """Let rows go; the former places of those that stay, in their new order."""
        staying = [place for place, done in enumerate(finished) if not done]
        places = list(range(len(staying)))
        holes = [place for place in places if finished[place]]
        movers = staying[len(staying) - len(holes) :]
        for layer in self.layers:
            layer.keep(len(staying), movers, holes)
        for hole, mover in zip(holes, movers, strict=True):
            places[hole] = mover
        return places

    def trim(self, columns: int) -> None:
        """Let go of all but the last columns."""
        for layer in self.layers:
            layer.begin = layer.end - columns


class _RowLayer(DynamicLayer):
    """Of one layer: the first `rows` rows and the columns from `begin` to `end` of buffers with room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.begin = self.end = 0

    def get_seq_length(self) -> int:
        """Columns that are kept."""
        return self.end - self.begin

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns [rows, heads, new columns, head size] to all rows; all keys and values."""
        self._reserve(self.rows, key_states, value_states)
        new = slice(self.end, self.end + key_states.shape[2])
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        self.end = new.stop
        return self._live(self.keys), self._live(self.values)

    def join(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Add rows [new rows, heads, columns, head size] that end where the others end."""
        self._reserve(room, keys, values)
        if self.rows == 0:
            self.begin, self.end = 0, keys.shape[2]
        rows, columns = slice(self.rows, self.rows + len(keys)), slice(self.end - keys.shape[2], self.end)
        self.keys[rows, :, columns] = keys
        self.values[rows, :, columns] = values
        self.rows = rows.stop

    def keep(self, rows: int, movers: list[int], holes: list[int]) -> None:
        """Copy the rows `movers` to the places `holes`, and keep the first `rows`."""
        if holes:
            for states in (self._live(self.keys), self._live(self.values)):
                states[holes] = states[movers]
        self.rows = rows

    def _live(self, states: torch.Tensor) -> torch.Tensor:
        return states[: self.rows, :, self.begin : self.end]

    def _reserve(self, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for so many rows, and for the columns of `keys` after those that are there."""
        needed = keys.shape[2]
        if self.keys is None:
            self.keys, self.values = (
                states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in (keys, values)
            )
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        if rows <= self.keys.shape[0] and self.end + needed <= self.keys.shape[2]:
            return
        columns = self.end - self.begin

        def grown(states: torch.Tensor) -> torch.Tensor:
            # Zeros: what lies before a short row's first column is masked, and must be finite.
            shape = (max(rows, len(states)), states.shape[1], columns + needed + SPARE_COLUMNS, states.shape[3])
            buffer = states.new_zeros(shape)
            buffer[: self.rows, :, :columns] = self._live(states)
            return buffer

        self.keys, self.values = grown(self.keys), grown(self.values)
        self.begin, self.end = 0, columns


def keeps_all_keys(model: PreTrainedModel) -> bool:
    """Whether the model's memory of a text is keys and values alone, one per token: no recurrent state."""
    return "past_key_values" in _arguments(type(model)) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers
    )


@cache
def _arguments(kind: type[PreTrainedModel]) -> frozenset[str]:
    """What a forward pass of such models takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _prefill(model: PreTrainedModel, joining: list[_Row], cache: RowCache, room: int) -> torch.Tensor:
    """Read prompts, sorted longest first, into the cache; logits [rows, vocabulary] of the responses' first tokens."""
    found = []
    for places in plan_batches([len(row.prompt_ids) for row in joining], PREFILL_TOKENS):
        prompts = [joining[place].prompt_ids for place in places]
        width = len(prompts[0])
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        # Sliding windows are masks here: each layer keeps all keys, so that rows of any length can stand side by side.
        prefilled = DynamicCache()
        found.append(_forward(model, input_ids, lengths, prefilled))
        cache.join(prefilled, room)
    return torch.cat(found)


def _step(model: PreTrainedModel, live: list[_Row], cache: RowCache) -> torch.Tensor:
    """Read the last token of every row; logits [rows, vocabulary] of the next."""
    input_ids = torch.tensor([row.token_ids[-1:] for row in live], device=model.device)
    lengths = torch.tensor([row.cached + 1 for row in live], device=model.device)
    return _forward(model, input_ids, lengths, cache)


def _forward(model: PreTrainedModel, input_ids: torch.Tensor, lengths: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits [rows, vocabulary] after the last of `input_ids` [rows, new].

    Args:
        model: the model.
        input_ids: tokens to read, padded on the left.
        lengths: [rows], tokens of each row, cached and new, without padding.
        cache: what was read before; gets the new keys and values.
    """
    new = input_ids.shape[1]
    width = cache.get_seq_length() + new
    position_ids = torch.arange(width, device=model.device) - (width - lengths)[:, None]
    optional = {"position_ids": position_ids[:, -new:].clamp(min=0), "logits_to_keep": 1}
    output = model(
        input_ids=input_ids,
        attention_mask=(position_ids >= 0).long(),
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in optional.items() if name in _arguments(type(model))},
    )
    return output.logits[:, -1].float()


class _Choice:
    """Chooses next tokens."""

    def __init__(self, how: Decoding) -> None:
        self._how = how
        # Processors of transformers: the first kind look at the text, one row at a time, for they would take padding
        # for text; the second kind at the scores alone.
        self._of_text, self._of_scores = LogitsProcessorList(), LogitsProcessorList()
        if how.repetition_penalty != 1:
            self._of_text.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
        if how.no_repeat_ngram_size > 0:
            self._of_text.append(NoRepeatNGramLogitsProcessor(how.no_repeat_ngram_size))
        if how.do_sample:
            self._of_scores += [TemperatureLogitsWarper(how.temperature), TopPLogitsWarper(how.top_p)]

    def __call__(self, rows: list[_Row], logits: torch.Tensor) -> list[int]:
        """The next token of each row, from logits [rows, vocabulary]."""
        indices, steps = [row.index for row in rows], [len(row.token_ids) for row in rows]
        texts = (torch.tensor(row.prompt_ids + row.token_ids, device=logits.device) for row in rows)
        return self.scores(indices, steps, texts, logits).argmax(-1).tolist()

    def scores(
        self, indices: list[int], steps: list[int], texts: Iterable[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """Scores [rows, vocabulary] whose largest is the next token.

        The largest of log-probabilities with Gumbel noise is a sample of the distribution (Gumbel, 1954).

        Args:
            indices: of the prompts.
            steps: tokens that each response has so far.
            texts: token ids of prompt and response so far, by row.
            logits: [rows, vocabulary], fp32.
        """
        if self._of_text:
            logits = torch.cat([self._of_text(ids[None], row[None]) for ids, row in zip(texts, logits, strict=True)])
        scores = self._of_scores(None, logits)
        return scores + gumbel_noise(self._how.seed, indices, steps, logits) if self._how.do_sample else scores


def gumbel_noise(seed: int, indices: list[int], steps: list[int], like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [rows, vocabulary], float64, of the shape and on the device of `like`.

    A function of seed, prompt, step and token, computed by hashing them: no generator has a state that other rows
    could advance, and every device gives the same numbers.
    """
    prompts, steps_ = (torch.tensor(numbers, device=like.device) for numbers in (indices, steps))
    keys = _mixed(_mixed(_mixed(torch.tensor(seed, device=like.device)) + prompts) + steps_)
    bits = _mixed(keys[:, None] + torch.arange(like.shape[1], device=like.device) * _GOLDEN)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Every bit of 64-bit integers spread over all (the finalizer of SplitMix64: Steele, Lea and Flood, 2014)."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _decode_by_generate(
    model: PreTrainedModel, rows: list[_Row], how: Decoding, choose: _Choice
) -> Iterator[list[tuple[int, list[int]]]]:
    """The same by transformers' generate(), in batches of prompts of one length: recurrent states read padding too."""
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, do_sample=False, eos_token_id=how.end_id, pad_token_id=how.end_id
    )
    for length, same in groupby(rows, key=lambda row: len(row.prompt_ids)):
        size = max(1, how.max_batch_tokens // (length + how.max_new_tokens))
        while batch := list(islice(same, size)):
            indices = [row.index for row in batch]

            def process(
                input_ids: torch.Tensor, logits: torch.Tensor, indices: list[int] = indices, length: int = length
            ) -> torch.Tensor:
                steps = [input_ids.shape[1] - length] * len(indices)
                return choose.scores(indices, steps, input_ids, logits)

            with _without_own_defaults(model):
                output = model.generate(
                    input_ids=torch.tensor([row.prompt_ids for row in batch], device=model.device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([process]),
                )
            responses = output[:, length:].tolist()
            yield [(index, _until_end(ids, how.end_id)) for index, ids in zip(indices, responses, strict=True)]


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


def _until_end(token_ids: list[int], end_id: int) -> list[int]:
    return token_ids[: token_ids.index(end_id) + 1] if end_id in token_ids else token_ids

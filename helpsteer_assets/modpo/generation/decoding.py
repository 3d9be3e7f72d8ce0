"""Decoding many prompts at once, each at the cost of its own tokens.

Rows of a batch share the columns of one key-value cache and end at the same column. A row that joins is written so
that its last token lies in the same column as the others'. A finished row gives its place to the last row. So a
finished response costs nothing more, a waiting prompt takes its room, and a step writes only its own keys and values; a
cache that grows by concatenation would copy all of them.
"""

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, islice
from typing import Any

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
from helpsteer_assets.modpo.settings import Sampling

_log = logging.getLogger(__name__)

PREFILL_TOKENS = 1024
"""Padded prompt tokens of one prefill pass: enough for efficient matrix products, with little padding."""

SPARE_COLUMNS = 64
"""Columns by which a full cache grows; it is copied once in that many steps."""


@dataclass(frozen=True, kw_only=True)
class Decoding(Sampling):
    """How the next token is chosen, and when a response ends."""

    end_id: int
    """The token that ends a response."""
    seed: int = 0
    """Seed of sampling."""


@dataclass
class _Row:
    """A prompt that is being answered."""

    index: int
    """Its place among the prompts; seed and index decide what is sampled."""
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """The response so far."""

    @property
    def cached(self) -> int:
        """Tokens with keys and values in the cache: all but the last."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


def decode(
    model: PreTrainedModel, prompts: dict[int, list[int]], how: Decoding
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield responses when they are finished: lists of (index, token ids), with the end-of-text token if there is one.

    In fp32 a response depends on its prompt, and where it is sampled on its index and the seed, but not on the prompts
    that are decoded beside it. In bf16 rounding may make it depend on them; the same set of prompts then gives the same
    responses.

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
    """Take the waiting prompts for which there is room; none while they are too few to be worth a forward pass."""
    if not waiting:
        return []
    # The longest prompts go first: too little memory shows at once, and no later prompt is wider.
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
        """Add the rows of another cache, none longer than the longest row here. `room`: rows to reserve in all."""
        for number, layer in enumerate(prefilled.layers):
            if len(self.layers) <= number:
                self.layers.append(_RowLayer())
            self.layers[number].join(layer.keys, layer.values, room)

    def drop(self, finished: list[bool]) -> list[int]:
        """Remove finished rows; returns the former places of the other rows, in their new order."""
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
        """Drop all but the last `columns` columns."""
        for layer in self.layers:
            layer.begin = layer.end - columns


class _RowLayer(DynamicLayer):
    """The cache of one layer: the first `rows` rows and columns `begin` to `end` of buffers with room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.begin = self.end = 0
        self.keys: Any
        self.values: Any

    def get_seq_length(self) -> int:
        """Number of columns."""
        return self.end - self.begin

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns [rows, heads, new columns, head size] to all rows; returns all keys and values."""
        self._reserve(self.rows, key_states, value_states)
        new = slice(self.end, self.end + key_states.shape[2])
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        self.end = new.stop
        return self._live(self.keys), self._live(self.values)

    def join(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Add rows [new rows, heads, columns, head size]; they end at the same column as the others."""
        self._reserve(room, keys, values)
        if self.rows == 0:
            self.begin, self.end = 0, keys.shape[2]
        rows, columns = slice(self.rows, self.rows + len(keys)), slice(self.end - keys.shape[2], self.end)
        self.keys[rows, :, columns] = keys
        self.values[rows, :, columns] = values
        self.rows = rows.stop

    def keep(self, rows: int, movers: list[int], holes: list[int]) -> None:
        """Copy the rows `movers` to the places `holes`, then keep the first `rows` rows."""
        if holes:
            for states in (self._live(self.keys), self._live(self.values)):
                states[holes] = states[movers]
        self.rows = rows

    def _live(self, states: torch.Tensor) -> torch.Tensor:
        return states[: self.rows, :, self.begin : self.end]

    def _reserve(self, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for `rows` rows, and for the columns of `keys` after the present ones."""
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
            # Zeros, because the masked columns before a short row's first one must be finite.
            shape = (max(rows, len(states)), states.shape[1], columns + needed + SPARE_COLUMNS, states.shape[3])
            buffer = states.new_zeros(shape)
            buffer[: self.rows, :, :columns] = self._live(states)
            return buffer

        self.keys, self.values = grown(self.keys), grown(self.values)
        self.begin, self.end = 0, columns


def keeps_all_keys(model: PreTrainedModel) -> bool:
    """Whether the model remembers a text by one key and value per token alone, without a recurrent state."""
    return "past_key_values" in _arguments(type(model)) and all(  # type: ignore[arg-type]
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers
    )


@cache
def _arguments(kind: type[PreTrainedModel]) -> frozenset[str]:
    """Names of the arguments of a forward pass."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _prefill(model: PreTrainedModel, joining: list[_Row], cache: RowCache, room: int) -> torch.Tensor:
    """Read prompts, the longest first, into the cache; returns logits [rows, vocabulary] of the first tokens."""
    logits = []
    for places in plan_batches([len(row.prompt_ids) for row in joining], PREFILL_TOKENS):
        prompts = [joining[place].prompt_ids for place in places]
        width = len(prompts[0])
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        # Every layer keeps all keys, and a sliding window is a mask: so rows of any length can share the cache.
        prefilled = DynamicCache()
        logits.append(_forward(model, input_ids, lengths, prefilled))
        cache.join(prefilled, room)
    return torch.cat(logits)


def _step(model: PreTrainedModel, live: list[_Row], cache: RowCache) -> torch.Tensor:
    """Read the last token of every row; returns logits [rows, vocabulary] of the next one."""
    input_ids = torch.tensor([row.token_ids[-1:] for row in live], device=model.device)
    lengths = torch.tensor([row.cached + 1 for row in live], device=model.device)
    return _forward(model, input_ids, lengths, cache)


def _forward(model: PreTrainedModel, input_ids: torch.Tensor, lengths: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits [rows, vocabulary] after the last of `input_ids` [rows, new], which are padded on the left.

    `lengths` [rows] are the tokens of each row, cached and new, without padding; new keys and values join the cache.
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
        **{name: value for name, value in optional.items() if name in _arguments(type(model))},  # type: ignore[arg-type]
    )
    return output.logits[:, -1].float()


class _Choice:
    """Chooses next tokens."""

    def __init__(self, how: Decoding) -> None:
        self._how = how
        # transformers' processors. Those of the first kind read the text, one row at a time, because they would take
        # padding for text. Those of the second kind read the scores only.
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
        """Scores [rows, vocabulary]; the token with the largest score is the next one.

        The largest log-probability plus Gumbel noise is a sample of the distribution (Gumbel, 1954).

        Args:
            indices: index of each row's prompt.
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

    It is a hash of seed, prompt, step and token. So there is no generator state that other rows could advance, and
    every device gives the same numbers.
    """
    prompts, steps_ = (torch.tensor(numbers, device=like.device) for numbers in (indices, steps))
    keys = _mixed(_mixed(_mixed(torch.tensor(seed, device=like.device)) + prompts) + steps_)
    bits = _mixed(keys[:, None] + torch.arange(like.shape[1], device=like.device) * _GOLDEN)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """64-bit integers hashed by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _decode_by_generate(
    model: PreTrainedModel, rows: list[_Row], how: Decoding, choose: _Choice
) -> Iterator[list[tuple[int, list[int]]]]:
    """`decode` by transformers' generate(), in batches of prompts of one length, for recurrent states read padding."""
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
            yield [
                (index, ids[: ids.index(how.end_id) + 1] if how.end_id in ids else ids)
                for index, ids in zip(indices, responses, strict=True)
            ]


@contextmanager
def _without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Empty the model's own generation config, from which generate() takes what the given config does not state.

    Otherwise a base model's defaults (suppressed tokens, a minimal length, ...) would change how policies decode.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own

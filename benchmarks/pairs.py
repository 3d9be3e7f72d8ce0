"""Pairs of random tokens with the lengths of real ones: what is measured depends on lengths, not on words."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

END_OF_TEXT = 2
"""Ends every response, in every benchmark's model."""
_FIRST_WORD = 10
"""Ids below are left to special tokens."""


@dataclass(frozen=True)
class Pair:
    """One prompt with its two responses, each ending in `END_OF_TEXT`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class LengthMix:
    """Log-normal lengths in tokens, at a limit of 256 tokens for prompt and response."""

    prompt_median: int
    prompt_sigma: float
    response_median: int
    response_sigma: float


MIXES = {
    "long prompts": LengthMix(150, 0.3, 50, 0.5),
    "mid prompts": LengthMix(90, 0.6, 80, 0.5),
    "short prompts": LengthMix(30, 0.6, 110, 0.5),
}


class RandomText:
    """Draws prompts and responses.

    Args:
        vocabulary: size of the model's vocabulary.
        mix: how long they are.
        max_tokens: limit of prompt and response together; lengths scale with it.
        seed: the same seed draws the same tokens.
    """

    def __init__(self, vocabulary: int, mix: LengthMix, max_tokens: int = 256, seed: int = 0) -> None:
        self._vocabulary = vocabulary
        self._mix = mix
        self._max_tokens = max_tokens
        self._random = random.Random(seed)

    def prompt_and_responses(self, count: int) -> tuple[list[int], list[list[int]]]:
        """A prompt with `count` responses; drawn again while one of them is beyond the limit."""
        mix = self._mix
        while True:
            prompt = self._length(mix.prompt_median, mix.prompt_sigma)
            responses = [self._length(mix.response_median, mix.response_sigma) for _ in range(count)]
            if prompt + max(responses) <= self._max_tokens:
                return self._words(prompt), [[*self._words(n - 1), END_OF_TEXT] for n in responses]

    def pairs(self, count: int) -> list[Pair]:
        """Pairs that have no prompt in common."""
        drawn = (self.prompt_and_responses(2) for _ in range(count))
        return [Pair(prompt, chosen, rejected) for prompt, (chosen, rejected) in drawn]

    def helpsteer_like(self, prompts: int) -> list[Pair]:
        """All pairs among four rated responses of each prompt, equal ratings left out: three to five a prompt.

        Neighbours in the list have different prompts, as they nearly always have in a large shuffled data set, so that
        a training step shares nothing between its pairs.
        """
        by_prompt = []
        while len(by_prompt) < prompts:
            ratings = [self._random.choice((2, 3, 3, 4)) for _ in range(4)]
            unequal = [(a, b) for a, b in itertools.permutations(range(4), 2) if ratings[a] > ratings[b]]
            if unequal:
                prompt, responses = self.prompt_and_responses(4)
                self._random.shuffle(unequal)
                by_prompt.append([Pair(prompt, responses[a], responses[b]) for a, b in unequal])
        return list(_round_robin(by_prompt))

    def _length(self, median: int, sigma: float) -> int:
        scale = self._max_tokens / 256
        return max(8, round(scale * math.exp(self._random.gauss(math.log(median), sigma))))

    def _words(self, count: int) -> list[int]:
        return [self._random.randrange(_FIRST_WORD, self._vocabulary) for _ in range(count)]


def _round_robin(groups: list[list[Pair]]) -> Iterator[Pair]:
    for turn in itertools.zip_longest(*groups):
        yield from (pair for pair in turn if pair is not None)

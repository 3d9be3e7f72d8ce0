"""Degenerate text: responses that are empty or repeat themselves."""

import re

REPETITION_LIMIT = 0.5
"""A text mostly repeats itself if more than this share of its 4-grams occurred before in it."""

_NGRAM = 4
_LONGEST_WORD = 40
_UNITS = re.compile(
    # Scripts written without spaces: Thai to Myanmar, Khmer, kana, Chinese characters.
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
    "|[^\\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


def repetition(text: str) -> float:
    """Share of the word 4-grams of `text` that occurred before in it: 0 (none, or fewer than 4 words) up to below 1.

    1 - (distinct 4-grams) / (4-grams): seq-rep-4 of Welleck et al., "Neural Text Generation with Unlikelihood
    Training", ICLR 2020, section 6, on words instead of tokens. In scripts without spaces, and in words of more
    than 40 characters, each character counts as a word. Time grows linearly with the text.
    """
    units: list[str] = []
    for unit in _UNITS.findall(text):
        units.extend(unit if len(unit) > _LONGEST_WORD else (unit,))
    grams = len(units) - _NGRAM + 1
    if grams < 1:
        return 0.0
    return 1 - len(set(zip(*(units[i:] for i in range(_NGRAM)), strict=False))) / grams


def is_empty(text: str) -> bool:
    """Whether `text` has no visible character: only spaces, control and format characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)

"""Repetition and emptiness of responses in any script."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.modpo.comparison.text import is_empty, repetition


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_repetition_agrees_with_a_search_through_all_that_came_before(words: list[str]) -> None:
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition("  ".join(words)) == pytest.approx(before / len(grams) if grams else 0)


def test_text_without_spaces_counts_by_characters() -> None:
    assert repetition("请帮我写一封信给我的朋友") == 0
    assert repetition("我们我们我们我们我们") == pytest.approx(5 / 7)
    assert repetition("我們 " * 20) > 0.9
    assert repetition("สวัสดีครับ") == 0
    assert repetition("x" * 10_000) > 0.99
    assert repetition("abcdefghij" * 3) == 0  # one word of 30 letters
    assert repetition("abcdefghij" * 5) == pytest.approx(37 / 47)


def test_a_text_is_empty_if_nothing_of_it_is_visible() -> None:
    assert all(is_empty(text) for text in ("", " \n\t", "\u200b\u200e", "\x00", "\u3000"))
    assert not any(is_empty(text) for text in (".", "字", "a", "🙂"))

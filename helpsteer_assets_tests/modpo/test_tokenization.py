import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.tokenization import (
    Sequence,
    count_response_tokens,
    encode_prompt,
    encode_response,
    encode_responses,
    render_prompt,
)
from helpsteer_assets_tests.conftest import make_tokenizer

EOS = 2
TOKENIZER = make_tokenizer()
"""Session fixtures and hypothesis don't mix."""


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def responses(*rows: tuple[str, str]) -> pa.Table:
    """One row per (prompt, response)."""
    return pa.table(
        {
            "prompt_id": [f"p:{prompt}" for prompt, _ in rows],
            "response_id": [f"r{number}" for number in range(len(rows))],
            "prompt": [prompt for prompt, _ in rows],
            "response": [response for _, response in rows],
        }
    )


class TestPrompt:
    def test_is_rendered_by_the_tokenizers_chat_template(self):
        assert render_prompt(TOKENIZER, "Fold it?") == "<s>user: Fold it?\nassistant: "

    def test_without_a_chat_template_gets_the_described_pipelines_template(self):
        assert render_prompt(make_tokenizer(chat_template=None), "Fold it?") == ("\n\nHuman:\nFold it?\n\nAssistant:\n")

    def test_begins_with_one_begin_of_text_token_and_not_two(self):
        encoded, cut = encode_prompt(TOKENIZER, "Fold it?", 100)
        assert (encoded.count(1), encoded[0], cut) == (1, 1, False)

    def test_keeps_its_last_tokens(self):
        whole, _ = encode_prompt(TOKENIZER, "How do I fold a shirt?", 1000)
        assert encode_prompt(TOKENIZER, "How do I fold a shirt?", 7) == (whole[-7:], True)

    def test_that_just_fits_is_not_cut(self):
        whole, _ = encode_prompt(TOKENIZER, "How do I fold a shirt?", 1000)
        assert encode_prompt(TOKENIZER, "How do I fold a shirt?", len(whole)) == (whole, False)
        assert encode_prompt(TOKENIZER, "How do I fold a shirt?", len(whole) - 1) == (whole[1:], True)


class TestResponse:
    def test_ends_with_the_end_of_text_token(self):
        assert encode_response(TOKENIZER, "Lay it flat", 100) == ([*ids("Lay it flat"), EOS], False)

    def test_whose_end_of_text_token_just_fits_keeps_it(self):
        assert encode_response(TOKENIZER, "Lay it flat", len(ids("Lay it flat")) + 1)[0][-1] == EOS

    def test_whose_end_of_text_token_does_not_fit_is_cut_and_has_none(self):
        whole = ids("Lay it flat")
        assert encode_response(TOKENIZER, "Lay it flat", len(whole)) == (whole, True)
        assert encode_response(TOKENIZER, "Lay it flat", len(whole) - 1) == (whole[:-1], True)
        assert encode_response(TOKENIZER, "Lay it flat", 1) == (whole[:1], True)

    def test_without_text_is_the_end_of_text_token(self):
        assert encode_response(TOKENIZER, "", 1) == ([EOS], False)

    def test_of_a_tokenizer_without_end_of_text_token_is_refused(self):
        with pytest.raises(HelpsteerError, match="has no end-of-text token"):
            encode_response(make_tokenizer(eos=False), "Lay it flat", 10)

    @settings(max_examples=50, deadline=None)
    @given(text=st.text(max_size=30), room=st.integers(1, 40))
    def test_is_cut_at_its_end_by_one_rule(self, text, room):
        whole = [*ids(text), EOS]
        encoded, cut = encode_response(TOKENIZER, text, room)
        assert cut == (len(whole) > room)
        assert encoded == whole[:room]


class TestEncodeResponses:
    def test_prompt_tokens_are_the_same_whatever_response_follows(self):
        # As one text "clean" and "er" would share a token with what stands before.
        table = responses(*[("How do I clean", text) for text in ("er", " a kettle?", "\n", "", "s")])
        encoded = encode_responses(TOKENIZER, table, 100, 50)
        assert len({tuple(sequence.prompt_ids) for sequence in encoded.values()}) == 1

    def test_every_response_of_a_prompt_has_the_same_room(self):
        table = responses(("How do I fold a shirt?", "flat " * 30), ("How do I fold a shirt?", "rinse " * 30))
        encoded = encode_responses(TOKENIZER, table, max_length=30, max_prompt_length=20)
        assert [len(sequence) for sequence in encoded.values()] == [30, 30]
        assert {len(sequence.response_ids) for sequence in encoded.values()} == {
            30 - len(encode_prompt(TOKENIZER, "How do I fold a shirt?", 20)[0])
        }

    def test_a_short_prompt_leaves_its_room_to_the_response(self):
        table = responses(("A?", "flat " * 60))
        (sequence,) = encode_responses(TOKENIZER, table, max_length=40, max_prompt_length=20).values()
        assert len(sequence) == 40
        assert len(sequence.prompt_ids) < 20

    def test_a_prompt_that_takes_all_but_one_token_leaves_one(self):
        table = responses(("How do I fold a shirt?" * 5, "Lay it flat"), ("How do I fold a shirt?" * 5, ""))
        long, empty = encode_responses(TOKENIZER, table, max_length=9, max_prompt_length=8).values()
        assert (len(long.prompt_ids), long.response_ids) == (8, ids("Lay it flat")[:1])
        assert empty.response_ids == [EOS]

    def test_tells_whether_prompt_or_response_was_cut(self):
        table = responses(("A?", "b"), ("A?", "b" * 99), ("A" * 99, "b"))
        encoded = encode_responses(TOKENIZER, table, max_length=60, max_prompt_length=30)
        assert [sequence.truncated for sequence in encoded.values()] == [False, True, True]

    def test_keeps_the_tables_order_by_response_id(self):
        table = responses(("A?", "b"), ("B?", "c"), ("A?", "d"))
        encoded = encode_responses(TOKENIZER, table, 60, 30)
        assert list(encoded) == ["r0", "r1", "r2"]
        assert encoded["r2"] == Sequence(encode_prompt(TOKENIZER, "A?", 30)[0], [*ids("d"), EOS])


def test_a_length_penalty_counts_the_uncut_response_with_its_end_of_text_token():
    table = responses(("A?", "flat " * 500), ("A?", ""))
    assert count_response_tokens(TOKENIZER, table) == {"r0": len(ids("flat " * 500)) + 1, "r1": 1}

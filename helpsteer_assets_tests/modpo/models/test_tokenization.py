import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.tokenization import (
    Sequence,
    count_response_tokens,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    render_prompt,
)
from helpsteer_assets_tests.conftest import make_tokenizer

EOS = 2
TOKENIZER = make_tokenizer()
"""Session fixtures and hypothesis don't mix."""
TOKENIZERS = {
    "with a chat template": TOKENIZER,
    "without a chat template": make_tokenizer(chat_template=None),
    "without a Rust backend": ByT5Tokenizer(),
}
TEXTS = st.one_of(
    st.sampled_from(["", " ", "\n", "\x00", "A?", "e\u0301", "👩\u200d👩", "\ufeff", "fold " * 3000, "<s></s>"]),
    st.text(max_size=30),
)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def prompt(text: str, max_length: int) -> tuple[list[int], bool]:
    encoded, cut = encode_prompt(TOKENIZER, text, max_length)
    return encoded.tolist(), cut


def response(text: str, max_length: int) -> tuple[list[int], bool]:
    encoded, cut = encode_response(TOKENIZER, text, max_length)
    return encoded.tolist(), cut


def one_by_one(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int], bool]:
    """A prompt and a response as they are to be encoded: each text in a call of its own, in lists, by the rule."""
    whole = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=not tokenizer.chat_template)["input_ids"]
    kept = whole[-max_prompt_length:]
    answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = max_length - len(kept)
    return kept, answer[:room], len(whole) > max_prompt_length or len(answer) > room


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
        encoded, cut = prompt("Fold it?", 100)
        assert (encoded.count(1), encoded[0], cut) == (1, 1, False)

    def test_keeps_its_last_tokens(self):
        whole, _ = prompt("How do I fold a shirt?", 1000)
        assert prompt("How do I fold a shirt?", 7) == (whole[-7:], True)

    def test_that_just_fits_is_not_cut(self):
        whole, _ = prompt("How do I fold a shirt?", 1000)
        assert prompt("How do I fold a shirt?", len(whole)) == (whole, False)
        assert prompt("How do I fold a shirt?", len(whole) - 1) == (whole[1:], True)


class TestResponse:
    def test_ends_with_the_end_of_text_token(self):
        assert response("Lay it flat", 100) == ([*ids("Lay it flat"), EOS], False)

    def test_whose_end_of_text_token_just_fits_keeps_it(self):
        assert response("Lay it flat", len(ids("Lay it flat")) + 1)[0][-1] == EOS

    def test_whose_end_of_text_token_does_not_fit_is_cut_and_has_none(self):
        whole = ids("Lay it flat")
        assert response("Lay it flat", len(whole)) == (whole, True)
        assert response("Lay it flat", len(whole) - 1) == (whole[:-1], True)
        assert response("Lay it flat", 1) == (whole[:1], True)

    def test_without_text_is_the_end_of_text_token(self):
        assert response("", 1) == ([EOS], False)

    def test_of_a_tokenizer_without_end_of_text_token_is_refused(self):
        with pytest.raises(HelpsteerError, match="has no end-of-text token"):
            encode_response(make_tokenizer(eos=False), "Lay it flat", 10)

    @settings(max_examples=50, deadline=None)
    @given(text=st.text(max_size=30), room=st.integers(1, 40))
    def test_is_cut_at_its_end_by_one_rule(self, text, room):
        whole = [*ids(text), EOS]
        encoded, cut = response(text, room)
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
            30 - len(prompt("How do I fold a shirt?", 20)[0])
        }

    def test_a_short_prompt_leaves_its_room_to_the_response(self):
        table = responses(("A?", "flat " * 60))
        (sequence,) = encode_responses(TOKENIZER, table, max_length=40, max_prompt_length=20).values()
        assert len(sequence) == 40
        assert len(sequence.prompt_ids) < 20

    def test_a_prompt_that_takes_all_but_one_token_leaves_one(self):
        table = responses(("How do I fold a shirt?" * 5, "Lay it flat"), ("How do I fold a shirt?" * 5, ""))
        long, empty = encode_responses(TOKENIZER, table, max_length=9, max_prompt_length=8).values()
        assert (len(long.prompt_ids), long.response_ids.tolist()) == (8, ids("Lay it flat")[:1])
        assert empty.response_ids.tolist() == [EOS]

    def test_tells_whether_prompt_or_response_was_cut(self):
        table = responses(("A?", "b"), ("A?", "b" * 99), ("A" * 99, "b"))
        encoded = encode_responses(TOKENIZER, table, max_length=60, max_prompt_length=30)
        assert [sequence.truncated for sequence in encoded.values()] == [False, True, True]

    def test_keeps_the_tables_order_by_response_id(self):
        table = responses(("A?", "b"), ("B?", "c"), ("A?", "d"))
        encoded = encode_responses(TOKENIZER, table, 60, 30)
        assert list(encoded) == ["r0", "r1", "r2"]
        assert encoded["r2"] == Sequence(encode_prompt(TOKENIZER, "A?", 30)[0], np.array([*ids("d"), EOS], np.int32))
        assert (len(encoded), "r2" in encoded, "r3" in encoded) == (3, True, False)

    def test_of_an_empty_table_are_none(self):
        assert len(encode_responses(TOKENIZER, responses(), 60, 30)) == 0

    def test_are_one_dimensional_and_take_four_bytes_a_token(self):
        (sequence,) = encode_responses(TOKENIZER, responses(("A?", "b")), 60, 30).values()
        assert [(a.dtype, a.ndim) for a in (sequence.prompt_ids, sequence.response_ids)] == [(np.int32, 1)] * 2

    def test_of_one_prompt_share_its_token_ids(self):
        one, two = encode_responses(TOKENIZER, responses(("A?", "b"), ("A?", "c")), 60, 30).values()
        assert np.shares_memory(one.prompt_ids, two.prompt_ids)

    def test_of_a_tokenizer_without_end_of_text_token_are_refused(self):
        with pytest.raises(HelpsteerError, match="has no end-of-text token"):
            encode_responses(make_tokenizer(eos=False), responses(("A?", "b")), 60, 30)

    @pytest.mark.parametrize("name", TOKENIZERS)
    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6),
        max_prompt_length=st.integers(1, 60),
        room=st.integers(1, 60),
        batch=st.integers(1, 4),
    )
    def test_many_at_a_time_are_what_each_is_alone(self, name, rows, max_prompt_length, room, batch):
        tokenizer, max_length = TOKENIZERS[name], max_prompt_length + room
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("helpsteer_assets.modpo.models.tokenization._BATCH_TEXTS", batch)
            encoded = encode_responses(tokenizer, responses(*rows), max_length, max_prompt_length)
            prompts = encode_prompts(tokenizer, [prompt for prompt, _ in rows], max_prompt_length)
            counts = count_response_tokens(tokenizer, responses(*rows))
        expected = [one_by_one(tokenizer, *row, max_length, max_prompt_length) for row in rows]
        found = [(s.prompt_ids.tolist(), s.response_ids.tolist(), s.truncated) for s in encoded.values()]
        assert found == expected
        assert [ids.tolist() for ids, _ in prompts] == [ids for ids, _, _ in expected]
        assert list(counts.values()) == [len(one_by_one(tokenizer, *row, 10**6, 1)[1]) for row in rows]


class TestSequence:
    def test_equals_one_of_the_same_tokens_that_was_cut_alike(self):
        one, two = np.array([1], np.int32), np.array([1, 2], np.int32)
        assert Sequence(one, two) == Sequence(one.copy(), two.copy())
        assert Sequence(one, two) != Sequence(two, one)
        assert Sequence(one, two) != Sequence(one, one)
        assert Sequence(one, two) != Sequence(one, two, truncated=True)
        assert Sequence(one, two) != (one, two)


def test_a_length_penalty_counts_the_uncut_response_with_its_end_of_text_token():
    table = responses(("A?", "flat " * 500), ("A?", ""))
    assert count_response_tokens(TOKENIZER, table) == {"r0": len(ids("flat " * 500)) + 1, "r1": 1}

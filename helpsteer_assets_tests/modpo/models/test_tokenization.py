import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.tokenization import (
    count_response_tokens,
    encode_prompts,
    encode_response,
    encode_responses,
    render_prompt,
)
from helpsteer_assets_tests.conftest import make_tokenizer

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


def test_a_prompt_is_rendered_by_the_chat_template_or_the_described_pipelines():
    assert render_prompt(TOKENIZER, "Fold it?") == "<s>user: Fold it?\nassistant: "
    assert render_prompt(make_tokenizer(chat_template=None), "Fold it?") == "\n\nHuman:\nFold it?\n\nAssistant:\n"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6),
    max_prompt_length=st.integers(1, 60),
    room=st.integers(1, 60),
    batch=st.integers(1, 4),
)
def test_many_at_a_time_are_what_each_is_alone(name, rows, max_prompt_length, room, batch):
    tokenizer, max_length = TOKENIZERS[name], max_prompt_length + room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpsteer_assets.modpo.models.tokenization._BATCH_TEXTS", batch)
        encoded = encode_responses(tokenizer, responses(*rows), max_length, max_prompt_length)
        prompts = encode_prompts(tokenizer, [prompt for prompt, _ in rows], max_prompt_length)
        counts = count_response_tokens(tokenizer, responses(*rows))
    expected = [one_by_one(tokenizer, *row, max_length, max_prompt_length) for row in rows]
    found = [(s.prompt_ids.tolist(), s.response_ids.tolist(), s.truncated) for s in encoded.values()]
    assert found == expected
    assert list(encoded) == list(counts) == [f"r{number}" for number in range(len(rows))]
    assert [ids.tolist() for ids, _ in prompts] == [ids for ids, _, _ in expected]
    assert list(counts.values()) == [len(one_by_one(tokenizer, *row, 10**6, 1)[1]) for row in rows]


def test_a_tokenizer_without_end_of_text_token_is_refused():
    for encode in (
        lambda tokenizer: encode_response(tokenizer, "Lay it flat", 10),
        lambda tokenizer: encode_responses(tokenizer, responses(("A?", "b")), 60, 30),
    ):
        with pytest.raises(HelpsteerError, match="has no end-of-text token"):
            encode(make_tokenizer(eos=False))

from typing import Any

import pytest
import torch

from helpsteer_assets.modpo.generation import responses as generation
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.generation.responses import generate
from helpsteer_assets.modpo.models.loading import load_model
from helpsteer_assets.modpo.models.tokenization import encode_prompt
from helpsteer_assets.modpo.settings import Sampling
from helpsteer_assets_tests.conftest import SENTENCES, make_tokenizer

EOS = 2
WORDS = [word for sentence in SENTENCES for word in sentence.split()]
PROMPTS = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(12)]


def settings_of(**changes: Any) -> Sampling:
    return Sampling(**({"max_prompt_length": 40, "max_new_tokens": 12} | changes))


@pytest.fixture
def policy(model: torch.nn.Module) -> torch.nn.Module:
    """A model that ends some of its responses and not others."""
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5
    return model


@torch.no_grad()
def test_a_greedy_response_is_the_likeliest_tokens_up_to_the_end_of_text_token_or_the_limit(policy, tokenizer):
    made = generate(policy, tokenizer, PROMPTS, settings_of(), seed=0)
    for prompt, found in zip(PROMPTS, made, strict=True):
        tokens = encode_prompt(tokenizer, prompt, 40)[0].tolist()
        expected: list[int] = []
        while len(expected) < 12 and (not expected or expected[-1] != EOS):
            expected.append(policy(torch.tensor([tokens + expected])).logits[0, -1].argmax().item())
        assert found.token_ids == expected
        assert found.finish_reason == ("eos" if expected[-1] == EOS else "length")
        assert found.response == tokenizer.decode(expected, skip_special_tokens=True)
    assert {found.finish_reason for found in made} == {"eos", "length"}


@pytest.mark.parametrize(
    "rules",
    [{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {"do_sample": True, "temperature": 1.5}],
    ids=["greedy", "sampled"],
)
def test_a_response_does_not_depend_on_the_batch_even_where_padding_is_the_end_of_text_token(policy, rules):
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    one, few, all_ = (
        generate(policy, tokenizer, PROMPTS, settings_of(max_batch_tokens=tokens, **rules), seed=3)
        for tokens in (1, 150, 10**6)
    )
    assert one == few == all_


class TestLimits:
    def test_a_cut_prompt_is_marked_and_its_last_tokens_are_answered(self, policy, tokenizer):
        long = "fold " * 30 + "a shirt?"
        made = generate(policy, tokenizer, ["A?", long, "fold " * 60 + "a shirt?"], settings_of(), seed=0)
        assert [g.prompt_truncated for g in made] == [False, True, True]
        assert made[1].token_ids == made[2].token_ids


def test_sampling_is_decided_by_the_seed_and_the_prompts_place(policy, tokenizer):
    how = settings_of(do_sample=True, temperature=1.5)
    made = [generate(policy, tokenizer, PROMPTS[:1] * 3, how, seed=seed) for seed in (3, 3, 2**32 - 1)]
    assert made[0] == made[1] != made[2]
    assert len({tuple(g.token_ids) for g in made[0]}) == 3


class TestResume:
    @pytest.mark.parametrize("do_sample", [False, True])
    @pytest.mark.parametrize("share", [0.6, 0.99])
    def test_from_a_file_cut_anywhere_gives_identical_responses(self, policy, tokenizer, tmp_path, share, do_sample):
        how = settings_of(do_sample=do_sample, max_batch_tokens=150)
        whole = generate(policy, tokenizer, PROMPTS, how, seed=5)
        file = tmp_path / "generations.jsonl"
        assert generate(policy, tokenizer, PROMPTS, how, seed=5, checkpoint=file) == whole
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        assert generate(policy, tokenizer, PROMPTS, how, seed=5, checkpoint=file) == whole

    @pytest.mark.parametrize(("precision", "again"), [("fp32", 1), ("bf16", 4)])
    def test_begins_a_share_of_the_prompts_again_where_rounding_depends_on_the_batch(
        self, tiny_model_path, tokenizer, tmp_path, monkeypatch, precision, again
    ):
        monkeypatch.setattr(generation, "SHARE_OF_PROMPTS", 4)
        decoded: list[int] = []

        def spy(model: torch.nn.Module, prompts: dict[int, list[int]], how: Decoding) -> Any:
            decoded.append(len(prompts))
            return decode(model, prompts, how)

        monkeypatch.setattr(generation, "decode", spy)
        model, file = load_model(tiny_model_path, precision=precision), tmp_path / "generations.jsonl"
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int, **_: float) -> None:
            seen.append((done, total))

        def respond() -> Any:
            return generate(model, tokenizer, PROMPTS, settings_of(), seed=0, progress=progress, checkpoint=file)

        whole = respond()
        assert decoded == [4, 4, 4]
        assert seen == sorted(seen) and len(seen) > 2 and seen[-1] == (12, 12)
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:7]) + lines[7][:9])
        assert respond() == whole
        assert decoded[3:] == [again, 4]
        assert respond() == whole
        assert len(decoded) == 5, "nothing is generated again"

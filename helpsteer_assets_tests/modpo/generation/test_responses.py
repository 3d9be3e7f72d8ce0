import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpsteer_assets.errors import HelpsteerError
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


class TestGreedy:
    @torch.no_grad()
    def test_takes_the_likeliest_token_until_the_end_of_text_token_or_the_limit(self, policy, tokenizer):
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

    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize(
        "decoding", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}], ids=["plain", "penalty", "ngram"]
    )
    def test_response_does_not_depend_on_batch_size_or_order(self, policy, tokenizer, decoding, pad_is_eos):
        tokenizer = make_tokenizer(pad=not pad_is_eos)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

        def responses(prompts: list[str], max_batch_tokens: int) -> dict[str, Any]:
            how = settings_of(max_batch_tokens=max_batch_tokens, **decoding)
            return dict(zip(prompts, generate(policy, tokenizer, prompts, how, seed=0), strict=True))

        alone = responses(PROMPTS, 1)
        assert responses(PROMPTS, 150) == alone
        assert responses(PROMPTS, 10**6) == alone
        assert responses(PROMPTS[::-1], 10**6) == alone

    def test_does_not_depend_on_the_seed(self, policy, tokenizer):
        made = [generate(policy, tokenizer, PROMPTS[:4], settings_of(), seed=seed) for seed in (0, 2**32 - 1)]
        assert made[0] == made[1]


class TestLimits:
    def test_max_new_tokens_counts_the_end_of_text_token(self, policy, tokenizer):
        made = generate(policy, tokenizer, PROMPTS, settings_of(), seed=0)
        ended = next(g for g in made if g.finish_reason == "eos" and len(g.token_ids) > 1)
        prompt, length = PROMPTS[made.index(ended)], len(ended.token_ids)
        (just,) = generate(policy, tokenizer, [prompt], settings_of(max_new_tokens=length), seed=0)
        assert (just.token_ids, just.finish_reason) == (ended.token_ids, "eos")
        (short,) = generate(policy, tokenizer, [prompt], settings_of(max_new_tokens=length - 1), seed=0)
        assert (short.token_ids, short.finish_reason) == (ended.token_ids[:-1], "length")

    def test_a_cut_prompt_is_marked_and_its_last_tokens_are_answered(self, policy, tokenizer):
        long = "fold " * 30 + "a shirt?"
        made = generate(policy, tokenizer, ["A?", long, "fold " * 60 + "a shirt?"], settings_of(), seed=0)
        assert [g.prompt_truncated for g in made] == [False, True, True]
        assert made[1].token_ids == made[2].token_ids

    def test_a_tokenizer_without_end_of_text_token_is_refused(self, policy):
        with pytest.raises(HelpsteerError, match="has no end-of-text token"):
            generate(policy, make_tokenizer(eos=False), PROMPTS[:1], settings_of(), seed=0)


def test_nothing_in_the_models_generation_config_changes_how_it_decodes(tiny_model_path, tokenizer, tmp_path):
    plain = load_model(tiny_model_path, precision="fp32")
    expected = generate(plain, tokenizer, PROMPTS, settings_of(), seed=0)
    likeliest = expected[0].token_ids[0]
    willful = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 2,
        "max_length": 3,
        "min_length": 100,
        "min_new_tokens": 11,
        "num_beams": 2,
        "suppress_tokens": [likeliest],
        "begin_suppress_tokens": [likeliest],
        "bad_words_ids": [[likeliest]],
        "forced_eos_token_id": 7,
        "eos_token_id": [likeliest, 7],
        "encoder_repetition_penalty": 3.0,
        "sequence_bias": [[[7], 50.0]],
        "renormalize_logits": True,
    }
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(willful))
    model = load_model(folder, precision="fp32")
    assert model.generation_config.suppress_tokens == [likeliest]
    assert generate(model, tokenizer, PROMPTS, settings_of(), seed=0) == expected
    # It is the model's own still, for who saves it.
    assert model.generation_config.suppress_tokens == [likeliest]
    sampled = settings_of(do_sample=True, temperature=0.8)
    assert generate(model, tokenizer, PROMPTS, sampled, seed=1) == generate(plain, tokenizer, PROMPTS, sampled, seed=1)


class TestSampling:
    how = settings_of(do_sample=True, temperature=1.5, max_batch_tokens=150)

    def test_is_decided_by_the_seed(self, policy, tokenizer):
        made = [generate(policy, tokenizer, PROMPTS, self.how, seed=seed) for seed in (3, 3, 4)]
        assert made[0] == made[1] != made[2]

    def test_draws_anew_for_every_prompt(self, policy, tokenizer):
        made = generate(policy, tokenizer, PROMPTS[:1] * 3, self.how, seed=0)
        assert len({tuple(g.token_ids) for g in made}) == 3

    @pytest.mark.parametrize("max_batch_tokens", [1, 90, 10**6])
    def test_response_does_not_depend_on_batch_size(self, policy, tokenizer, max_batch_tokens):
        how = replace(self.how, max_batch_tokens=max_batch_tokens)
        assert generate(policy, tokenizer, PROMPTS, how, seed=3) == generate(
            policy, tokenizer, PROMPTS, self.how, seed=3
        )

    def test_takes_every_seed_that_an_experiment_may_have(self, policy, tokenizer):
        assert len(generate(policy, tokenizer, PROMPTS, self.how, seed=2**32 - 1)) == len(PROMPTS)

    def test_takes_temperature_and_top_p_from_the_settings(self, policy, tokenizer):
        greedy = generate(policy, tokenizer, PROMPTS, settings_of(), seed=0)
        for nearly_greedy in ({"temperature": 1e-4}, {"top_p": 1e-6}):
            how = settings_of(do_sample=True, **nearly_greedy)
            assert generate(policy, tokenizer, PROMPTS, how, seed=0) == greedy


class TestResume:
    @pytest.mark.parametrize("do_sample", [False, True])
    @pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
    def test_from_a_file_cut_anywhere_gives_identical_responses(self, policy, tokenizer, tmp_path, share, do_sample):
        how = settings_of(do_sample=do_sample, max_batch_tokens=150)
        whole = generate(policy, tokenizer, PROMPTS, how, seed=5)
        file = tmp_path / "generations.jsonl"
        assert generate(policy, tokenizer, PROMPTS, how, seed=5, checkpoint=file) == whole
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        assert generate(policy, tokenizer, PROMPTS, how, seed=5, checkpoint=file) == whole

    def test_generates_nothing_again(self, policy, tokenizer, tmp_path, monkeypatch):
        file = tmp_path / "generations.jsonl"
        whole = generate(policy, tokenizer, PROMPTS, settings_of(), seed=0, checkpoint=file)
        monkeypatch.setattr(policy, "forward", lambda **_: pytest.fail("generated again"))
        assert generate(policy, tokenizer, PROMPTS, settings_of(), seed=0, checkpoint=file) == whole

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
        whole = generate(model, tokenizer, PROMPTS, settings_of(), seed=0, checkpoint=file)
        assert decoded == [4, 4, 4]
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:7]) + lines[7][:9])
        assert generate(model, tokenizer, PROMPTS, settings_of(), seed=0, checkpoint=file) == whole
        assert decoded[3:] == [again, 4]

    def test_progress_reports_up_to_all(self, policy, tokenizer):
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int, **_: float) -> None:
            seen.append((done, total))

        generate(policy, tokenizer, PROMPTS, settings_of(max_batch_tokens=150), seed=0, progress=progress)
        assert seen == sorted(seen)
        assert len(seen) > 2
        assert seen[-1] == (len(PROMPTS), len(PROMPTS))

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    Lfm2Config,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from helpsteer_assets.modpo.generation import decoding
from helpsteer_assets.modpo.generation.decoding import Decoding, decode

VOCABULARY = 61
NO_END = VOCABULARY
WINDOW = 5


def decoding_of(new: int, end: int, room: int, **rules: Any) -> Decoding:
    return Decoding(max_new_tokens=new, end_id=end, max_batch_tokens=room, **rules)


def config_of(kind: type[PreTrainedConfig], **own: Any) -> PreTrainedConfig:
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **own,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: config_of(LlamaConfig),
    "mistral": lambda: config_of(MistralConfig, sliding_window=WINDOW),
    "gemma2": lambda: config_of(
        Gemma2Config, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: config_of(
        Gemma3TextConfig,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # Convolutions, whose states cannot be told apart by token.
    "lfm2": lambda: config_of(Lfm2Config, layer_types=["conv", "full_attention"]),
}


@cache
def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    # sdpa refuses soft-capped attention.
    implementation = "eager" if kind == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=implementation).eval()


def prompts_of(lengths: list[int], seed: int = 0) -> dict[int, list[int]]:
    drawn = random.Random(seed)
    return {10 * place: [drawn.randrange(1, VOCABULARY) for _ in range(length)] for place, length in enumerate(lengths)}


def all_of(model: PreTrainedModel, prompts: dict[int, list[int]], how: Decoding) -> dict[int, list[int]]:
    with torch.inference_mode():
        return {index: ids for finished in decode(model, prompts, how) for index, ids in finished}


@torch.inference_mode()
def generate_alone(model: PreTrainedModel, prompt: list[int], how: Decoding) -> list[int]:
    """transformers' own greedy generate() on one prompt."""
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        eos_token_id=how.end_id,
        pad_token_id=0,
        repetition_penalty=how.repetition_penalty,
        no_repeat_ngram_size=how.no_repeat_ngram_size,
    )
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


LENGTHS = [1, 9, 3, 14, 3, 2, 11, 7, 1, 5, 16, 8]


def ending(responses: dict[int, list[int]]) -> int:
    """A token that ends some of these responses early, some late, and some not at all."""
    counts = Counter(token for ids in responses.values() for token in set(ids))
    return next(token for token, count in counts.most_common() if count < len(responses))


class TestGreedy:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_is_transformers_own_one_prompt_at_a_time(self, kind):
        model, prompts = model_of(kind), prompts_of(LENGTHS)
        free = {index: generate_alone(model, ids, decoding_of(12, NO_END, 1)) for index, ids in prompts.items()}
        end = ending(free)
        expected = {index: generate_alone(model, ids, decoding_of(12, end, 1)) for index, ids in prompts.items()}
        assert len({len(ids) for ids in expected.values()}) > 1
        for room in (1, 60, 10**6):
            assert all_of(model, prompts, decoding_of(12, end, room)) == expected

    @settings(max_examples=40, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
        seed=st.integers(0, 5),
        new=st.integers(1, 9),
        cap=st.integers(1, 120),
        end=st.integers(0, VOCABULARY),
        kind=st.sampled_from(["llama", "mistral"]),
    )
    def test_depends_on_nothing_but_the_prompt(self, lengths, seed, new, cap, end, kind):
        model, prompts = model_of(kind), prompts_of(lengths, seed)
        how = decoding_of(new, end, cap)
        assert all_of(model, prompts, how) == {i: generate_alone(model, ids, how) for i, ids in prompts.items()}

    @pytest.mark.parametrize("rule", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}], ids=str)
    @pytest.mark.parametrize("kind", ["llama", "lfm2"])
    def test_penalties_count_prompt_and_response_but_no_padding(self, kind, rule):
        model, prompts = model_of(kind), prompts_of([1, 9, 9, 4, 2])
        how = decoding_of(20, 0, 10**6, **rule)  # the end-of-text token is what padding is made of
        found = all_of(model, prompts, how)
        assert found == {index: generate_alone(model, ids, how) for index, ids in prompts.items()}
        assert found != all_of(model, prompts, decoding_of(20, 0, 10**6)), "the rule changed nothing"

    @pytest.mark.parametrize("kind", ["llama", "lfm2"])
    def test_nothing_in_the_models_generation_config_changes_how_it_decodes(self, kind, monkeypatch):
        model, prompts, how = model_of(kind), prompts_of([3, 5]), decoding_of(8, NO_END, 100)
        expected = all_of(model, prompts, how)
        likeliest = expected[0][0]
        own = GenerationConfig(
            do_sample=True,
            temperature=5.0,
            top_k=3,
            repetition_penalty=9.0,
            max_length=3,
            min_new_tokens=7,
            num_beams=2,
            suppress_tokens=[likeliest],
            eos_token_id=[likeliest, 7],
            sequence_bias=[[[7], 50.0]],
        )
        monkeypatch.setattr(model, "generation_config", own)
        assert all_of(model, prompts, how) == expected
        assert model.generation_config is own, "it is the model's own still, for who saves it"


class TestBatches:
    def rows_per_forward(self, model: PreTrainedModel, prompts: dict[int, list[int]], how: Decoding):
        """The responses, and the rows and columns of each forward pass."""
        seen: list[tuple[int, int]] = []
        forward = decoding._forward

        def spy(model: PreTrainedModel, input_ids: torch.Tensor, lengths: torch.Tensor, cache: Any) -> torch.Tensor:
            seen.append((input_ids.shape[0], cache.get_seq_length() + input_ids.shape[1]))
            return forward(model, input_ids, lengths, cache)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(decoding, "_forward", spy)
            return all_of(model, prompts, how), seen

    @settings(max_examples=30, deadline=None)
    @given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), cap=st.integers(1, 150))
    def test_stay_within_the_cap(self, lengths, cap):
        _, seen = self.rows_per_forward(model_of("llama"), prompts_of(lengths), decoding_of(7, 5, cap))
        assert all(rows * columns <= cap or rows == 1 for rows, columns in seen)


class TestSampling:
    how = decoding_of(10, 5, 10**6, do_sample=True, temperature=1.3, seed=3)

    def changed(self, **changes: Any) -> Decoding:
        return Decoding(**(vars(self.how) | changes))

    @pytest.mark.parametrize("kind", ["llama", "lfm2"])
    def test_depends_on_seed_and_index_but_not_on_the_batch(self, kind):
        model, prompts = model_of(kind), prompts_of(LENGTHS)
        together = all_of(model, prompts, self.how)
        assert together == all_of(model, prompts, self.changed(max_batch_tokens=1))
        assert together == all_of(model, prompts, self.changed(max_batch_tokens=60))
        assert together != all_of(model, prompts, self.changed(seed=4))
        assert len({tuple(ids) for ids in all_of(model, {index: [7, 8] for index in range(9)}, self.how).values()}) > 6

    @pytest.mark.parametrize("top_p", [1.0, 0.8])
    def test_has_the_distribution_that_transformers_processors_state(self, top_p):
        model, count = model_of("llama"), 6000
        how = self.changed(max_new_tokens=1, top_p=top_p)
        found = Counter(ids[0] for ids in all_of(model, {index: [7, 8, 9] for index in range(count)}, how).values())
        with torch.inference_mode():
            logits = model(torch.tensor([[7, 8, 9]])).logits[:, -1]
        warped = LogitsProcessorList([TemperatureLogitsWarper(1.3), TopPLogitsWarper(top_p)])(None, logits)
        expected = count * warped.double().softmax(-1)[0]
        counts = torch.tensor([found[token] for token in range(VOCABULARY)])
        assert counts[expected == 0].sum() == 0
        # Rare tokens together, so that each class is large enough for the chi-squared distribution.
        rare = expected < 10
        observed, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected))
        assert (~rare).sum() > 5
        assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4

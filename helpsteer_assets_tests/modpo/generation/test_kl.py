"""The KL divergence to SFT: what is drawn for it, and whether the estimate is the divergence."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpsteer_assets.modpo.generation.kl import kl_by_prompt, kl_estimate, sample_responses
from helpsteer_assets.modpo.generation.responses import Generation, generate
from helpsteer_assets.modpo.models.lending import merged
from helpsteer_assets.modpo.models.loading import load_adapters, load_model
from helpsteer_assets.modpo.models.tokenization import Sequence, encode_prompt
from helpsteer_assets.modpo.scoring.log_probs import BASE, score_sequences
from helpsteer_assets.modpo.settings import Sampling
from helpsteer_assets_tests.conftest import SENTENCES

EOS = 2
ALTERED: dict[str, Any] = {
    "temperature": 0.3,
    "top_p": 0.5,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
}
"""How answers may be generated: nothing of it may be at work in a sample."""
PROMPTS = [*SENTENCES, *(sentence.split()[0] for sentence in SENTENCES)]
Samples = list[list[Generation]]


def settings_of(**changes: Any) -> Sampling:
    return Sampling(**({"max_prompt_length": 40, "max_new_tokens": 8, **ALTERED} | changes))


@torch.no_grad()
def next_tokens(model: torch.nn.Module, tokens: list[int], continuations: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [continuations, vocabulary] of the token after each continuation, all equally long."""
    logits = model(torch.tensor([tokens + more for more in continuations])).logits[:, -1]
    return logits.double().log_softmax(-1)


def exact_kl(policy: torch.nn.Module, reference: torch.nn.Module, tokens: list[int]) -> float:
    """KL of the first two tokens, by enumerating all of them: a response may end with the first."""
    (p,), (q,) = next_tokens(policy, tokens, [[]]), next_tokens(reference, tokens, [[]])
    every = [[token] for token in range(len(p))]
    p2, q2 = next_tokens(policy, tokens, every), next_tokens(reference, tokens, every)
    seconds = (p2.exp() * (p2 - q2)).sum(-1)
    seconds[EOS] = 0
    return float((p.exp() * (p - q + seconds)).sum())


def log_ratios(model: torch.nn.Module, prompts: list[list[int]], samples: Samples) -> np.ndarray[Any, Any]:
    """[prompts, samples], as the asset scores them."""
    sequences = [
        Sequence(np.array(prompt, np.int32), np.array(sample.token_ids, np.int32))
        for prompt, drawn in zip(prompts, zip(*samples, strict=True), strict=True)
        for sample in drawn
    ]
    scored = score_sequences(model, sequences, adapters=(BASE, "policy"))
    return np.reshape(np.subtract(scored["policy"], scored[BASE]), (len(prompts), -1))


def test_the_estimate_is_the_divergence_that_enumerating_all_responses_gives(
    ending_model: PreTrainedModel, tiny_model_path: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    reference = load_model(tiny_model_path, precision="fp32")
    reference.load_state_dict(ending_model.state_dict())
    texts = PROMPTS[:4]
    prompts = [encode_prompt(tokenizer, text, 40)[0].tolist() for text in texts]
    with merged(ending_model, adapter) as policy:
        exact = [exact_kl(policy, reference, prompt) for prompt in prompts]
        samples = sample_responses(
            partial(generate, policy, tokenizer), texts, settings_of(max_new_tokens=2), 400, seed=0
        )
    found = log_ratios(load_adapters(ending_model, {"policy": adapter}), prompts, samples)
    assert {len(sample.token_ids) for row in samples for sample in row} == {1, 2}
    assert min(exact) > 0.05, "there is something to estimate"
    errors = found.std(axis=1, ddof=1) / np.sqrt(found.shape[1])
    assert (np.abs(found.mean(axis=1) - exact) < 4 * errors).all()
    assert (4 * errors < 0.7 * np.array(exact)).all(), "and it is estimated well"
    kl, _ = kl_estimate(found)
    assert abs(kl - np.mean(exact)) < 4 * np.sqrt(np.mean(errors**2) / len(errors))


def test_samples_depend_neither_on_how_answers_are_made_nor_on_the_batch_nor_on_what_follows(
    ending_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    draw = partial(sample_responses, partial(generate, ending_model, tokenizer), seed=1)
    three = draw(PROMPTS, settings_of(), 3)
    assert {sample.finish_reason for row in three for sample in row} == {"eos", "length"}
    assert draw(PROMPTS, settings_of(max_batch_tokens=1), 3) == three
    assert draw(PROMPTS[:4], settings_of(), 2) == [row[:4] for row in three[:2]]
    plain = Sampling(max_prompt_length=40, max_new_tokens=8, do_sample=True)
    assert draw(PROMPTS, plain, 3) == three
    (other,) = sample_responses(partial(generate, ending_model, tokenizer), PROMPTS, settings_of(), 1, seed=2)
    answers = generate(ending_model, tokenizer, PROMPTS, plain, seed=1)
    drawn = [[sample.token_ids for sample in row] for row in (*three, other, answers)]
    assert all(one != another for one, another in itertools.combinations(drawn, 2))


def test_a_killed_sampling_goes_on_to_the_same_samples(
    ending_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def draw() -> Samples:
        seen.clear()
        return sample_responses(
            partial(generate, ending_model, tokenizer),
            PROMPTS,
            settings_of(max_batch_tokens=120),
            3,
            seed=0,
            progress=lambda done, total, **numbers: seen.append((done, total)),
            checkpoints=tmp_path,
        )

    undisturbed = draw()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {30} and seen[-1] == (30, 30)
    _, second, third = sorted(tmp_path.iterdir())
    third.unlink()
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    assert draw() == undisturbed
    assert 10 < seen[0][0] < 20, "it went on in the middle of the second sample"


def test_the_estimate_is_the_mean_log_ratio_and_its_standard_error_comes_from_the_prompts() -> None:
    kl, error = kl_estimate([[1.0, 3.0], [4.0, 4.0], [-1.0, 1.0]])  # means 2, 4, 0
    assert (kl, error) == pytest.approx((2.0, 2.0 / np.sqrt(3)))
    assert kl_estimate([[0.5, -1.5]]) == (-0.5, None)
    by_prompt = kl_by_prompt(["b", "a", "b", "a", "c"], [1.0, -2.0, 3.0, 1.0, 0.5])
    assert list(by_prompt.items()) == [("a", -0.5), ("b", 2.0), ("c", 0.5)]

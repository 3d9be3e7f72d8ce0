"""KL divergence of a policy to the SFT model, estimated from the policy's own samples.

KL(p || q) = E_{y ~ p} [log p(y|x) - log q(y|x)]: the mean of the log-ratio over samples of p is unbiased, and may be
negative by chance (estimator k1 of Schulman, "Approximating KL divergence", 2020). This holds for samples of p itself,
so responses must be sampled without any setting that alters p.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import Sampling

if TYPE_CHECKING:
    from helpsteer_assets.modpo.generation.responses import Generation

UNALTERED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Settings under which a response is a sample of the policy itself."""

_SEEDS = 2**32
"""Upper bound of an experiment's seed."""


def sample_responses(
    answer: "Callable[..., list[Generation]]",
    prompts: Sequence[str],
    settings: Sampling,
    samples: int,
    *,
    seed: int,
    progress: Progress = silent,
    checkpoints: Path | None = None,
) -> "list[list[Generation]]":
    """Samples of the policy itself: [samples][prompts], cut at max_new_tokens.

    For each sample, all prompts are answered with another seed. So a prompt's samples are independent of each other
    and of the responses of the experiment's own seed, and more samples do not change the first ones.

    Args:
        answer: `responses.generate` or `generate_by`, without its first arguments.
        prompts: the prompts as text.
        settings: engine, lengths and room; `UNALTERED` takes the place of its other settings.
        samples: responses per prompt.
        seed: the experiment's seed.
        progress: called with the responses done, of all samples.
        checkpoints: a folder for finished responses, from which a killed sampling resumes.
    """
    unaltered = replace(settings, **UNALTERED)

    def draw(number: int) -> "list[Generation]":
        def report(done: int, total: int, **numbers: float) -> None:
            progress(number * total + done, samples * total, **numbers)

        return answer(
            prompts,
            unaltered,
            seed=seed + (number + 1) * _SEEDS,
            progress=report,
            checkpoint=None if checkpoints is None else checkpoints / f"sample_{number}.jsonl",
        )

    return [draw(number) for number in range(samples)]


def kl_estimate(log_ratios: ArrayLike) -> tuple[float, float | None]:
    """KL divergence, the mean over prompts, and its standard error, both in nats.

    Samples of one prompt are not independent, so the error is computed from the spread of the prompts' means. It is
    None for a single prompt.

    Args:
        log_ratios: [prompts, samples], log p_policy - log p_sft, nats.
    """
    means = np.asarray(log_ratios, dtype=np.float64).mean(axis=1)
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return float(means.mean()), error


def kl_by_prompt(prompt_ids: Sequence[str], log_ratios: ArrayLike) -> dict[str, float]:
    """KL(policy || SFT) in nats by sorted prompt id, from samples of the policy. Arguments have one entry per sample.

    `log_ratios` are log p_policy(y|x) - log p_sft(y|x) in nats. A sample that was cut after T tokens has the log-ratio
    of these T tokens, so capped samples give the KL of the responses' first T tokens. That is never more than the KL of
    whole responses (data-processing inequality; Cover and Thomas, "Elements of Information Theory", 2006, section 2.8):
    with capped samples, a lower bound is estimated.
    """
    names, member = np.unique(np.array(prompt_ids, dtype=str), return_inverse=True)
    means = np.bincount(member, np.asarray(log_ratios, dtype=np.float64)) / np.bincount(member)
    return dict(zip(names.tolist(), means.tolist(), strict=True))

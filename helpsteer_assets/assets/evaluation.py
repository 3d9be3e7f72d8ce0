"""Group `evaluation`: what every policy answers, how it scores, and how far it is from the SFT model.

generations.parquet and scores.parquet per policy, one row per prompt; kl.parquet per weight, one row per prompt and
sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from helpsteer_assets.assets.run import StageRun, load_sft_tokenizer, sft_model_on_loan
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.assets.stage import Metrics, stage
from helpsteer_assets.assets.training import MARGIN_REWARD
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings
from helpsteer_assets.modpo.comparison.scores import PolicyScores
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.generation.kl import kl_estimate, sample_responses
from helpsteer_assets.modpo.settings import RewardModel, Sampling
from helpsteer_assets.store.artifacts import Artifact

if TYPE_CHECKING:
    from helpsteer_assets.modpo.generation.responses import Generation
    from helpsteer_assets.modpo.scoring.raters import Rater

SCORES_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("w", pa.string()),
        ("prompt_id", pa.string()),
        ("margin_reward", pa.float64()),
        ("margin_log_ratio", pa.float64()),
        ("log_ratio_to_sft", pa.float64()),
        ("response_tokens", pa.int32()),
        ("response_words", pa.int32()),
        ("finish_reason", pa.string()),
        *((attribute, pa.float64()) for attribute in ATTRIBUTES),
    ]
)
"""Columns of scores.parquet. margin_reward is r_m before the role's sign; margin_log_ratio is unscaled."""

KL_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("w", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("log_ratio", pa.float64()),
        ("response", pa.string()),
        ("response_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
    ]
)
"""Columns of kl.parquet; its rows stand by prompt in the order of the prompts, then by sample."""


def _generation_settings(experiment: Experiment) -> tuple[str, ...]:
    """The batch counts only where rounding lets it change responses, the seed where it draws them."""
    keys = [f"generation.{key}" for key in type(experiment.generation).model_fields if key != "max_batch_tokens"]
    return (*keys, *_batch(experiment), *(("seed",) if experiment.generation.do_sample else ()))


def _batch(experiment: Experiment) -> tuple[str, ...]:
    """In fp32 the batch that a response was made in does not change it; in bf16 it may."""
    return () if experiment.model.precision == "fp32" else ("generation.max_batch_tokens",)


def _kl_settings(experiment: Experiment) -> tuple[str, ...]:
    drawn = ("generation.engine", "generation.max_prompt_length", "generation.max_new_tokens", "seed")
    return ("evaluation.kl_samples", *drawn, *_batch(experiment))


SCORE_SETTINGS = ("evaluation.rater", *MARGIN_REWARD)


@stage(
    group="evaluation",
    kinds={"pytorch", "parquet"},
    settings=_generation_settings,
    loads_model=True,
    table="generations",
    file="generations.parquet",
)
def sft_generations(run: StageRun, evaluation_prompts: Artifact, sft_model: Artifact) -> Metrics:
    """The reference policy's responses to the evaluation prompts."""
    return _generate(run, evaluation_prompts, sft_model, None)


@stage(
    group="evaluation",
    kinds={"pytorch", "parquet"},
    settings=_generation_settings,
    partitioned=True,
    loads_model=True,
    table="generations",
    file="generations.parquet",
)
def generations(run: StageRun, evaluation_prompts: Artifact, sft_model: Artifact, modpo_models: Artifact) -> Metrics:
    """One policy's responses to the evaluation prompts."""
    return _generate(run, evaluation_prompts, sft_model, modpo_models)


def _generate(run: StageRun, prompts: Artifact, sft_model: Artifact, policy: Artifact | None) -> Metrics:
    asked = prompts.table("prompts.parquet")
    with _answering(run, sft_model, policy) as answer:
        made = answer(
            asked["prompt"].to_pylist(),
            run.experiment.generation.plain(Sampling),
            seed=run.experiment.seed,
            progress=run.progress,
            checkpoint=run.checkpoints / "generations.jsonl",
        )
    columns = {
        **_named(run, policy, len(made)),
        "prompt_id": asked["prompt_id"],
        "prompt": asked["prompt"],
        "response": pa.array([g.response for g in made], pa.string()),
        "response_tokens": pa.array([len(g.token_ids) for g in made], pa.int32()),
        "finish_reason": pa.array([g.finish_reason for g in made], pa.string()),
        "prompt_truncated": pa.array([g.prompt_truncated for g in made], pa.bool_()),
        "token_ids": pa.array([g.token_ids for g in made], pa.list_(pa.int32())),
    }
    run.write(pa.table(columns), "generations.parquet")
    return {
        "responses": len(made),
        "mean_tokens": float(np.mean([len(g.token_ids) for g in made])),
        "capped": sum(g.finish_reason == "length" for g in made),
        "prompts_truncated": sum(g.prompt_truncated for g in made),
    }


def _named(run: StageRun, policy: Artifact | None, rows: int) -> dict[str, pa.Array]:
    """The columns `policy` and `w` of so many rows: a policy's, or the SFT model's."""
    return {
        "policy": pa.array(["sft" if policy is None else "modpo"] * rows, pa.string()),
        "w": pa.array([None if policy is None else run.partition] * rows, pa.string()),
    }


@contextmanager
def _answering(
    run: StageRun, sft_model: Artifact, policy: Artifact | None
) -> "Iterator[Callable[..., list[Generation]]]":
    """`generate` without its first arguments, model and tokenizer: a policy's, or None for the SFT model's."""
    from helpsteer_assets.modpo.generation.responses import generate, generate_by
    from helpsteer_assets.modpo.models.lending import merged
    from helpsteer_assets.modpo.models.loading import check_lengths

    experiment, settings = run.experiment, run.experiment.generation
    base = sft_model.path / "model"
    adapter = None if policy is None else policy.path / "adapter"
    longest = settings.max_prompt_length + settings.max_new_tokens
    check_lengths(
        base,
        longest,
        "generation.max_prompt_length + max_new_tokens",
        base=experiment.model.base,
        trust_remote_code=experiment.model.trust_remote_code,
    )
    tokenizer = load_sft_tokenizer(run, sft_model)
    if settings.engine == "vllm":
        with run.models.vllm_engine(
            base,
            precision=experiment.model.precision,
            max_length=longest,
            lora_rank=experiment.lora.r,
            trust_remote_code=experiment.model.trust_remote_code,
        ) as engine:
            yield partial(generate_by, engine.policy(adapter), tokenizer, exact=False)
    else:
        with sft_model_on_loan(run, sft_model) as model:
            with nullcontext(model) if adapter is None else merged(model, adapter) as answering:
                yield partial(generate, answering, tokenizer)


@stage(
    group="evaluation",
    kinds={"pytorch", "duckdb"},
    settings=SCORE_SETTINGS,
    loads_model=True,
    table="scores",
    file="scores.parquet",
)
def sft_scores(
    run: StageRun, sft_generations: Artifact, sft_model: Artifact, margin_adapter: Artifact | None = None
) -> Metrics:
    """How the reference policy's responses score: margin reward, length, ratings."""
    return _score(run, sft_generations, sft_model, None, margin_adapter)


@stage(
    group="evaluation",
    kinds={"pytorch", "duckdb"},
    settings=SCORE_SETTINGS,
    partitioned=True,
    loads_model=True,
    table="scores",
    file="scores.parquet",
)
def scores(
    run: StageRun,
    generations: Artifact,
    sft_model: Artifact,
    modpo_models: Artifact,
    margin_adapter: Artifact | None = None,
) -> Metrics:
    """How one policy's responses score: margin reward, log-ratio to SFT, length, ratings."""
    return _score(run, generations, sft_model, modpo_models, margin_adapter)


def _score(
    run: StageRun,
    generations: Artifact,
    sft_model: Artifact,
    policy: Artifact | None,
    margin_adapter: Artifact | None,
) -> Metrics:
    rows = generations.table("generations.parquet").to_pylist()
    log_ratios = _log_ratios(run, rows, sft_model, policy, margin_adapter)
    rater = _rater(run)
    rated: dict[str, list[float | None]] = {}
    if rater is not None:
        rated = rater([row["prompt"] for row in rows], [row["response"] for row in rows], run.progress)
    blank: list[None] = [None] * len(rows)
    margin_log_ratios = log_ratios.get("margin", blank)
    tokens = [row["response_tokens"] for row in rows]
    columns = {
        **_named(run, policy, len(rows)),
        "prompt_id": [row["prompt_id"] for row in rows],
        "margin_reward": run.experiment.margin.reward(
            np.array(margin_log_ratios, np.float64), np.array(tokens, np.float64)
        ),
        "margin_log_ratio": margin_log_ratios,
        "log_ratio_to_sft": log_ratios.get("policy", [0.0] * len(rows)),
        "response_tokens": tokens,
        "response_words": [len(row["response"].split()) for row in rows],
        "finish_reason": [row["finish_reason"] for row in rows],
        **{attribute: rated.get(attribute, blank) for attribute in ATTRIBUTES},
    }
    run.write(pa.table(columns, schema=SCORES_SCHEMA), "scores.parquet")
    return {"responses": len(rows), "rated": sorted(rated)}


def _log_ratios(
    run: StageRun,
    rows: list[dict[str, Any]],
    sft_model: Artifact,
    policy: Artifact | None,
    margin_adapter: Artifact | None,
) -> dict[str, list[float]]:
    """log p_adapter - log p_sft of generated responses, by adapter: `margin` and `policy`, those that are given."""
    from helpsteer_assets.modpo.models.loading import load_adapters, scoring_batch_tokens
    from helpsteer_assets.modpo.models.tokenization import Sequence, encode_prompts
    from helpsteer_assets.modpo.scoring.log_probs import BASE, score_sequences

    experiment = run.experiment
    adapters = {} if policy is None else {"policy": policy.path / "adapter"}
    if margin_adapter is not None:
        adapters["margin"] = margin_adapter.path / "adapter"
    if not adapters:
        return {}
    tokenizer = load_sft_tokenizer(run, sft_model)
    # The tokens that were generated, not their text tokenized again: that can differ.
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], experiment.generation.max_prompt_length)
    sequences = [
        Sequence(prompt_ids, np.array(row["token_ids"], np.int32))
        for (prompt_ids, _), row in zip(prompts, rows, strict=True)
    ]
    with sft_model_on_loan(run, sft_model) as base:
        model = load_adapters(base, adapters)
        scored = score_sequences(
            model,
            sequences,
            adapters=(BASE, *adapters),
            batch_tokens=scoring_batch_tokens(run.compute, model.device),
            progress=run.progress,
            checkpoint=run.checkpoints / "log_probs.jsonl",
        )
    return {name: [a - b for a, b in zip(scored[name], scored[BASE], strict=True)] for name in adapters}


@stage(
    group="evaluation",
    kinds={"pytorch", "parquet"},
    settings=_kl_settings,
    partitioned=True,
    loads_model=True,
    table="kl_to_sft",
    file="kl.parquet",
    exists_if=lambda experiment: experiment.evaluation.kl_samples > 0,
)
def kl_to_sft(run: StageRun, evaluation_prompts: Artifact, sft_model: Artifact, modpo_models: Artifact) -> Metrics:
    """How far one policy is from SFT: responses drawn from it as it is, each with its log-ratio to SFT.

    The mean of log p_policy - log p_sft over the policy's own samples is an unbiased estimate of KL(policy || SFT) in
    nats (k1 of Schulman, "Approximating KL divergence", 2020). Samples end at generation.max_new_tokens: it is the
    divergence of that many tokens, and of all only where none is capped.
    """
    experiment = run.experiment
    prompts = evaluation_prompts.table("prompts.parquet")
    ids, texts = prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist()
    with _answering(run, sft_model, modpo_models) as answer:
        samples = sample_responses(
            answer,
            texts,
            experiment.generation.plain(Sampling),
            experiment.evaluation.kl_samples,
            seed=experiment.seed,
            progress=run.progress,
            checkpoints=run.checkpoints,
        )
    rows = [
        {
            "prompt_id": prompt_id,
            "prompt": prompt,
            "sample": number,
            "response": sample.response,
            "response_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "token_ids": sample.token_ids,
        }
        for prompt_id, prompt, drawn in zip(ids, texts, zip(*samples, strict=True), strict=True)
        for number, sample in enumerate(drawn)
    ]
    log_ratios = _log_ratios(run, rows, sft_model, modpo_models, None)["policy"]
    columns = {**_named(run, modpo_models, len(rows)), "log_ratio": log_ratios}
    columns |= {name: [row[name] for row in rows] for name in KL_SCHEMA.names if name not in columns}
    run.write(pa.table(columns, schema=KL_SCHEMA), "kl.parquet")
    kl, standard_error = kl_estimate(np.reshape(log_ratios, (len(ids), -1)))
    return {
        "samples": len(rows),
        "capped": sum(row["finish_reason"] == "length" for row in rows),
        "kl": kl,
        "kl_standard_error": standard_error,
    }


def _rater(run: StageRun) -> "Rater | None":
    settings = run.experiment.evaluation.rater
    if settings == "none":
        return None
    from helpsteer_assets.embedded.rater import rate_all
    from helpsteer_assets.modpo.scoring.raters import RewardModelRater

    if not isinstance(settings, RewardModelSettings):
        return rate_all
    from helpsteer_assets.modpo.models.loading import choose_device

    device = choose_device(run.compute, run.experiment.model.precision)
    run.models.release_model()
    return RewardModelRater(fetch(run.experiment, "rater"), settings.plain(RewardModel), str(device))


def policy_scores(scores: Artifact, experiment: Experiment) -> PolicyScores:
    """The measures of one policy's scores.parquet."""
    table = scores.table("scores.parquet")

    def column(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return table[name].to_numpy(zero_copy_only=False).astype(np.float64)

    rated = {name: column(name) for name in ATTRIBUTES if table[name].null_count < table.num_rows}
    if len(rated) == len(ATTRIBUTES):
        rated["overall"] = np.sum(list(rated.values()), axis=0)
    reward = column("margin_reward")
    return PolicyScores(
        policy=table["policy"][0].as_py(),
        w=table["w"][0].as_py(),
        prompt_ids=table["prompt_id"].to_pylist(),
        measures={
            **rated,
            "margin_reward": reward,
            "margin": experiment.margin.sign * reward,
            "log_ratio_to_sft": column("log_ratio_to_sft"),
            "response_tokens": column("response_tokens"),
            "response_words": column("response_words"),
            "capped": np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], dtype=np.float64),
        },
    )

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
import pyarrow.parquet as pq

from helpsteer_assets.assets.run import Metrics, StageRun, load_sft_tokenizer, sft_model_on_loan
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.defs.lab import AssetDeclaration
from helpsteer_assets.defs.metadata import _describe_generations, _describe_kl, _describe_scores
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings
from helpsteer_assets.modpo.comparison.scores import PolicyScores
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.generation.kl import kl_estimate, sample_responses
from helpsteer_assets.modpo.training.margins import margin, margin_reward
from helpsteer_assets.store.artifacts import Artifact

if TYPE_CHECKING:
    from helpsteer_assets.modpo.generation.responses import Generation
    from helpsteer_assets.modpo.scoring.raters import Rater

SCORES_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("w", pa.string()),
        ("prompt_id", pa.string()),
        ("margin_log_ratio", pa.float64()),
        ("log_ratio_to_sft", pa.float64()),
        ("response_tokens", pa.int32()),
        ("response_words", pa.int32()),
        ("finish_reason", pa.string()),
        *((attribute, pa.float64()) for attribute in ATTRIBUTES),
    ]
)
"""Of scores.parquet. The margin log-ratio is unscaled: the warehouse adds margin_reward."""

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
"""Of kl.parquet: by prompt in the order of the prompts, then by sample."""


def sft_generations(run: StageRun) -> Metrics:
    """The reference policy's responses to the evaluation prompts."""
    return _generate(run)


def generations(run: StageRun) -> Metrics:
    """One policy's responses to the evaluation prompts."""
    return _generate(run)


def _generate(run: StageRun) -> Metrics:
    prompts, made = run.table("evaluation_prompts", "prompts.parquet"), _responses(run)
    columns = {
        "prompt_id": prompts["prompt_id"],
        "prompt": prompts["prompt"],
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


def _responses(run: StageRun, shard: int | None = None) -> "list[Generation]":
    """The policy's responses to the prompts of one shard, or of all; those in the checkpoints are not made again."""
    experiment = run.experiment
    with _answering(run, run.input("modpo_models") if "modpo_models" in run.inputs else None) as answer:
        return answer(
            run.table("evaluation_prompts", "prompts.parquet")["prompt"].to_pylist(),
            experiment.generation,
            seed=experiment.seed,
            progress=run.progress,
            checkpoint=run.checkpoints / "generations.jsonl",
            shards=experiment.evaluation.shards,
            shard=shard,
        )


@contextmanager
def _answering(run: StageRun, policy: Artifact | None) -> "Iterator[Callable[..., list[Generation]]]":
    """`generate` without its first arguments, model and tokenizer: a policy's, or None for the SFT model's."""
    from helpsteer_assets.modpo.generation.responses import generate, generate_by
    from helpsteer_assets.modpo.models.lending import merged
    from helpsteer_assets.modpo.models.loading import check_lengths

    experiment, settings = run.experiment, run.experiment.generation
    base = run.input("sft_model").path / "model"
    adapter = None if policy is None else policy.path / "adapter"
    longest = settings.max_prompt_length + settings.max_new_tokens
    check_lengths(experiment.model, base, longest, "generation.max_prompt_length + max_new_tokens")
    tokenizer = load_sft_tokenizer(run)
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
        with sft_model_on_loan(run) as model:
            with nullcontext(model) if adapter is None else merged(model, adapter) as answering:
                yield partial(generate, answering, tokenizer)


def sft_scores(run: StageRun) -> Metrics:
    """How the reference policy's responses score: margin reward, length, ratings."""
    return _score(run, "sft_generations", None)


def scores(run: StageRun) -> Metrics:
    """How one policy's responses score: margin reward, log-ratio to SFT, length, ratings."""
    return _score(run, "generations", run.input("modpo_models"))


def _score(run: StageRun, source: str, policy: Artifact | None) -> Metrics:
    rows = run.table(source, "generations.parquet").to_pylist()
    log_ratios = _log_ratios(run, rows, policy)
    rater = _rater(run)
    rated: dict[str, list[float | None]] = {}
    if rater is not None:
        rated = rater([row["prompt"] for row in rows], [row["response"] for row in rows], run.progress)
    blank: list[float | None] = [None] * len(rows)
    columns = {
        "policy": ["sft" if policy is None else "modpo"] * len(rows),
        "w": [None if policy is None else run.partition] * len(rows),
        "prompt_id": [row["prompt_id"] for row in rows],
        "margin_log_ratio": log_ratios.get("margin", blank),
        "log_ratio_to_sft": log_ratios.get("policy", [0.0] * len(rows)),
        "response_tokens": [row["response_tokens"] for row in rows],
        "response_words": [len(row["response"].split()) for row in rows],
        "finish_reason": [row["finish_reason"] for row in rows],
        **{attribute: rated.get(attribute, blank) for attribute in ATTRIBUTES},
    }
    run.write(pa.table(columns, schema=SCORES_SCHEMA), "scores.parquet")
    return {"responses": len(rows), "rated": sorted(rated)}


def _log_ratios(run: StageRun, rows: list[dict[str, Any]], policy: Artifact | None) -> dict[str, list[float]]:
    """log p_adapter - log p_sft of generated responses, by adapter: `margin`, `policy`, as far as there are such."""
    from helpsteer_assets.modpo.models.loading import load_adapters, scoring_batch_tokens
    from helpsteer_assets.modpo.models.tokenization import Sequence, encode_prompts
    from helpsteer_assets.modpo.scoring.log_probs import BASE, score_sequences

    experiment = run.experiment
    adapters = {} if policy is None else {"policy": policy.path / "adapter"}
    if "margin_adapter" in run.inputs:
        adapters["margin"] = run.input("margin_adapter").path / "adapter"
    if not adapters:
        return {}
    tokenizer = load_sft_tokenizer(run)
    # The tokens that were generated, not their text tokenized again: that can differ.
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], experiment.generation.max_prompt_length)
    sequences = [
        Sequence(prompt_ids, np.array(row["token_ids"], np.int32))
        for (prompt_ids, _), row in zip(prompts, rows, strict=True)
    ]
    with sft_model_on_loan(run) as base:
        model = load_adapters(base, adapters)
        scored = score_sequences(
            model,
            sequences,
            adapters=(BASE, *adapters),
            batch_tokens=scoring_batch_tokens(experiment.run, model.device),
            progress=run.progress,
            checkpoint=run.checkpoints / "log_probs.jsonl",
        )
    return {name: [a - b for a, b in zip(scored[name], scored[BASE], strict=True)] for name in adapters}


def kl_to_sft(run: StageRun) -> Metrics:
    """How far one policy is from SFT: responses drawn from it as it is, each with its log-ratio to SFT.

    The mean of log p_policy - log p_sft over the policy's own samples is an unbiased estimate of KL(policy || SFT) in
    nats (k1 of Schulman, "Approximating KL divergence", 2020). Samples end at generation.max_new_tokens: it is the
    divergence of that many tokens, and of all only where none is capped.
    """
    experiment = run.experiment
    policy, prompts = run.input("modpo_models"), run.table("evaluation_prompts", "prompts.parquet")
    with _answering(run, policy) as answer:
        samples = sample_responses(
            answer,
            prompts["prompt"].to_pylist(),
            experiment.generation,
            experiment.evaluation.kl_samples,
            seed=experiment.seed,
            progress=run.progress,
            checkpoints=run.checkpoints,
        )
    rows = [
        {
            "prompt_id": prompt_id,
            "sample": number,
            "response": sample.response,
            "finish_reason": sample.finish_reason,
            "token_ids": sample.token_ids,
        }
        for prompt_id, drawn in zip(prompts["prompt_id"].to_pylist(), zip(*samples, strict=True), strict=True)
        for number, sample in enumerate(drawn)
    ]
    return score_samples(run, rows)


def score_samples(run: StageRun, rows: list[dict[str, Any]]) -> Metrics:
    """Write kl.parquet: samples with their log-ratio to SFT.

    Args:
        run: of `kl_to_sft`.
        rows: prompt_id, sample, response, finish_reason and token_ids of each sample; by prompt, equally many of each.
    """
    prompts = run.table("evaluation_prompts", "prompts.parquet")
    texts = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    with_prompts = [{**row, "prompt": texts[row["prompt_id"]]} for row in rows]
    log_ratios = _log_ratios(run, with_prompts, run.input("modpo_models"))["policy"]
    columns = {
        "policy": ["modpo"] * len(rows),
        "w": [run.partition] * len(rows),
        "log_ratio": log_ratios,
        "response_tokens": [len(row["token_ids"]) for row in rows],
        **{
            name: [row[name] for row in rows]
            for name in ("prompt_id", "sample", "response", "finish_reason", "token_ids")
        },
    }
    run.write(pa.table({name: columns[name] for name in KL_SCHEMA.names}, schema=KL_SCHEMA), "kl.parquet")
    kl, standard_error = kl_estimate(np.reshape(log_ratios, (len({row["prompt_id"] for row in rows}), -1)))
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
    from helpsteer_assets.modpo.scoring.raters import RewardModelRater, embedded_rater

    if not isinstance(settings, RewardModelSettings):
        return embedded_rater()
    from helpsteer_assets.modpo.models.loading import choose_device

    device = choose_device(run.experiment.run, run.experiment.model.precision)
    run.models.release_model()
    return RewardModelRater(fetch(run.experiment, "rater"), settings, str(device))


def policy_scores(artifact: Artifact, experiment: Experiment) -> PolicyScores:
    """The measures of one policy's scores.parquet."""
    table = pq.read_table(artifact.file("scores.parquet"))

    def column(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return table[name].to_numpy(zero_copy_only=False).astype(np.float64)

    rated = {name: column(name) for name in ATTRIBUTES if table[name].null_count < table.num_rows}
    if len(rated) == len(ATTRIBUTES):
        rated["overall"] = np.sum(list(rated.values()), axis=0)
    log_ratios, tokens = column("margin_log_ratio"), column("response_tokens")
    return PolicyScores(
        policy=table["policy"][0].as_py(),
        w=table["w"][0].as_py(),
        prompt_ids=table["prompt_id"].to_pylist(),
        measures={
            **rated,
            "margin_reward": margin_reward(experiment.objective, log_ratios, tokens),
            "margin": margin(experiment.objective, log_ratios, tokens),
            "log_ratio_to_sft": column("log_ratio_to_sft"),
            "response_tokens": tokens,
            "response_words": column("response_words"),
            "capped": np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], dtype=np.float64),
        },
    )


def _generations_asset(compute: Any) -> AssetDeclaration:
    return AssetDeclaration(
        compute,
        "evaluation",
        {"pytorch", "parquet"},
        describe=_describe_generations,
        table="generations",
        file="generations.parquet",
        loads_model=True,
        shard=_responses,
    )


def _scores_asset(compute: Any) -> AssetDeclaration:
    return AssetDeclaration(
        compute,
        "evaluation",
        {"pytorch", "duckdb"},
        describe=_describe_scores,
        table="scores",
        file="scores.parquet",
        loads_model=True,
    )


EVALUATION_ASSETS = (
    _generations_asset(sft_generations),
    _generations_asset(generations),
    _scores_asset(sft_scores),
    _scores_asset(scores),
    AssetDeclaration(
        kl_to_sft,
        "evaluation",
        {"pytorch", "parquet"},
        describe=_describe_kl,
        table="kl_to_sft",
        file="kl.parquet",
        loads_model=True,
    ),
)

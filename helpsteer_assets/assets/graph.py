"""The graph as data: which stage reads what, which settings it depends on, and so its fingerprints.

A fingerprint is a hash of the stage's name, the versions of the code it runs, the settings it depends on and the
fingerprints of its inputs; at the roots stand the revision or content digest of the source, of the base model and of
the rater. It needs no database: two machines with the same experiment and sources compute the same fingerprints.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.experiment.settings import Experiment, is_hub_id
from helpsteer_assets.files.digests import content_digest
from helpsteer_assets.store.artifacts import ALL

CODE_VERSIONS = {
    "assets/data.py:helpsteer_ratings": 1,
    "assets/data.py:preference_pairs": 1,
    "assets/data.py:margin_pairs": 1,
    "assets/data.py:evaluation_prompts": 1,
    "assets/training.py:sft_model": 1,
    "assets/training.py:reference_log_probs": 1,
    "assets/training.py:margin_adapter": 1,
    "assets/training.py:margin_adapter_quality": 1,
    "assets/training.py:margin_rewards": 1,
    "assets/training.py:modpo_models": 1,
    "assets/evaluation.py:sft_generations": 1,
    "assets/evaluation.py:generations": 1,
    "assets/evaluation.py:sft_scores": 1,
    "assets/evaluation.py:scores": 1,
    "assets/evaluation.py:kl_to_sft": 1,
    "assets/tradeoff.py:score_summary": 2,
    "assets/tradeoff.py:tradeoff": 2,
    "assets/tradeoff.py:tradeoff_report": 1,
    "assets/loading.py": 1,
    "embedded/generator.py": 1,
    "embedded/rater.py": 1,
    "modpo/batching.py": 1,
    "modpo/comparisons.py": 2,
    "modpo/compilation.py": 1,
    "modpo/decoding.py": 1,
    "modpo/diagnostics.py": 1,
    "modpo/fronts.py": 2,
    "modpo/fused_lora.py": 1,
    "modpo/generation.py": 2,
    "modpo/kl.py": 1,
    "modpo/lending.py": 1,
    "modpo/log_prob_head.py": 1,
    "modpo/log_probs.py": 2,
    "modpo/losses.py": 1,
    "modpo/margins.py": 1,
    "modpo/models.py": 1,
    "modpo/pairs.py": 1,
    "modpo/plots.py": 3,
    "modpo/preference_trainer.py": 2,
    "modpo/raters.py": 1,
    "modpo/ratings.py": 1,
    "modpo/schedule.py": 1,
    "modpo/sft.py": 1,
    "modpo/statistics.py": 1,
    "modpo/tables.py": 1,
    "modpo/tokenization.py": 1,
    "modpo/tradeoff.py": 2,
    "modpo/training.py": 1,
    "modpo/tree_attention.py": 1,
    "modpo/trees.py": 1,
    "modpo/vllm_generation.py": 1,
    "report/__init__.py": 2,
    "report/content.py": 2,
    "report/figures.py": 1,
    "report/report.css": 2,
    "report/report.html": 2,
    "report/report.js": 2,
}
"""Version of each piece of code that determines results. Raise it when a change alters what the code computes: all
that was made by it is then out of date. A test holds a digest of each piece and asks whoever changes one."""

_PAIRS = ("modpo/pairs.py", "modpo/tables.py")
_SFT = ("assets/loading.py", "modpo/fused_lora.py", "modpo/lending.py", "modpo/models.py")
_SCORING = (
    "modpo/batching.py",
    "modpo/log_prob_head.py",
    "modpo/log_probs.py",
    "modpo/tokenization.py",
    "modpo/tree_attention.py",
    "modpo/trees.py",
)
_TRAINING = ("modpo/training.py", "modpo/schedule.py", *_SFT)
_PREFERENCE = ("modpo/compilation.py", "modpo/losses.py", "modpo/preference_trainer.py", *_TRAINING, *_SCORING)


@dataclass(frozen=True)
class Stage:
    """One asset of the graph."""

    name: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    """Dotted keys of the experiment; a section stands for all of its keys."""
    code: tuple[str, ...]
    """Keys of CODE_VERSIONS."""
    partitioned: bool = False
    """One partition per weight."""


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint with all that went into it."""

    asset: str
    partition: str
    value: str
    settings: dict[str, Any]
    code: dict[str, int]
    inputs: dict[str, dict[str, str]]
    """Fingerprints by input asset and partition."""


def stages(experiment: Experiment) -> dict[str, Stage]:
    """The graph of an experiment in topological order.

    A length penalty has no margin pairs and no margin adapter; without samples for it there is no KL divergence.
    """
    adapter = experiment.has_margin_adapter
    margin_pairs = ("margin_pairs",) if adapter else ()
    margin_adapter = ("margin_adapter",) if adapter else ()
    kl = ("kl_to_sft",) if experiment.evaluation.kl_samples else ()
    absent = {
        *(() if adapter else ("margin_pairs", "margin_adapter", "margin_adapter_quality")),
        *(() if kl else ("kl_to_sft",)),
    }
    lengths = ("model.max_length", "model.max_prompt_length")
    objective = ("objective.margin", "objective.margin_role", "objective.margin_beta", "objective.penalty")
    model = ("model.base", "model.precision", "model.trust_remote_code")
    # In fp32 the batch that a response was made in does not change it; in bf16 it may.
    batch = () if experiment.model.precision == "fp32" else ("generation.max_batch_tokens",)
    shards = ("evaluation.shards",) if batch and experiment.evaluation.shards > 1 else ()
    generation = tuple(
        f"generation.{key}" for key in type(experiment.generation).model_fields if key != "max_batch_tokens"
    )
    generation += (*batch, *shards, *(("seed",) if experiment.generation.do_sample else ()))
    sft = experiment.sft.enabled
    generating = ("modpo/generation.py", "modpo/decoding.py", *_SFT, "modpo/batching.py", "modpo/tokenization.py")
    if experiment.generation.engine == "vllm":
        generating += ("modpo/vllm_generation.py",)
    scoring = ("assets/evaluation.py:scores", "modpo/raters.py", *_SFT, *_SCORING)
    if experiment.evaluation.rater == "embedded":
        scoring += ("embedded/rater.py",)
    comparing = (
        "modpo/comparisons.py",
        "modpo/diagnostics.py",
        "modpo/fronts.py",
        "modpo/statistics.py",
        "modpo/tradeoff.py",
    )
    compared = (
        "data.preference_attribute",
        *(("data.margin_attribute",) if adapter else ()),
        "evaluation.bootstrap_samples",
        "evaluation.rater",
        "generation.do_sample",
        "seed",
        *objective,
    )

    def stage(
        name: str, inputs: tuple[str, ...], settings: tuple[str, ...], *code: str, partitioned: bool = False
    ) -> Stage:
        return Stage(name, inputs, settings, code, partitioned)

    declared = [
        stage(
            "helpsteer_ratings",
            (),
            (
                "data.source",
                "data.on_bad_rows",
                "data.validation_share",
                "data.max_train_prompts",
                "data.max_validation_prompts",
            ),
            "assets/data.py:helpsteer_ratings",
            "modpo/ratings.py",
            "modpo/tables.py",
            *(("embedded/generator.py",) if experiment.data.source == "embedded" else ()),
        ),
        stage(
            "preference_pairs",
            ("helpsteer_ratings",),
            ("data.preference_attribute", "data.selection_share"),
            "assets/data.py:preference_pairs",
            *_PAIRS,
        ),
        stage(
            "margin_pairs",
            ("helpsteer_ratings",),
            ("data.margin_attribute", "data.selection_share"),
            "assets/data.py:margin_pairs",
            *_PAIRS,
        ),
        stage(
            "evaluation_prompts",
            ("helpsteer_ratings",),
            ("evaluation.prompts",),
            "assets/data.py:evaluation_prompts",
            *_PAIRS,
        ),
        stage(
            "sft_model",
            ("preference_pairs",) if sft else (),
            (*model, "sft", "lora", "seed", *lengths) if sft else (*model, "sft.enabled"),
            "assets/training.py:sft_model",
            *(("modpo/sft.py", *_TRAINING, "modpo/tokenization.py") if sft else ("modpo/models.py",)),
        ),
        stage(
            "reference_log_probs",
            ("sft_model", "preference_pairs", *margin_pairs),
            lengths,
            "assets/training.py:reference_log_probs",
            *_PAIRS,
            *_SFT,
            *_SCORING,
        ),
        stage(
            "margin_adapter",
            ("sft_model", "margin_pairs", "reference_log_probs"),
            ("margin_adapter", "lora", "seed", *lengths),
            "assets/training.py:margin_adapter",
            "modpo/margins.py",
            "modpo/statistics.py",
            *_PREFERENCE,
        ),
        stage(
            "margin_adapter_quality",
            ("sft_model", "margin_pairs", "reference_log_probs", "margin_adapter"),
            ("data.margin_attribute", "seed", *lengths),
            "assets/training.py:margin_adapter_quality",
            "modpo/diagnostics.py",
            "modpo/statistics.py",
            *_PAIRS,
            *_SFT,
            *_SCORING,
        ),
        stage(
            "margin_rewards",
            ("sft_model", "preference_pairs", *(("reference_log_probs", "margin_adapter") if adapter else ())),
            ("objective.margin", *(lengths if adapter else ())),
            "assets/training.py:margin_rewards",
            *_PAIRS,
            *_SFT,
            *_SCORING,
        ),
        stage(
            "modpo_models",
            ("sft_model", "preference_pairs", "reference_log_probs", *margin_adapter, "margin_rewards"),
            ("objective.beta", *objective, "modpo", "lora", "seed", *lengths),
            "assets/training.py:modpo_models",
            "modpo/margins.py",
            *_PREFERENCE,
            partitioned=True,
        ),
        stage(
            "sft_generations",
            ("evaluation_prompts", "sft_model"),
            generation,
            "assets/evaluation.py:sft_generations",
            *generating,
        ),
        stage(
            "generations",
            ("evaluation_prompts", "sft_model", "modpo_models"),
            generation,
            "assets/evaluation.py:generations",
            *generating,
            partitioned=True,
        ),
        stage(
            "sft_scores",
            ("sft_generations", "sft_model", *margin_adapter),
            ("evaluation.rater",),
            "assets/evaluation.py:sft_scores",
            *scoring,
        ),
        stage(
            "scores",
            ("generations", "sft_model", "modpo_models", *margin_adapter),
            ("evaluation.rater",),
            *scoring,
            partitioned=True,
        ),
        stage(
            "kl_to_sft",
            ("evaluation_prompts", "sft_model", "modpo_models"),
            (
                "evaluation.kl_samples",
                "generation.engine",
                "generation.max_prompt_length",
                "generation.max_new_tokens",
                *batch,
                "seed",
            ),
            "assets/evaluation.py:kl_to_sft",
            "modpo/kl.py",
            *generating,
            *_SCORING,
            partitioned=True,
        ),
        stage(
            "score_summary",
            ("sft_generations", "generations", "sft_scores", "scores", *kl),
            ("evaluation.bootstrap_samples", "seed", "objective.weights", *objective),
            "assets/tradeoff.py:score_summary",
            "modpo/diagnostics.py",
            "modpo/statistics.py",
            "modpo/margins.py",
        ),
        stage(
            "tradeoff",
            ("score_summary",),
            ("name", *compared),
            "assets/tradeoff.py:tradeoff",
            *comparing,
            "modpo/plots.py",
        ),
        stage(
            "tradeoff_report",
            (
                "tradeoff",
                "score_summary",
                "sft_generations",
                "generations",
                *(("margin_adapter_quality",) if adapter else ()),
                *kl,
            ),
            (
                "name",
                "description",
                "data.source",
                "model.base",
                "objective.beta",
                "objective.weights",
                "generation.max_new_tokens",
                "generation.temperature",
                *compared,
            ),
            "assets/tradeoff.py:tradeoff_report",
            "report/__init__.py",
            "report/content.py",
            "report/figures.py",
            "report/report.css",
            "report/report.html",
            "report/report.js",
            *comparing,
            "modpo/plots.py",
        ),
    ]
    return {s.name: s for s in declared if s.name not in absent}


def partitions_of(stage: Stage, experiment: Experiment) -> list[str]:
    """The partitions of a stage's asset."""
    return list(experiment.objective.weights) if stage.partitioned else [ALL]


def fingerprints(experiment: Experiment, digest_cache: Path | None = None) -> dict[tuple[str, str], Fingerprint]:
    """The fingerprint of every asset and partition of an experiment, in topological order.

    Args:
        experiment: the experiment.
        digest_cache: a file that remembers digests of local sources by path, size and modification time.

    Raises:
        HelpsteerError: a local source, model or rater is not there.
    """
    flat = _flatten(experiment.model_dump(mode="json")) | _roots(experiment, digest_cache)
    found: dict[tuple[str, str], Fingerprint] = {}
    graph = stages(experiment)
    for stage in graph.values():
        for partition in partitions_of(stage, experiment):
            settings = _settings_of(stage, flat)
            if stage.partitioned:
                settings["w"] = partition
            inputs: dict[str, dict[str, str]] = {}
            for name in stage.inputs:
                read = _partitions_read(stage, partition, graph[name], experiment)
                inputs[name] = {p: found[name, p].value for p in read}
            code = {piece: CODE_VERSIONS[piece] for piece in stage.code}
            value = fingerprint_value(stage.name, code, settings, inputs)
            found[stage.name, partition] = Fingerprint(stage.name, partition, value, settings, code, inputs)
    return found


def fingerprint_value(
    stage: str, code: dict[str, int], settings: dict[str, Any], inputs: dict[str, dict[str, str]]
) -> str:
    """The fingerprint that stands for these versions of code, settings and inputs; also of a manifest's."""
    return _hash({"stage": stage, "code": code, "settings": settings, "inputs": inputs})


def code_version(stage: Stage, experiment: Experiment) -> str:
    """The part of a stage's fingerprint that depends neither on its inputs nor on w: Dagster's `code_version`.

    A local source counts by its path here, not by its content: every step process loads the definitions, and reading
    gigabytes of weights each time would cost more than many a step. `helpsteer status` looks at the content.
    """
    flat = _flatten(experiment.model_dump(mode="json"))
    flat |= {key: f"{source}@{revision}" for key, source, revision in experiment.hub_references().values() if revision}
    code = {piece: CODE_VERSIONS[piece] for piece in stage.code}
    return _hash({"stage": stage.name, "code": code, "settings": _settings_of(stage, flat)})


def _partitions_read(stage: Stage, partition: str, source: Stage, experiment: Experiment) -> list[str]:
    return [partition] if stage.partitioned and source.partitioned else partitions_of(source, experiment)


def _settings_of(stage: Stage, flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if any(key == wanted or key.startswith(f"{wanted}.") for wanted in stage.settings)
    }


def _roots(experiment: Experiment, digest_cache: Path | None) -> dict[str, str]:
    """What stands for a source in fingerprints: its pinned revision, or a digest of its content wherever it lies."""
    roots = {}
    for section, (key, source, revision) in experiment.hub_references().items():
        if is_hub_id(source):
            roots[key] = f"{source}@{revision}"
        elif section != "data" or source != "embedded":
            roots[key] = f"sha256:{content_digest(local_path(key, source), digest_cache)}"
    return roots


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

"""Group `training`: the reference policy, the margin adapter, and one policy per weight.

sft_model/model/ is a whole model with its tokenizer. margin_adapter/adapter/ and modpo_models/<w>/adapter/ are LoRA
adapters on it, with a model card; they load with PeftModel.from_pretrained. reference_log_probs/log_probs.parquet and
margin_rewards/margin_rewards.parquet hold one row per unique (prompt, response), computed once for all weights;
margin_adapter_quality/margin_validation.parquet one row per validation pair of the margin attribute.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpsteer_assets.assets.data import has_margin_adapter
from helpsteer_assets.assets.run import StageRun, load_sft_tokenizer, sft_model_on_loan
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.assets.stage import Inputs, Metrics, stage
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, TrainingSettings
from helpsteer_assets.modpo.comparison import margin_adapter as adapter_quality
from helpsteer_assets.modpo.comparison.plots import loss_curve, png_bytes
from helpsteer_assets.modpo.data.pairs import unique_responses
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.store.artifacts import ALL, SCRATCH, Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpsteer_assets.modpo.models.tokenization import EncodedResponses, Sequence
    from helpsteer_assets.modpo.training.loop import TrainingResult


LOSS_CURVE = "loss_curve.png"
SANITY_BOOTSTRAP_SAMPLES = 2000

LENGTHS = ("model.max_length", "model.max_prompt_length")
BASE_MODEL = ("model.base", "model.precision", "model.trust_remote_code")
MARGIN_REWARD = ("objective.margin", "objective.margin_beta", "objective.penalty")
MARGIN = (*MARGIN_REWARD, "objective.margin_role")


def _sft_settings(experiment: Experiment) -> tuple[str, ...]:
    return (*BASE_MODEL, "sft", "lora", "seed", *LENGTHS) if experiment.sft.enabled else (*BASE_MODEL, "sft.enabled")


@stage(
    group="training",
    kinds={"pytorch", "huggingface"},
    settings=_sft_settings,
    loads_model=True,
    reads_if={"preference_pairs": lambda experiment: experiment.sft.enabled},
)
def sft_model(run: StageRun, preference_pairs: Artifact | None = None) -> Metrics:
    """The base model fine-tuned on chosen responses by LoRA and merged: the reference policy of all that follows."""
    from transformers import GenerationConfig

    from helpsteer_assets.modpo.models.loading import check_lengths, load_tokenizer

    settings = run.experiment.model
    base = fetch(run.experiment, "model")
    check_lengths(
        base,
        settings.max_length,
        "model.max_length",
        base=settings.base,
        trust_remote_code=settings.trust_remote_code,
    )
    tokenizer = load_tokenizer(base, trust_remote_code=settings.trust_remote_code)
    metrics: Metrics = {}
    if preference_pairs is None:
        model = _load(run, base)
    else:
        model, metrics = _fine_tuned(run, base, tokenizer, preference_pairs.file("pairs.parquet"))
    # The base's defaults for generation play no part here, and transformers saves none that contradict each other.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    return metrics


def _load(run: StageRun, folder: Path) -> "PreTrainedModel":
    from helpsteer_assets.modpo.models.loading import choose_device, load_model

    settings = run.experiment.model
    device = choose_device(run.compute, settings.precision)
    return load_model(folder, precision=settings.precision, device=device, trust_remote_code=settings.trust_remote_code)


def _fine_tuned(
    run: StageRun, base: Path, tokenizer: "PreTrainedTokenizerBase", pairs: Path
) -> "tuple[PreTrainedModel, Metrics]":
    """The base model with a LoRA trained on the chosen responses merged into it, and how the training went."""
    from helpsteer_assets.modpo.models.loading import attach_lora, load_adapters
    from helpsteer_assets.modpo.training.sft import train_sft

    experiment = run.experiment
    train = partial(
        train_sft,
        tokenizer=tokenizer,
        train_sequences=_chosen(run, tokenizer, pairs, "train"),
        selection_sequences=_chosen(run, tokenizer, pairs, "selection"),
        settings=experiment.sft.plain(Training),
        seed=experiment.seed,
        checkpoints=run.checkpoints,
    )
    if experiment.run.train_processes > 1:
        adapter = run.folder / SCRATCH / "adapter"
        result = _train_together(run, base, train, adapter)
        policy = load_adapters(_load(run, base), {"sft": adapter})
    else:
        policy = attach_lora(_load(run, base), experiment.lora.plain(Lora), experiment.seed)
        result = train(policy, report_to=experiment.run.report_to, progress=run.progress)
    return policy.merge_and_unload(), _record(run, result)


def _chosen(run: StageRun, tokenizer: "PreTrainedTokenizerBase", pairs: Path, split: str) -> "list[Sequence]":
    """Tokens of the unique chosen responses of a split."""
    from helpsteer_assets.modpo.models.tokenization import encode_responses

    chosen = unique_responses(pairs, splits=(split,), sides=("chosen",))
    model = run.experiment.model
    return list(encode_responses(tokenizer, chosen, model.max_length, model.max_prompt_length).values())


@stage(
    group="training",
    kinds={"pytorch", "parquet"},
    settings=LENGTHS,
    loads_model=True,
    table="reference_log_probs",
    file="log_probs.parquet",
)
def reference_log_probs(
    run: StageRun, sft_model: Artifact, preference_pairs: Artifact, margin_pairs: Artifact | None = None
) -> Metrics:
    """log p_sft(y|x) and token count of every unique (prompt, response) of the pairs, computed once for all weights."""
    from helpsteer_assets.modpo.scoring.log_probs import BASE

    pair_files = [pairs.file("pairs.parquet") for pairs in (preference_pairs, margin_pairs) if pairs is not None]
    responses = unique_responses(*pair_files)
    sequences = list(_encode(run, load_sft_tokenizer(run, sft_model), responses).values())
    with sft_model_on_loan(run, sft_model) as model:
        log_probs = _log_probs(run, model, sequences, BASE)
    truncated = [sequence.truncated for sequence in sequences]
    table = responses.select(["prompt_id", "response_id"])
    table = table.append_column("log_prob", pa.array(log_probs, pa.float64()))
    table = table.append_column("response_tokens", pa.array([len(s.response_ids) for s in sequences], pa.int32()))
    run.write(table.append_column("truncated", pa.array(truncated, pa.bool_())), "log_probs.parquet")
    return {
        "responses": len(sequences),
        "truncated": sum(truncated),
        "tokens": sum(len(sequence) for sequence in sequences),
        "responses_of_pairs": 2 * sum(pq.read_metadata(file).num_rows for file in pair_files),
    }


@stage(
    group="training",
    kinds={"pytorch", "huggingface"},
    settings=("margin_adapter", "lora", "seed", *LENGTHS),
    loads_model=True,
    exists_if=has_margin_adapter,
)
def margin_adapter(
    run: StageRun, sft_model: Artifact, margin_pairs: Artifact, reference_log_probs: Artifact
) -> Metrics:
    """LoRA trained by DPO on the margin pairs; margin_beta (log p_adapter - log p_sft) is its implicit reward."""
    experiment = run.experiment
    settings = experiment.margin_adapter
    assert settings is not None  # validated with the experiment: this asset would not be there
    tokenizer = load_sft_tokenizer(run, sft_model)
    pairs = margin_pairs.file("pairs.parquet")
    validation = pq.read_table(pairs, filters=[("split", "=", "validation")])
    encoded = _encode(run, tokenizer, unique_responses(pairs, splits=("validation",)))
    reference = _reference(reference_log_probs)
    result = _train(
        run,
        sft_model,
        tokenizer,
        pairs,
        reference,
        settings,
        w=1.0,
        beta=settings.beta,
        margins=None,
        what="margin_adapter",
    )
    ratios = _margin_log_ratios(run, sft_model, run.folder / "adapter", encoded, reference, resumable=False)
    sanity, failures = adapter_quality.judge_pairs(
        validation,
        ratios,
        beta=settings.beta,
        samples=SANITY_BOOTSTRAP_SAMPLES,
        seed=experiment.seed,
    )
    return _record(run, result) | {"sanity": sanity, "worst_failures": failures}


@stage(
    group="training",
    kinds={"pytorch", "parquet"},
    settings=("data.margin_attribute", "seed", *LENGTHS),
    loads_model=True,
    table="margin_validation",
    file="margin_validation.parquet",
    exists_if=has_margin_adapter,
)
def margin_adapter_quality(
    run: StageRun,
    sft_model: Artifact,
    margin_pairs: Artifact,
    reference_log_probs: Artifact,
    margin_adapter: Artifact,
) -> Metrics:
    """Tells by validation pairs whether the margin adapter measures the attribute, or only the length."""
    experiment = run.experiment
    pairs = margin_pairs.file("pairs.parquet")
    attribute = experiment.data.margin_attribute
    validation = pq.read_table(pairs, filters=[("split", "=", "validation")])
    encoded = _encode(run, load_sft_tokenizer(run, sft_model), unique_responses(pairs, splits=("validation",)))
    adapter = margin_adapter.path / "adapter"
    log_ratios = _margin_log_ratios(run, sft_model, adapter, encoded, _reference(reference_log_probs))
    ids = {side: validation[f"{side}_id"].to_pylist() for side in ("chosen", "rejected")}
    gaps = pc.subtract(
        validation[f"chosen_{attribute}"].cast(pa.int32()), validation[f"rejected_{attribute}"].cast(pa.int32())
    )
    columns = {"pair_id": validation["pair_id"], "prompt_id": validation["prompt_id"], "rating_gap": gaps}
    for side, responses in ids.items():
        # Tokens of what is scored, which may be cut: the length that the reward can depend on.
        columns[f"{side}_tokens"] = pa.array([len(encoded[r].response_ids) for r in responses], pa.int32())
    for side, responses in ids.items():
        columns[f"{side}_log_ratio"] = pa.array([log_ratios[r] for r in responses], pa.float64())
    table = pa.table(columns)
    run.write(table, "margin_validation.parquet")
    return adapter_quality.margin_adapter_quality(
        **{name: table[name].to_numpy() for name in table.column_names if name not in ("pair_id", "prompt_id")},
        prompt_ids=table["prompt_id"].to_pylist(),
        samples=SANITY_BOOTSTRAP_SAMPLES,
        seed=experiment.seed,
    )


def _margin_reward_settings(experiment: Experiment) -> tuple[str, ...]:
    return ("objective.margin", *(LENGTHS if experiment.has_margin_adapter else ()))


@stage(
    group="training",
    kinds={"pytorch", "parquet"},
    settings=_margin_reward_settings,
    loads_model=True,
    table="margin_rewards",
    file="margin_rewards.parquet",
    reads_if={"reference_log_probs": has_margin_adapter},
)
def margin_rewards(
    run: StageRun,
    sft_model: Artifact,
    preference_pairs: Artifact,
    reference_log_probs: Artifact | None = None,
    margin_adapter: Artifact | None = None,
) -> Metrics:
    """The unscaled margin reward of every response in the preference pairs, once for all weights and roles."""
    from helpsteer_assets.modpo.models.tokenization import count_response_tokens

    responses = unique_responses(preference_pairs.file("pairs.parquet"))
    tokenizer = load_sft_tokenizer(run, sft_model)
    log_ratios: list[float] | list[None] = [None] * responses.num_rows
    if margin_adapter is not None and reference_log_probs is not None:
        adapter, encoded = margin_adapter.path / "adapter", _encode(run, tokenizer, responses)
        by_response = _margin_log_ratios(run, sft_model, adapter, encoded, _reference(reference_log_probs))
        log_ratios = list(by_response.values())
    tokens = count_response_tokens(tokenizer, responses)
    table = responses.select(["prompt_id", "response_id"])
    table = table.append_column("log_ratio", pa.array(log_ratios, pa.float64()))
    run.write(
        table.append_column(
            "response_tokens", pa.array([tokens[r] for r in responses["response_id"].to_pylist()], pa.int32())
        ),
        "margin_rewards.parquet",
    )
    return {"responses": responses.num_rows}


def adapter_gate(experiment: Experiment, inputs: Inputs) -> None:
    """Refuse to train or reuse a policy on a margin adapter that fails its check.

    Dagster's blocking check stops downstream in the same run only; a backfill goes past it. This stops every path.
    """
    adapter = inputs.get("margin_adapter")
    if isinstance(adapter, Artifact):
        sanity = adapter.manifest["metrics"]["sanity"]
        reasons = adapter_quality.judge_margin_adapter(sanity, experiment.checks.margin_adapter_min_accuracy)
        if reasons:
            raise HelpsteerError(
                "the margin adapter does not prefer chosen over rejected well enough to train on: " + "; ".join(reasons)
            )


@stage(
    group="training",
    kinds={"pytorch", "huggingface"},
    settings=("objective.beta", *MARGIN, "modpo", "lora", "seed", *LENGTHS),
    partitioned=True,
    loads_model=True,
    gate=adapter_gate,
)
def modpo_models(
    run: StageRun,
    sft_model: Artifact,
    preference_pairs: Artifact,
    reference_log_probs: Artifact,
    margin_rewards: Artifact,
    margin_adapter: Artifact | None = None,
) -> Metrics:
    """The policy of one weight: a LoRA on the SFT model, trained by MODPO; w on the preference, 1 - w on the margin."""
    from helpsteer_assets.modpo.margins import margins_by_response

    experiment = run.experiment
    result = _train(
        run,
        sft_model,
        load_sft_tokenizer(run, sft_model),
        preference_pairs.file("pairs.parquet"),
        _reference(reference_log_probs),
        experiment.modpo,
        w=float(run.partition),
        beta=experiment.objective.beta,
        margins=margins_by_response(margin_rewards.table("margin_rewards.parquet"), experiment.margin),
        what=f"w={run.partition}",
    )
    return _record(run, result)


def _encode(run: StageRun, tokenizer: "PreTrainedTokenizerBase", responses: pa.Table) -> "EncodedResponses":
    from helpsteer_assets.modpo.models.tokenization import encode_responses

    model = run.experiment.model
    return encode_responses(tokenizer, responses, model.max_length, model.max_prompt_length)


def _log_probs(
    run: StageRun, model: Any, sequences: "list[Sequence]", adapter: str, *, resumable: bool = True
) -> list[float]:
    """log p(y|x) of the sequences under one adapter, or `BASE`.

    Resumable is what a stage scores with a finished model: no other attempt has other weights.
    """
    from helpsteer_assets.modpo.models.loading import scoring_batch_tokens
    from helpsteer_assets.modpo.scoring.log_probs import score_sequences

    scored = score_sequences(
        model,
        sequences,
        adapters=(adapter,),
        batch_tokens=scoring_batch_tokens(run.compute, model.device),
        progress=run.progress,
        checkpoint=run.checkpoints / "log_probs.jsonl" if resumable else None,
    )
    return scored[adapter]


def _margin_log_ratios(
    run: StageRun,
    sft_model: Artifact,
    adapter: Path,
    encoded: "EncodedResponses",
    reference: dict[str, float],
    *,
    resumable: bool = True,
) -> dict[str, float]:
    """log p_adapter - log p_sft by response_id."""
    from helpsteer_assets.modpo.models.loading import load_adapters

    with sft_model_on_loan(run, sft_model) as base:
        model = load_adapters(base, {"margin": adapter})
        log_probs = _log_probs(run, model, list(encoded.values()), "margin", resumable=resumable)
    return {response: log_prob - reference[response] for response, log_prob in zip(encoded, log_probs, strict=True)}


def _reference(reference_log_probs: Artifact) -> dict[str, float]:
    """log p_sft by response_id."""
    table = reference_log_probs.table("log_probs.parquet")
    return dict(zip(table["response_id"].to_pylist(), table["log_prob"].to_pylist(), strict=True))


def _train(
    run: StageRun,
    sft_model: Artifact,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Path,
    reference: dict[str, float],
    settings: TrainingSettings,
    *,
    w: float,
    beta: float,
    margins: dict[str, float] | None,
    what: str,
) -> "TrainingResult":
    """Train a LoRA on the SFT model by MODPO (DPO at w = 1) and save it with its model card."""
    from helpsteer_assets.assets.model_card import model_card
    from helpsteer_assets.modpo.models.loading import attach_lora, batch_tokens, choose_device
    from helpsteer_assets.modpo.training.preference import PairDataset, train_preference

    experiment = run.experiment
    sequences = _encode(run, tokenizer, unique_responses(pairs, splits=("train", "selection")))

    def of_split(split: str) -> PairDataset:
        rows = pq.read_table(pairs, columns=["chosen_id", "rejected_id"], filters=[("split", "=", split)])
        ids = zip(rows["chosen_id"].to_pylist(), rows["rejected_id"].to_pylist(), strict=True)
        return PairDataset(list(ids), sequences, reference, margins)

    base, adapter = sft_model.path / "model", run.folder / "adapter"
    train = partial(
        train_preference,
        train_pairs=of_split("train"),
        selection_pairs=of_split("selection"),
        w=w,
        beta=beta,
        settings=settings.plain(Training),
        batch_tokens=batch_tokens(run.compute, choose_device(run.compute, experiment.model.precision)),
        seed=experiment.seed,
        what=what,
        checkpoints=run.checkpoints,
    )
    if experiment.run.train_processes > 1:
        result = _train_together(run, base, train, adapter)
    else:
        with sft_model_on_loan(run, sft_model) as model:
            policy = attach_lora(model, experiment.lora.plain(Lora), experiment.seed)
            result = train(policy, report_to=experiment.run.report_to, progress=run.progress)
            policy.save_pretrained(adapter)
    card = model_card(
        experiment,
        result,
        w=None if run.partition == ALL else run.partition,
        base=str(base),
        fingerprint=run.fingerprint,
    )
    (adapter / "README.md").write_text(card, encoding="utf-8")
    return result


def _train_together(
    run: StageRun, base: Path, train: "Callable[..., TrainingResult]", adapter: Path
) -> "TrainingResult":
    """Train a LoRA on a model in `run.train_processes` processes, which leave it in the folder `adapter`."""
    from helpsteer_assets.modpo.models.loading import choose_device
    from helpsteer_assets.modpo.training.launch import Job, require_devices, train_together

    experiment, model = run.experiment, run.experiment.model
    require_devices(run.compute, choose_device(run.compute, model.precision))
    run.models.release_model()  # the memory is theirs
    job = Job(
        base=base,
        precision=model.precision,
        trust_remote_code=model.trust_remote_code,
        lora=experiment.lora.plain(Lora),
        seed=experiment.seed,
        run=run.compute,
        train=train,
        adapter=adapter,
    )
    return train_together(job, run.folder / SCRATCH, progress=run.progress, log=run.log)


def _record(run: StageRun, result: "TrainingResult") -> Metrics:
    """Keep a training's numbers for the manifest, and draw its loss curve."""
    title = run.asset if run.partition == ALL else f"{run.asset} w={run.partition}"
    (run.folder / LOSS_CURVE).write_bytes(png_bytes(loss_curve(result.history, title)))
    return asdict(result)

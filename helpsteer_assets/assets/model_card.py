"""Model cards: the README.md of an adapter in the home and of an exported folder, from one template."""

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helpsteer_assets.experiment.settings import Experiment
    from helpsteer_assets.modpo.training.loop import TrainingResult

DATA_LICENCES = {"nvidia/HelpSteer": "cc-by-4.0", "nvidia/HelpSteer2": "cc-by-4.0", "embedded": "apache-2.0"}
"""Licences of the data sets that are known here; for others the card points to their owner's terms."""

BASE_LICENCES = {"embedded": "apache-2.0", "meta-llama/Llama-2-7b-hf": "llama2"}
"""Licences, by the hub's names for them, of the base models that are known here."""

_ATTRIBUTIONS = {
    "nvidia/HelpSteer": "Wang et al., HelpSteer: Multi-attribute Helpfulness Dataset for SteerLM (2023)",
    "nvidia/HelpSteer2": "Wang et al., HelpSteer2: Open-source dataset for training top-performing reward models "
    "(2024)",
}
_NOTICES = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
    "Reserved. Whoever passes these weights on adds a copy of that license."
}
"""Text that a licence asks for beside every model that is made from the licensed one."""

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM has kernels for."""


@dataclass(frozen=True)
class BaseModel:
    """Where an exported model comes from, as far as it is known."""

    id: str | None
    """Its id on the hub."""
    licence: str | None
    """By the hub's name for it, such as `apache-2.0`."""


def role_in_words(experiment: "Experiment", w: str) -> str:
    """The meaning of a weight: which way the margin pulls, and how much of the objective goes where."""
    preference, rest = experiment.data.preference_attribute, 1 - Decimal(w)
    if not rest:
        return f"w={w}: all of the weight is on {preference} (plain DPO)"
    return f"w={w}: {rest} of the weight {experiment.margin.pull}, {w} is on {preference}"


def model_card(
    experiment: "Experiment", result: "TrainingResult", *, w: str | None, base: str, fingerprint: str
) -> str:
    """The card of an adapter in the home: of a policy, or (without w) of the margin adapter.

    Args:
        experiment: what it was trained in.
        result: how its training went.
        w: the policy's weight; None for the margin adapter.
        base: folder of the SFT model that the adapter sits on.
        fingerprint: of the artifact that holds it.
    """
    source = experiment.model.base
    return _render(
        experiment,
        BaseModel(source, BASE_LICENCES.get(source)),
        w=w,
        merged=False,
        fingerprint=fingerprint,
        base_name=source,
        data_name=experiment.data.source,
        is_margin_adapter=w is None,
        sft_folder=base,
        training=result,
    )


def export_card(
    experiment: "Experiment",
    base: BaseModel,
    *,
    w: str | None,
    merged: bool,
    scores: list[dict[str, Any]],
    fingerprint: str,
    prompt_template: str | None,
    transformers_version: str,
) -> str:
    """The card of an exported policy. It names no path of this machine.

    Args:
        experiment: what it was trained in.
        base: the base model of its SFT model.
        w: the policy's weight; None for the SFT model.
        merged: whether the folder is one whole model; else it is an adapter with the SFT model in `base_model/`.
        scores: rows of score_summary of this policy; empty where it has not been scored.
        fingerprint: of the policy's artifact.
        prompt_template: the text that prompts are put into; None: the exported tokenizer's chat template.
        transformers_version: that wrote the files.
    """
    data = experiment.data
    return _render(
        experiment,
        base,
        w=w,
        merged=merged,
        fingerprint=fingerprint,
        base_name=base.id or _without_path(experiment.model.base, "model"),
        data_name=data.source if data.revision else _without_path(data.source, "data"),
        sft_folder="<this folder>/base_model",
        export={
            "w": w,
            "scores": scores,
            "prompt_template": prompt_template,
            "transformers_version": transformers_version,
            "lora_rank": next((rank for rank in _VLLM_RANKS if rank >= experiment.lora.r), _VLLM_RANKS[-1]),
        },
    )


def _render(
    experiment: "Experiment",
    base: BaseModel,
    *,
    w: str | None,
    merged: bool,
    is_margin_adapter: bool = False,
    **facts: Any,
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    source, tags = experiment.data.source, ["modpo", "dpo", "lora", "alignment"]
    if w is not None:
        title = f"MODPO policy, w = {w}"
    elif is_margin_adapter:
        title = f"Margin adapter for {experiment.data.margin_attribute}"
    else:
        title, tags = "SFT model of a MODPO experiment", ["sft", "alignment"]
    card_data = ModelCardData(
        license=base.licence,
        base_model=base.id,
        base_model_relation=None if base.id is None else "finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=[source] if experiment.data.revision else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        experiment=experiment,
        title=title,
        merged=merged,
        is_margin_adapter=is_margin_adapter,
        role=None if w is None else role_in_words(experiment, w),
        licence=base.licence,
        notice=_NOTICES.get(base.licence or ""),
        data_licence=DATA_LICENCES.get(source),
        attribution=_ATTRIBUTIONS.get(source),
        interval=lambda mean, low, high: f"{mean:.3g} [{low:.3g}, {high:.3g}]",
        **facts,
    )
    return f"{str(card).rstrip()}\n"


def _without_path(source: str, what: str) -> str:
    article = "a " if what == "model" else ""
    return f"the {what} shipped with helpsteer_assets" if source == "embedded" else f"{article}local {what}"

"""Model cards of adapters: what a README.md beside adapter_config.json says."""

from decimal import Decimal
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from helpsteer_assets.experiment import Experiment
    from helpsteer_assets.modpo.training import TrainingResult

DATA_LICENCES = {"nvidia/HelpSteer": "cc-by-4.0", "nvidia/HelpSteer2": "cc-by-4.0", "embedded": "apache-2.0"}
"""Licences of data sets that are known here; of others the card says that their owner's terms hold."""


def role_in_words(experiment: "Experiment", w: str) -> str:
    """What a weight means: in which direction the margin pulls, and how much of the objective goes where."""
    preference, rest = experiment.data.preference_attribute, 1 - Decimal(w)
    if not rest:
        return f"w={w}: all of the weight is on {preference} (plain DPO)"
    if experiment.has_margin_adapter:
        verb = "discourages" if experiment.objective.margin_role == "cost" else "encourages"
        pull = f"{verb} {experiment.data.margin_attribute}"
    else:
        pull = "encourages shorter responses"
    return f"w={w}: {rest} of the weight {pull}, {w} is on {preference}"


def model_card(
    experiment: "Experiment", result: "TrainingResult", *, w: str | None, base: str, fingerprint: str
) -> str:
    """The card of a policy's adapter, or (without w) of the margin adapter.

    Args:
        experiment: what it was trained in.
        result: how its training went.
        w: the policy's weight; None for the margin adapter.
        base: folder of the SFT model that the adapter sits on.
        fingerprint: what determined the artifact that holds it.
    """
    data, objective = experiment.data, experiment.objective
    licence = DATA_LICENCES.get(data.source)
    front = {
        "base_model": experiment.model.base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["modpo", "dpo", "lora", "alignment"],
    }
    if data.revision:
        front["datasets"] = [data.source]
    if w is None:
        assert experiment.margin_adapter is not None  # validated with the experiment: there would be no adapter
        title = f"Margin adapter for {data.margin_attribute}"
        what = (
            f"A LoRA trained by DPO (beta {experiment.margin_adapter.beta}) on pairs that differ in "
            f"{data.margin_attribute}. It is an implicit reward model: r(x, y) = margin_beta * (log p_adapter(y|x) - "
            "log p_sft(y|x)); it is not meant to generate."
        )
    else:
        title = f"MODPO policy, w = {w}"
        scale = (
            f"margin_beta {objective.margin_beta}" if experiment.has_margin_adapter else f"penalty {objective.penalty}"
        )
        what = (
            "A LoRA trained by multi-objective direct preference optimization (Zhou et al., Findings of ACL 2024), "
            f"beta {objective.beta}, {scale}. {role_in_words(experiment, w)}."
        )
    sft = f"fine-tuned to the SFT model in `{base}`" if experiment.sft.enabled else f"as it is, in `{base}`"
    loss = "" if result.best_loss is None else f", loss on held-out train prompts {result.best_loss:.4g}"
    best = next((row for row in result.history if row["step"] == result.best_step), {})
    accuracy = f", accuracy there {best['eval_accuracy']:.3g}" if "eval_accuracy" in best else ""
    lora = experiment.lora
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

{what}

- Base model: {experiment.model.base}, {sft}. The adapter sits on the model in that folder.
- Data: {data.source}{f" at revision {data.revision}" if data.revision else ""}
- Precision: {experiment.model.precision}; LoRA r={lora.r}, alpha={lora.alpha}; seed {experiment.seed}
- Training: {result.steps} steps, kept those up to step {result.best_step}{loss}{accuracy}
- Experiment: {experiment.name}, fingerprint {fingerprint}. All settings, inputs, versions and metrics are in the
  artifact's `manifest.json`.
- Licence of the data: {licence or "see the data's owner"}. Its terms, and the base model's, may bind this adapter.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "<this folder>")
```
"""

"""Model cards of adapters: what a README.md beside adapter_config.json says."""

from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from helpsteer_assets.experiment import Experiment
    from helpsteer_assets.modpo.training import TrainingResult

DATA_LICENCES = {"nvidia/HelpSteer": "cc-by-4.0", "nvidia/HelpSteer2": "cc-by-4.0"}
"""Licences of data sets that are known here; of others the card says that their owner's terms hold."""


def role_in_words(experiment: "Experiment", w: str) -> str:
    """What a weight means: how much of the objective goes where, and in which direction the margin pulls."""
    preference, rest = experiment.data.preference_attribute, f"{1 - float(w):.10g}"
    if not experiment.has_margin_adapter:
        return f"w={w}: {w} of the weight on {preference}, {rest} on shorter responses (length penalty)"
    verb = "discourages" if experiment.objective.margin_role == "cost" else "encourages"
    return f"w={w}: {w} of the weight on {preference}; {rest} of the weight {verb} {experiment.data.margin_attribute}"


def model_card(experiment: "Experiment", result: "TrainingResult", *, w: str | None, base: str) -> str:
    """The card of a policy's adapter, or (without w) of the margin adapter.

    Args:
        experiment: what it was trained in.
        result: how its training went.
        w: the policy's weight; None for the margin adapter.
        base: folder of the SFT model that the adapter sits on.
    """
    data, objective = experiment.data, experiment.objective
    licence = DATA_LICENCES.get(data.source)
    front = {
        "base_model": experiment.model.base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["modpo", "dpo", "lora", "alignment"],
    } | ({"datasets": [data.source], "license": licence} if licence else {})
    if w is None:
        title = f"Margin adapter for {data.margin_attribute}"
        what = (
            f"A LoRA trained by DPO (beta {experiment.margin_adapter and experiment.margin_adapter.beta}) on pairs that "
            f"differ in {data.margin_attribute}. It is an implicit reward model: r(x, y) = margin_beta * (log p_adapter(y|x) - "
            "log p_sft(y|x)); it is not meant to generate."
        )
    else:
        title = f"MODPO policy, w = {w}"
        scale = (
            f"margin_beta {objective.margin_beta}" if experiment.has_margin_adapter else f"penalty {objective.penalty}"
        )
        what = (
            f"A LoRA trained by multi-objective direct preference optimization (Zhou et al., Findings of ACL 2024), beta "
            f"{objective.beta}, {scale}. {role_in_words(experiment, w)}."
        )
    loss = "" if result.best_loss is None else f", loss on held-out train prompts {result.best_loss:.4g}"
    accuracy = next((row["eval_accuracy"] for row in reversed(result.history) if "eval_accuracy" in row), None)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

{what}

- Base model: {experiment.model.base}, fine-tuned to the SFT model in `{base}`. The adapter sits on the SFT model.
- Data: {data.source}{f" at revision {data.revision}" if data.revision else ""}
- Precision: {experiment.model.precision}; LoRA r={experiment.lora.r}, alpha={experiment.lora.alpha}; seed {experiment.seed}
- Training: {result.steps} steps, the best at step {result.best_step}{loss}\
{"" if accuracy is None else f", last accuracy there {accuracy:.3g}"}
- Experiment: {experiment.name}. The fingerprint is the name of the folder that holds this artifact; all settings,
  inputs, versions and metrics are in its `manifest.json`.
- Licence of the data: {licence or "see the data's owner; its terms may bind this model"}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "<this folder>")
```
"""

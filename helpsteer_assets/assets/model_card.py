"""Model cards: what the README.md of an adapter in the home says, and that of an exported policy."""

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from helpsteer_assets.experiment.settings import Experiment
    from helpsteer_assets.modpo.training.loop import TrainingResult

DATA_LICENCES = {"nvidia/HelpSteer": "cc-by-4.0", "nvidia/HelpSteer2": "cc-by-4.0", "embedded": "apache-2.0"}
"""Licences of data sets that are known here; of others the card says that their owner's terms hold."""

BASE_LICENCES = {"embedded": "apache-2.0", "meta-llama/Llama-2-7b-hf": "llama2"}
"""Licences, by the hub's names for them, of base models that are known here."""

_ATTRIBUTIONS = {
    "nvidia/HelpSteer": "Wang et al., HelpSteer: Multi-attribute Helpfulness Dataset for SteerLM (2023)",
    "nvidia/HelpSteer2": "Wang et al., HelpSteer2: Open-source dataset for training top-performing reward models "
    "(2024)",
}
_NOTICES = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
    "Reserved. Whoever passes these weights on adds a copy of that license."
}
"""What a licence wants to be said beside a model made from the licensed one."""


@dataclass(frozen=True)
class BaseModel:
    """Where an exported model comes from, as far as it is known."""

    id: str | None
    """Its id on the hub."""
    licence: str | None
    """By the hub's name for it, such as `apache-2.0`."""


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
    """The card of an exported policy, with the YAML that the hub reads. It names no path of this machine.

    Args:
        experiment: what it was trained in.
        base: the base model of its SFT model.
        w: the policy's weight; None for the SFT model.
        merged: whether the folder is one whole model; else it is an adapter with the SFT model in `base_model/`.
        scores: rows of score_summary of this policy; empty where it has not been scored.
        fingerprint: of the policy's artifact.
        prompt_template: what prompts are put into; None: the exported tokenizer's chat template.
        transformers_version: that wrote the files.
    """
    data = experiment.data
    title = "SFT model of a MODPO experiment" if w is None else f"MODPO policy, w = {w}"
    parts = [
        f"---\n{yaml.safe_dump(_export_front(experiment, base, w, merged), sort_keys=False).strip()}\n---",
        f"# {title}",
        _what_it_is(experiment, w),
        "## Use",
        _use(experiment, w, merged, prompt_template, transformers_version),
        "## How it answers",
        _how_it_answers(experiment, prompt_template),
        "## Scores",
        _scores_table(experiment, scores),
        "## Origin",
        "\n".join(
            [
                f"- Base model: {base.id or _local(experiment.model.base, 'model')}"
                + (f" at revision {experiment.model.revision}" if experiment.model.revision else "")
                + ("" if experiment.sft.enabled else ", as it is"),
                f"- Data: {_data_name(experiment)}" + (f" at revision {data.revision}" if data.revision else ""),
                f"- Experiment {experiment.name}, seed {experiment.seed}, precision {experiment.model.precision}, LoRA "
                f"r={experiment.lora.r} alpha={experiment.lora.alpha}; fingerprint {fingerprint}",
                "- All settings, inputs, versions and digests: `provenance.json`",
            ]
        ),
        "## Licences",
        _licences(experiment, base),
    ]
    return "\n\n".join(parts) + "\n"


def _export_front(experiment: "Experiment", base: BaseModel, w: str | None, merged: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"license": base.licence} if base.licence else {}
    if base.id:
        front |= {"base_model": base.id, "base_model_relation": "finetune" if merged else "adapter"}
    front |= {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "alignment"] if w is None else ["modpo", "dpo", "lora", "alignment"],
    }
    if experiment.data.revision:
        front["datasets"] = [experiment.data.source]
    return front


def _what_it_is(experiment: "Experiment", w: str | None) -> str:
    if w is None:
        made = (
            "The base model fine-tuned on the preferred responses"
            if experiment.sft.enabled
            else "The base model, as it is"
        )
        return f"{made}: the reference policy that the MODPO policies of the experiment are held to."
    objective = experiment.objective
    scale = f"margin_beta {objective.margin_beta}" if experiment.has_margin_adapter else f"penalty {objective.penalty}"
    return (
        "A policy trained by multi-objective direct preference optimization (Zhou et al., [Beyond One-Preference-Fits-"
        f"All Alignment](https://arxiv.org/abs/2310.03708), Findings of ACL 2024), beta {objective.beta}, {scale}. "
        f"{role_in_words(experiment, w)}."
    )


def _use(experiment: "Experiment", w: str | None, merged: bool, prompt_template: str | None, version: str) -> str:
    if merged:
        loading = 'model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")'
        imports, serving = "", "vllm serve <this folder>"
        where = "`<this folder>` is a local path, or the id of the repository on the hub."
    else:
        imports = "from peft import PeftModel\n"
        loading = (
            'base = AutoModelForCausalLM.from_pretrained("<this folder>/base_model", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "<this folder>")'
        )
        # The ranks that vLLM has kernels for.
        rank = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= experiment.lora.r), 512)
        serving = (
            f"vllm serve <this folder>/base_model --enable-lora --max-lora-rank {rank} --lora-modules "
            f"w{w}=<this folder>"
        )
        where = (
            "`<this folder>` is a local path; from the hub, `huggingface_hub.snapshot_download` gives one. The adapter "
            "sits on the SFT model in `base_model/`, not on the base model that this was made from."
        )
    prompt = (
        'messages = [{"role": "user", "content": "..."}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)"
        if prompt_template is None
        else f'inputs = tokenizer({prompt_template!r}.format(prompt="..."), return_tensors="pt")'
    )
    return f"""```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

{loading}
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
{prompt}
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
{serving}
```

{where} Written with transformers {version}; an older major version may read it otherwise. vLLM was not run on it."""


def _how_it_answers(experiment: "Experiment", prompt_template: str | None) -> str:
    settings = experiment.generation
    how = (
        f"sampled at temperature {settings.temperature}, top_p {settings.top_p}"
        if settings.do_sample
        else "greedy (vLLM reads no such setting from the file: ask it for `temperature=0`)"
    )
    extra = [f"repetition_penalty {settings.repetition_penalty}"] if settings.repetition_penalty != 1 else []
    extra += [f"no_repeat_ngram_size {settings.no_repeat_ngram_size}"] if settings.no_repeat_ngram_size else []
    template = (
        "the chat template"
        if prompt_template is None
        else f"the template `{prompt_template!r}` (there is no chat template)"
    )
    return (
        f"`generation_config.json` holds the settings of the evaluation: {', '.join([how, *extra])}, at most "
        f"{settings.max_new_tokens} new tokens. There, a prompt was one user turn in {template}, and of a longer one "
        f"the last {settings.max_prompt_length} tokens were kept."
    )


def _scores_table(experiment: "Experiment", scores: list[dict[str, Any]]) -> str:
    if not scores:
        return "Not scored with the experiment's present settings when it was exported."
    lines = ["| measure | mean | difference to SFT |", "|---|---|---|"]
    for row in scores:
        mean = _interval(row["mean"], row["ci_low"], row["ci_high"])
        delta = "" if row["delta"] is None else _interval(row["delta"], row["delta_low"], row["delta_high"])
        lines.append(f"| {row['measure']} | {mean} | {delta} |")
    rater = experiment.evaluation.rater
    rated = {"none": "nobody rated the responses", "embedded": "rated by the rules of the generated data"}
    by = rated[rater] if isinstance(rater, str) else "rated by a reward model"
    return "\n".join(
        [*lines, "", f"Over {scores[0]['n']} held-out prompts, {by}; in brackets 95% bootstrap intervals over prompts."]
    )


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _local(source: str, what: str) -> str:
    article = "a " if what == "model" else ""
    return f"the {what} shipped with helpsteer_assets" if source == "embedded" else f"{article}local {what}"


def _data_name(experiment: "Experiment") -> str:
    source = experiment.data.source
    return source if experiment.data.revision else _local(source, "data")


def _licences(experiment: "Experiment", base: BaseModel) -> str:
    source = experiment.data.source
    lines = [
        f"- Made from {base.id or _local(experiment.model.base, 'model')}: {base.licence or 'its own licence holds'}."
        + (f" {_NOTICES[base.licence]}" if base.licence in _NOTICES else "")
    ]
    licence = DATA_LICENCES.get(source)
    if source in _ATTRIBUTIONS:
        lines.append(
            f"- Trained on [{source}](https://huggingface.co/datasets/{source}) by NVIDIA "
            f"({_ATTRIBUTIONS[source]}), licensed under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), "
            "which asks for this attribution. Changed: rows were made into pairs by their ratings, and long texts cut."
        )
    else:
        lines.append(f"- Trained on {_data_name(experiment)}: {licence or 'its terms may bind these weights'}.")
    return "\n".join(lines)

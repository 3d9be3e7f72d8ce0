"""Greedy responses of one policy to the same prompts, in fp32 on a CPU.

The reference procedure: transformers' generate(), four prompts at a time in the given order, padded to the longest of
them, each batch until its last response ends, the adapter beside the weights.
"""

import itertools
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.models import SMOLLM2, draw_lora, load_base, smollm2_folder
from benchmarks.setting import Setting
from benchmarks.timing import compared, interleave
from helpsteer_assets.modpo.generation.decoding import Decoding, decode
from helpsteer_assets.modpo.models.lending import merged

BATCH = 4
"""Prompts that the reference procedure decodes together."""
END = 2
CPU = torch.device("cpu")

Prompts = dict[int, list[int]]
Responses = dict[int, list[int]]


@dataclass(frozen=True)
class Case:
    """Lengths in tokens."""

    prompts: tuple[int, int]
    """Shortest and longest prompt."""
    max_new_tokens: int
    ending: bool
    """Whether responses end by themselves, at varied lengths, or all run to max_new_tokens."""


CASES = {
    "decode-bound, varied lengths": Case((8, 32), 80, True),
    "decode-bound, equal lengths": Case((8, 32), 40, False),
    "prefill-bound, varied lengths": Case((60, 300), 16, True),
}


def run(setting: Setting) -> dict[str, Any]:
    """The cases, on the random model of eight layers; the long form has more of them, more prompts, and SmolLM2."""
    prompts, rounds = (96, 3) if setting.long else (16, 1)
    cases = {name: case for name, case in CASES.items() if setting.long or case.ending}
    models = ["body8", *([SMOLLM2] if setting.long and smollm2_folder() is not None else [])]
    return {
        "rows": [
            {"model": model, "case": name} | compare(model, case, prompts // (2 if model == SMOLLM2 else 1), rounds)
            for model in models
            for name, case in cases.items()
        ]
    }


def compare(name: str, case: Case, count: int, rounds: int) -> dict[str, Any]:
    """Both on the same `count` prompts and adapter, in turns; seconds are those of a prompt."""
    base, attached = load_base(name, CPU, "fp32"), load_base(name, CPU, "fp32")
    if name != SMOLLM2:
        for model in (base, attached):
            _make_lively(model)
    drawn = random.Random(0)
    prompts = {
        index: [drawn.randrange(10, base.config.vocab_size) for _ in range(drawn.randint(*case.prompts))]
        for index in range(count)
    }
    end = END if case.ending else base.config.vocab_size  # a token that no model says
    responses: dict[str, Responses] = {}
    with TemporaryDirectory() as folder:
        _make_adapter(name, Path(folder))
        policy = PeftModel.from_pretrained(attached, folder).eval()

        def reference() -> None:
            responses["reference"] = reference_responses(policy, prompts, case.max_new_tokens, end)

        def own() -> None:
            responses["ours"] = our_responses(base, Path(folder), prompts, case.max_new_tokens, end)

        timed = interleave({"reference": reference, "ours": own}, rounds, CPU)
    lengths = [len(responses["ours"][index]) for index in prompts]
    return {
        "prompts": count,
        "tokens_per_prompt": statistics.mean(map(len, prompts.values())),
        "tokens_per_response": statistics.mean(lengths),
        "longest_response_of_a_batch": statistics.mean(
            max(lengths[start : start + BATCH]) for start in range(0, count, BATCH)
        ),
        **compared(timed, count),
        "identical_responses": sum(responses["ours"][index] == responses["reference"][index] for index in prompts),
    }


@torch.inference_mode()
def reference_responses(policy: PeftModel, prompts: Prompts, max_new_tokens: int, end: int) -> Responses:
    """By the reference procedure."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0, bos_token_id=None
    )
    policy.base_model.model.generation_config = GenerationConfig()  # nothing but the rules above
    responses: Responses = {}
    order = iter(prompts.items())
    while batch := list(itertools.islice(order, BATCH)):
        width = max(len(ids) for _, ids in batch)
        padding = [width - len(ids) for _, ids in batch]
        output = policy.generate(
            input_ids=torch.tensor([[0] * pad + ids for pad, (_, ids) in zip(padding, batch, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            generation_config=config,
        )
        for (index, _), ids in zip(batch, output[:, width:].tolist(), strict=True):
            responses[index] = ids[: ids.index(end) + 1] if end in ids else ids
    return responses


@torch.inference_mode()
def our_responses(base: PreTrainedModel, adapter: Path, prompts: Prompts, max_new_tokens: int, end: int) -> Responses:
    """By ours, merging and putting back the weights included."""
    how = Decoding(max_new_tokens=max_new_tokens, end_id=end, max_batch_tokens=16384)
    with merged(base, adapter) as policy:
        return {index: ids for finished in decode(policy, prompts, how) for index, ids in finished}


def _make_lively(model: PreTrainedModel) -> None:
    """Change random weights so that responses do not run in circles, and one token of some thirty ends them."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.weight *= 4
        head.weight[END] *= 2.2


def _make_adapter(name: str, folder: Path) -> None:
    """A LoRA on every linear layer that differs from the base as a trained one does."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(name, CPU, "fp32"), lora)
    draw_lora(model)
    model.save_pretrained(folder)

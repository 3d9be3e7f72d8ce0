"""The exported model, as transformers and PEFT read it in a process without this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers, processors

from helpsteer_assets.commands.exported_model import give_chat_template, merge_exactly
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE, encode_prompt
from helpsteer_assets_tests.commands.conftest import take
from helpsteer_assets_tests.conftest import make_tokenizer
from helpsteer_assets_tests.finished import Finished


def run_offline(code: str, *arguments: object) -> Any:
    """The JSON that a process prints which has neither this package nor the hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOG_PROBS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
merged, adapter, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))

model = AutoModelForCausalLM.from_pretrained(merged)
tokenizer = AutoTokenizer.from_pretrained(merged)

base = AutoModelForCausalLM.from_pretrained(f"{adapter}/base_model")
policy = PeftModel.from_pretrained(base, adapter)

def score(model):
    scores = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([prompt + row["token_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return scores

result = {"merged": score(model), "adapter": score(policy)}
with policy.disable_adapter():
    result["base"] = score(policy)
result["tokenizers"] = AutoTokenizer.from_pretrained(adapter).get_vocab() == tokenizer.get_vocab()
print(json.dumps(result))
"""


def test_both_forms_load_in_transformers_and_peft_and_score_as_the_evaluation_did(
    model: Path, adapter: Path, finished_home: Finished, tmp_path: Path
) -> None:
    rows = finished_home.artifact("generations", "0.1").table("generations.parquet").to_pylist()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = run_offline(LOG_PROBS, model, adapter, tmp_path / "rows.json")
    assert result["tokenizers"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base_model", "a path: as an id it could be somebody's model"
    written, settings = json.loads((model / "generation_config.json").read_text()), finished_home.experiment.generation
    assert (written["temperature"], written["top_p"], written["top_k"]) == (settings.temperature, settings.top_p, 0)
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-3)
    scores = finished_home.artifact("scores", "0.1").table("scores.parquet")
    ratios = [policy - base for policy, base in zip(result["merged"], result["base"], strict=True)]
    assert ratios == pytest.approx(scores["log_ratio_to_sft"].to_pylist(), abs=1e-3)
    assert max(map(abs, ratios)) > 0.01, "the adapter does something"


GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for prompt in json.loads(sys.argv[2]):
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs)
    answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps({"answers": answers, "cache": model.config.use_cache}))
"""


def test_transformers_answers_as_the_evaluation_did(copied: Callable[..., Finished], tmp_path: Path) -> None:
    finished = copied(generation={"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.1})
    assert finished.run(select="generations", weights=["0.9"]), finished.announced
    rows = finished.artifact("generations", "0.9").table("generations.parquet").to_pylist()
    folder = take(finished, tmp_path / "greedy", "w=0.9").folder
    result = run_offline(GENERATE, folder, json.dumps([row["prompt"] for row in rows]))
    assert result["answers"] == [row["response"] for row in rows]
    assert result["cache"], "training had switched the cache off"


def test_merging_rounds_once(tiny_model_path: Path, tmp_path: Path) -> None:
    lora = load_experiment("demo").lora
    base = load_model(tiny_model_path, precision="bf16")
    peft_model = attach_lora(load_model(tiny_model_path, precision="bf16"), lora, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = {name: weight.clone() for name, weight in base.named_parameters()}
    merged = dict(merge_exactly(base, tmp_path).named_parameters())
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s.weight"
        if key % "A" in tensors:
            delta = tensors[key % "B"].float() @ tensors[key % "A"].float() * (lora.alpha / lora.r)
            assert not torch.equal(merged[name], weight)
            assert torch.equal(merged[name], (weight.float() + delta).bfloat16())
        else:
            assert torch.equal(merged[name], weight)


# The chat template


@pytest.mark.parametrize("begin", [False, True])
def test_a_tokenizer_without_chat_template_gets_the_one_of_training(begin: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    if begin:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    prompt = "How do I\nfold a 'shirt' {{ now }}?"
    expected = encode_prompt(tokenizer, prompt, 1000)[0].tolist()
    assert (expected[0] == 1) == begin
    assert give_chat_template(tokenizer) is None
    tokenizer.save_pretrained(tmp_path)
    read = type(tokenizer).from_pretrained(tmp_path)
    messages = [{"role": "user", "content": prompt}]
    assert read.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == expected


def test_no_chat_template_is_given_where_tokens_would_differ(tokenizer: Any) -> None:
    other = make_tokenizer(chat_template=None)
    backend = other.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first"), backend.pre_tokenizer]
    )
    assert give_chat_template(other) == FALLBACK_TEMPLATE and other.chat_template is None
    before = tokenizer.chat_template
    assert give_chat_template(tokenizer) is None and tokenizer.chat_template == before

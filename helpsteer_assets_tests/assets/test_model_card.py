"""Both model cards: what the hub reads in them, and what they tell a reader."""

from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpsteer_assets.assets.model_card import BaseModel, export_card, model_card
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.training.loop import TrainingResult

RESULT = TrainingResult(
    steps=40,
    best_step=20,
    best_loss=0.61234,
    resumed_from=None,
    history=[
        {"step": 20, "loss": 0.7, "eval_loss": 0.61234, "eval_accuracy": 0.71},
        {"step": 40, "loss": 0.6, "eval_loss": 0.7, "eval_accuracy": 0.55},
    ],
)
LLAMA = BaseModel("meta-llama/Llama-2-7b-hf", "llama2")
SCORE: dict[str, Any] = {"measure": "helpfulness", "n": 300, "mean": 2.5, "ci_low": 2.41, "ci_high": 2.59}
SCORE |= {"delta": -0.2, "delta_low": -0.3, "delta_high": -0.1}


def changed(name: str = "helpsteer", **sections: dict[str, Any]) -> Experiment:
    data = load_experiment(name).model_dump()
    for section, changes in sections.items():
        data[section] |= changes
    return Experiment.model_validate(data)


HELPSTEER = changed()
PENALTY = changed(
    "demo", objective={"margin": "length_penalty", "margin_role": None, "margin_beta": None, "penalty": 0.01}
)


def adapter_card(experiment: Experiment, w: str | None = "0.2", result: TrainingResult = RESULT) -> str:
    return model_card(experiment, result, w=w, base="/home/sft/model", fingerprint="f00d")


def exported_card(experiment: Experiment, base: BaseModel = LLAMA, **changes: Any) -> str:
    facts: dict[str, Any] = {"w": "0.2", "merged": True, "scores": [SCORE], "fingerprint": "f00d"}
    facts |= {"prompt_template": None, "transformers_version": "5.23.0"}
    return export_card(experiment, base, **(facts | changes))


@pytest.mark.parametrize(
    ("experiment", "w", "words"),
    [
        (HELPSTEER, "0.1", "w=0.1: 0.9 of the weight discourages verbosity, 0.1 is on helpfulness"),
        (changed(objective={"margin_role": "reward"}), "0.1", "w=0.1: 0.9 of the weight encourages verbosity"),
        (PENALTY, "0.3", "w=0.3: 0.7 of the weight encourages shorter responses"),
        (HELPSTEER, "1", "w=1: all of the weight is on helpfulness (plain DPO)"),
    ],
)
def test_a_weight_is_told_in_words(experiment: Experiment, w: str, words: str) -> None:
    for card in (adapter_card(experiment, w), exported_card(experiment, w=w)):
        assert f"# MODPO policy, w = {w}\n" in card and words in card


def test_both_cards_tell_objective_origin_and_licences() -> None:
    for card in (adapter_card(HELPSTEER), exported_card(HELPSTEER)):
        assert "beta 0.1, margin_beta 0.1" in card
        assert f"- Base model: {LLAMA.id} at revision {HELPSTEER.model.revision}\n" in card
        assert f"- Data: nvidia/HelpSteer at revision {HELPSTEER.data.revision}\n" in card
        assert "seed 42, precision bf16, LoRA r=16 alpha=32; fingerprint f00d" in card
        assert f"Made from {LLAMA.id}: llama2. Llama 2 is licensed under the LLAMA 2 Community License" in card
        assert "https://huggingface.co/datasets/nvidia/HelpSteer) by NVIDIA (Wang et al., HelpSteer:" in card
        assert "https://creativecommons.org/licenses/by/4.0/" in card and "Changed:" in card
    assert "beta 0.2, penalty 0.01" in adapter_card(PENALTY)


def test_the_hub_reads_base_licence_library_and_data() -> None:
    data = ModelCard(exported_card(HELPSTEER)).data.to_dict()
    assert data == {
        "license": "llama2",
        "base_model": LLAMA.id,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["modpo", "dpo", "lora", "alignment"],
        "datasets": ["nvidia/HelpSteer"],
    }
    for card in (adapter_card(HELPSTEER), exported_card(HELPSTEER, merged=False)):
        adapter = {"base_model_relation": "adapter", "library_name": "peft"}
        assert ModelCard(card).data.to_dict() == data | adapter
    assert ModelCard(exported_card(HELPSTEER, w=None)).data.tags == ["sft", "alignment"]


def test_a_card_in_the_home_tells_how_the_training_went_and_how_to_load_the_adapter() -> None:
    card = adapter_card(HELPSTEER)
    assert "the weights of step 20 were kept, loss on held-out train prompts 0.6123, accuracy there 0.71\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("/home/sft/model"' in card
    assert 'PeftModel.from_pretrained(base, "<this folder>")\n```' in card
    unjudged = TrainingResult(steps=4, best_step=4, best_loss=None, resumed_from=None, history=[{"step": 4}])
    assert "- Training: 4 steps; the weights of step 4 were kept\n" in adapter_card(HELPSTEER, result=unjudged)


def test_a_model_that_is_no_policy_is_called_what_it_is() -> None:
    reward = adapter_card(HELPSTEER, w=None)
    assert "# Margin adapter for verbosity\n" in reward and "not meant to generate" in reward
    assert "The base model fine-tuned on the preferred responses" in exported_card(HELPSTEER, w=None)
    assert "The base model, as it is: the" in exported_card(changed(sft={"enabled": False}), w=None)


def test_local_sources_are_named_without_their_path_and_nothing_is_guessed_of_them() -> None:
    source = {"source": "/home/alice/ratings", "revision": None}
    local = changed(data=source, model={"base": "/home/alice/model", "revision": None})
    card = exported_card(local, BaseModel(None, None))
    assert "alice" not in card
    assert "Made from a local model: its own licence holds." in card
    assert "Trained on local data: its terms may bind these weights." in card
    assert not {"license", "base_model", "base_model_relation", "datasets"} & ModelCard(card).data.to_dict().keys()


def test_an_exported_card_tells_scores_and_how_to_generate() -> None:
    card = exported_card(HELPSTEER, scores=[SCORE, SCORE | {"measure": "verbosity", "delta": None}])
    rows = ["| helpfulness | 2.5 [2.41, 2.59] | -0.2 [-0.3, -0.1] |", "| verbosity | 2.5 [2.41, 2.59] |  |", ""]
    assert "\n".join([*rows, "Over 300 held-out prompts"]) in card
    assert "greedy (vLLM reads no such setting" in card and "the last 1536 tokens were kept" in card
    sampled = changed(generation={"do_sample": True, "temperature": 0.7, "no_repeat_ngram_size": 3}, lora={"r": 20})
    card = exported_card(sampled, scores=[], merged=False, prompt_template="Q: {prompt}\n")
    assert "Not scored" in card
    assert "sampled at temperature 0.7, top_p 1.0, no_repeat_ngram_size 3, at most" in card
    assert r"""tokenizer('Q: {prompt}\n'.format(prompt="..."), return_tensors="pt")""" in card
    assert "there is no chat template" in card and "apply_chat_template" not in card
    # vLLM has kernels for 16 and 32.
    assert "--enable-lora --max-lora-rank 32 --lora-modules w0.2=<this folder>" in card

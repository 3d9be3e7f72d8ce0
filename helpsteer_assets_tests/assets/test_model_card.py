"""Both model cards: what the hub reads in them, and what they tell a reader."""

from typing import Any

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


def test_local_sources_are_named_without_their_path_and_nothing_is_guessed_of_them() -> None:
    source = {"source": "/home/alice/ratings", "revision": None}
    local = changed(data=source, model={"base": "/home/alice/model", "revision": None})
    card = exported_card(local, BaseModel(None, None))
    assert "alice" not in card
    assert "Made from a local model: its own licence holds." in card
    assert "Trained on local data: its terms may bind these weights." in card
    assert not {"license", "base_model", "base_model_relation", "datasets"} & ModelCard(card).data.to_dict().keys()

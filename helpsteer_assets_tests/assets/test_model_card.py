from typing import ClassVar

import pytest
import yaml
from huggingface_hub import ModelCardData

from helpsteer_assets.assets.model_card import BaseModel, export_card, model_card, role_in_words
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


def changed(experiment: Experiment, **sections: dict) -> Experiment:
    data = experiment.model_dump()
    for name, changes in sections.items():
        data[name] |= changes
    return Experiment.model_validate(data)


@pytest.fixture(scope="module")
def helpsteer() -> Experiment:
    return load_experiment("helpsteer")


@pytest.fixture(scope="module")
def length_penalty() -> Experiment:
    objective = {"margin": "length_penalty", "margin_role": None, "margin_beta": None, "penalty": 0.01}
    return changed(load_experiment("demo"), objective=objective)


class TestPolicy:
    @pytest.fixture
    def card(self, helpsteer) -> str:
        return model_card(
            helpsteer, RESULT, w="0.2", base="/home/artifacts/sft_model/all/abc/model", fingerprint="f00d"
        )

    def test_names_the_fingerprint(self, card):
        assert "fingerprint f00d" in card

    def test_names_base_data_and_licence_where_the_hub_reads_them(self, card):
        front = yaml.safe_load(card.split("---")[1])
        assert front["base_model"] == "meta-llama/Llama-2-7b-hf"
        assert front["datasets"] == ["nvidia/HelpSteer"]
        assert "license" not in front  # the data's, not the adapter's
        assert "Licence of the data: cc-by-4.0" in card
        assert front["library_name"] == "peft"

    def test_says_the_role_in_words(self, card, helpsteer):
        assert role_in_words(helpsteer, "0.2") in card
        assert "0.8 of the weight discourages verbosity" in card

    def test_says_objective_data_and_how_training_went(self, card, helpsteer):
        assert "# MODPO policy, w = 0.2" in card
        assert "multi-objective direct preference optimization" in card
        assert "beta 0.1, margin_beta 0.1" in card
        assert f"nvidia/HelpSteer at revision {helpsteer.data.revision}" in card
        assert "Licence of the data: cc-by-4.0" in card
        assert "Precision: bf16; LoRA r=16" in card

    def test_gives_loss_and_accuracy_of_the_step_that_was_kept(self, card):
        assert "40 steps, kept those up to step 20, loss on held-out train prompts 0.6123, accuracy there 0.71" in card

    def test_shows_how_to_load_it(self, card):
        assert 'AutoModelForCausalLM.from_pretrained("/home/artifacts/sft_model/all/abc/model")' in card
        assert "PeftModel.from_pretrained(model" in card


@pytest.mark.parametrize(("role", "verb"), [("cost", "discourages"), ("reward", "encourages")])
def test_role_in_words_says_which_way_the_margin_pulls(helpsteer, role, verb):
    assert f"0.9 of the weight {verb} verbosity" in role_in_words(
        changed(helpsteer, objective={"margin_role": role}), "0.1"
    )


def test_role_in_words_of_a_length_penalty(length_penalty):
    assert "shorter responses" in role_in_words(length_penalty, "0.3")


def test_card_of_a_length_penalty_names_the_penalty(length_penalty):
    assert "beta 0.2, penalty 0.01" in model_card(length_penalty, RESULT, w="0.3", base="model", fingerprint="f00d")


def test_card_of_the_margin_adapter_says_that_it_is_a_reward_model(helpsteer):
    card = model_card(helpsteer, RESULT, w=None, base="model", fingerprint="f00d")
    assert "# Margin adapter for verbosity" in card
    assert "LoRA trained by DPO (beta 0.1) on pairs that differ in verbosity" in card
    assert "not meant to generate" in card


def test_card_of_an_unknown_data_set_leaves_the_licence_to_its_owner(helpsteer):
    card = model_card(
        changed(helpsteer, data={"source": "someone/Ratings"}), RESULT, w="0.2", base="model", fingerprint="f00d"
    )
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "see the data's owner" in card


def test_card_without_held_out_prompts_gives_no_loss(helpsteer):
    result = TrainingResult(steps=4, best_step=4, best_loss=None, resumed_from=None, history=[{"step": 4, "loss": 1.0}])
    assert "4 steps, kept those up to step 4\n" in model_card(
        helpsteer, result, w="0.2", base="model", fingerprint="f00d"
    )


def test_card_tells_whether_the_base_model_was_fine_tuned(helpsteer):
    assert "fine-tuned to the SFT model" in model_card(helpsteer, RESULT, w="0.2", base="model", fingerprint="f00d")
    plain = changed(helpsteer, sft={"enabled": False})
    assert "fine-tuned" not in model_card(plain, RESULT, w="0.2", base="model", fingerprint="f00d")


def test_card_of_the_embedded_data_names_no_data_set_of_the_hub():
    front = yaml.safe_load(
        model_card(load_experiment("demo"), RESULT, w="0.1", base="model", fingerprint="f00d").split("---")[1]
    )
    assert "datasets" not in front
    assert "license" not in front


class TestExport:
    LLAMA = BaseModel("meta-llama/Llama-2-7b-hf", "llama2")
    SCORES: ClassVar[list[dict]] = [
        {
            "measure": "helpfulness",
            "n": 300,
            "mean": 2.5,
            "ci_low": 2.41,
            "ci_high": 2.59,
            "delta": -0.2,
            "delta_low": -0.3,
            "delta_high": -0.1,
        }
    ]

    def card(self, experiment: Experiment, base: BaseModel = LLAMA, **changes) -> str:
        known = {"w": "0.2", "merged": True, "scores": self.SCORES, "fingerprint": "f00d", "prompt_template": None}
        return export_card(experiment, base, **(known | changes), transformers_version="5.23.0")

    def front(self, *arguments, **changes) -> dict:
        return yaml.safe_load(self.card(*arguments, **changes).split("---")[1])

    def test_the_hub_reads_base_data_licence_and_library(self, helpsteer):
        front = {
            "license": "llama2",
            "base_model": "meta-llama/Llama-2-7b-hf",
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["modpo", "dpo", "lora", "alignment"],
            "datasets": ["nvidia/HelpSteer"],
        }
        assert self.front(helpsteer) == front
        data = ModelCardData(**self.front(helpsteer, merged=False))
        assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
        assert "modpo" not in self.front(helpsteer, w=None)["tags"]

    def test_unknown_origins_are_left_out_where_the_hub_reads_them(self):
        front = self.front(load_experiment("smollm2"), BaseModel(None, None))
        assert not {"license", "base_model", "datasets"} & front.keys()

    def test_licences_are_named_and_helpsteer_is_attributed(self, helpsteer):
        card = self.card(helpsteer)
        assert "Made from meta-llama/Llama-2-7b-hf: llama2. Llama 2 is licensed under the LLAMA 2 Community" in card
        assert "https://huggingface.co/datasets/nvidia/HelpSteer) by NVIDIA (Wang et al., HelpSteer:" in card
        assert "https://creativecommons.org/licenses/by/4.0/" in card and "Changed:" in card

    def test_other_data_is_left_to_its_owner_and_no_path_is_named(self, helpsteer):
        local = changed(
            helpsteer,
            data={"source": "/home/alice/ratings", "revision": None},
            model={"base": "/home/alice/model", "revision": None},
        )
        card = self.card(local, BaseModel(None, None))
        assert "alice" not in card
        assert "Made from a local model: its own licence holds" in card
        assert "Trained on local data: its terms may bind" in card

    def test_scores_stand_there_with_intervals_or_their_absence_does(self, helpsteer):
        card = self.card(helpsteer)
        assert "| helpfulness | 2.5 [2.41, 2.59] | -0.2 [-0.3, -0.1] |" in card and "300 held-out prompts" in card
        sft = [self.SCORES[0] | {"delta": None, "delta_low": None, "delta_high": None}]
        assert "| helpfulness | 2.5 [2.41, 2.59] |  |" in self.card(helpsteer, w=None, scores=sft)
        assert "Not scored" in self.card(helpsteer, scores=[])

    def test_the_settings_that_no_file_can_hold_are_said(self, helpsteer):
        card = self.card(helpsteer)
        assert "greedy (vLLM reads no such setting from the file: ask it for `temperature=0`)" in card
        assert f"the last {helpsteer.generation.max_prompt_length} tokens" in card
        sampled = changed(helpsteer, generation={"do_sample": True, "temperature": 0.7, "no_repeat_ngram_size": 3})
        assert "sampled at temperature 0.7, top_p 1.0, no_repeat_ngram_size 3, at most" in self.card(sampled)

    def test_prompts_without_a_chat_template_are_put_into_the_plain_one(self, helpsteer):
        card = self.card(helpsteer, prompt_template="Q: {prompt}\n")
        assert r"""tokenizer('Q: {prompt}\n'.format(prompt="..."), return_tensors="pt")""" in card
        assert "there is no chat template" in card and "apply_chat_template" not in card

    @pytest.mark.parametrize(("r", "rank"), [(4, 8), (16, 16), (20, 32)])
    def test_vllm_gets_a_rank_that_it_has_kernels_for(self, helpsteer, r, rank):
        card = self.card(changed(helpsteer, lora={"r": r}), merged=False)
        assert f"--enable-lora --max-lora-rank {rank} --lora-modules w0.2=<this folder>" in card
        assert "--enable-lora" not in self.card(helpsteer)

    def test_a_length_penalty_and_a_base_that_was_not_fine_tuned_are_said(self, length_penalty):
        assert "penalty 0.01. w=0.3: 0.7 of the weight encourages shorter" in self.card(length_penalty, w="0.3")
        plain = changed(length_penalty, sft={"enabled": False})
        assert "The base model, as it is: the reference policy" in self.card(plain, w=None)

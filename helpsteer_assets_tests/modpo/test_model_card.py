import pytest
import yaml

from helpsteer_assets.experiment import Experiment, load_experiment
from helpsteer_assets.modpo.model_card import model_card, role_in_words
from helpsteer_assets.modpo.training import TrainingResult

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

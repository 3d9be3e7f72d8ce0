"""Experiments: what is shipped, what is read, and what each mistake is told."""

import copy
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings, canonical_weight

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VALID: dict[str, Any] = {
    "name": "valid",
    "data": {"source": "embedded"},
    "model": {"base": "embedded", "precision": "fp32", "max_length": 64, "max_prompt_length": 32},
    "objective": {"weights": [0.1, 0.9], "margin_role": "cost"},
    "sft": {"steps": 2, "learning_rate": 0.001},
    "margin_adapter": {"steps": 2, "learning_rate": 0.001},
    "modpo": {"steps": 2, "learning_rate": 0.001},
}


MISSING = object()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """VALID with values set, each named by its dotted key; those that are MISSING are taken out."""
    data = copy.deepcopy(VALID)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
        if value is MISSING:
            del place[key]
    return data


def written(folder: Path, content: str | dict[str, Any], name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def message_of(path: Path) -> str:
    with pytest.raises(HelpsteerError) as error:
        load_experiment(str(path))
    assert str(path) in str(error.value), "the message names the file"
    return str(error.value)


# What is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_experiment_validates_under_its_own_name_and_again_as_data(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name and experiment.description
    assert Experiment.model_validate(experiment.model_dump()) == experiment


# Weights

weights = st.one_of(
    st.floats(min_value=0, max_value=1, exclude_min=True),
    st.decimals(min_value="0.0000000001", max_value=1, places=10),
    st.integers(1, 99).map(lambda percent: percent / 100),
)


@given(weights, st.integers(0, 4), st.booleans(), st.sampled_from([str, float, Decimal]))
def test_equal_weights_have_one_plain_spelling_and_keep_their_number(
    weight: float | Decimal, zeros: int, leading_zero: bool, kind: Callable[[str], object]
) -> None:
    try:
        canonical = canonical_weight(weight)
    except ValueError:
        assert Decimal(str(weight)) != round(Decimal(str(weight)), 10)
        return
    assert Decimal(canonical) == Decimal(str(weight)) and "e" not in canonical.lower()
    text = (canonical if "." in canonical else f"{canonical}.") + "0" * zeros
    assert canonical_weight(text if leading_zero else text.removeprefix("0")) == canonical
    assert canonical_weight(kind(canonical)) == canonical


@pytest.mark.parametrize("value", ["0." + "9" * 32, "1." + "0" * 32 + "1", "1e-999999999", 0.1 + 0.2, 0, "nan", True])
def test_a_weight_is_never_rounded_or_guessed(value: object) -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\] of at most ten decimals"):
        canonical_weight(value)


# What is read


def test_environment_names_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELPSTEER_EXPERIMENT", raising=False)
    assert load_experiment().name == "demo"
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "")
    assert load_experiment().name == "demo"
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", str(written(tmp_path, VALID)))
    assert load_experiment().name == "valid"
    assert load_experiment("helpsteer").name == "helpsteer", "an argument goes before the environment"


def test_extending_changes_only_the_named_keys(tmp_path: Path) -> None:
    path = written(
        tmp_path, "extends: demo\nname: mine\nobjective: {weights: [0.50]}\nmodpo: {steps: null, epochs: 2e-1}\n"
    )
    mine, demo = load_experiment(str(path)), load_experiment("demo")
    assert (mine.name, mine.objective.weights, mine.modpo.steps, mine.modpo.epochs) == ("mine", ["0.5"], None, 0.2)
    assert mine.objective.margin_beta == demo.objective.margin_beta
    assert mine.data == demo.data


def test_extending_a_file_through_several_steps_keeps_each_ones_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "sub").mkdir()
    rater = {"model": "./rater", "heads": {"helpfulness": 0}}
    base = changed({"data.source": "../ratings", "model.base": "~/base", "evaluation.rater": rater})
    written(tmp_path / "sub", base, "base.yaml")
    written(tmp_path / "sub", "extends: ./base.yaml\nname: middle\nseed: 5\n", "middle.yaml")
    written(tmp_path, "extends: sub/middle.yaml\nname: last\n", "last.yaml")
    monkeypatch.chdir(tmp_path / "sub")
    for name in (str(tmp_path / "last.yaml"), "../last.yaml"):
        last = load_experiment(name)
        assert (last.name, last.seed, last.objective.weights) == ("last", 5, ["0.1", "0.9"])
        assert (last.data.source, last.model.base) == (str(tmp_path / "ratings"), str(tmp_path / "me" / "base"))
        assert isinstance(last.evaluation.rater, RewardModelSettings)
        assert last.evaluation.rater.model == str(tmp_path / "sub" / "rater")


def test_what_plays_no_part_may_be_left_out_and_is_taken_out_by_null(tmp_path: Path) -> None:
    text = "extends: demo\nname: mine\nobjective: {margin: length_penalty, penalty: 0.01"
    message = message_of(written(tmp_path, text + "}\n"))
    assert "`margin_role` does not go with `margin: length_penalty`" in message and "set it to null" in message
    nulls = "margin_role: null, margin_beta: null}\nmargin_adapter: null\n"
    mine = load_experiment(str(written(tmp_path, f"{text}, {nulls}")))
    assert (mine.margin.sign, mine.objective.margin_beta, mine.margin_adapter) == (1, None, None)
    assert not mine.has_margin_adapter
    plain = "extends: demo\nname: plain\nsft: {enabled: false, steps: null}\nobjective: {margin_beta: null}\n"
    experiment = load_experiment(str(written(tmp_path, plain)))
    assert not experiment.sft.enabled
    assert experiment.objective.margin_beta == 0.1, "null asks for the default"


# What a mistake is told

RATER = {"model": "./rater", "heads": {"helpfulness": 0}}
HUB = {"data.source": "nvidia/HelpSteer"}
PENALTY = {"objective.margin": "length_penalty", "objective.penalty": 0.1}
ROLE = "objective.margin_role"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Keys and types.
        ({"objective.margin_bta": 1}, "objective.margin_bta: unknown key; did you mean `margin_beta`? (allowed: beta,"),
        ({"evaluation.rater": {**RATER, "hads": {}}}, "evaluation.rater.hads: unknown key; did you mean `heads`?"),
        ({"sft.steps": 0}, "sft.steps: must be greater than or equal to 1, got 0"),
        ({"objective.beta": "0.1"}, "objective.beta: expected a number, got '0.1'"),
        ({"objective.beta": float("inf")}, "objective.beta: must be a finite number, got inf"),
        ({"name": "../up"}, "name: expected letters, digits, `-` and `_`, at most 63, the first a letter or digit"),
        ({"sft": "fast"}, "sft: expected a section of `key: value` lines, got 'fast'"),
        ({"run.report_to": "wandb"}, "run.report_to: expected a list, such as [a, b], got 'wandb'"),
        ({"lora.target_modules": []}, "expected `all-linear` or a list of module names such as [q_proj, v_proj]"),
        ({"model.precision": MISSING}, "model.precision: missing, and there is no default"),
        ({"margin_adapter": MISSING}, "margin_adapter: missing; `margin: implicit_reward` needs this section"),
        # Weights.
        ({"objective.weights": [0.5, 0]}, "objective.weights.1: a weight is a number in (0, 1]"),
        ({"objective.weights": [0.5, "0.50"]}, "weight 0.5 stands there more than once"),
        # The margin.
        (
            {"objective.margin_beta": -0.1},
            "must be positive, got -0.1. In the described pipeline a negative MARGIN_BETA",
        ),
        ({ROLE: MISSING}, "`margin: implicit_reward` needs `margin_role`. `cost` discourages what the margin adapter"),
        ({**PENALTY, ROLE: MISSING, "objective.penalty": None}, "`margin: length_penalty` needs `penalty`"),
        ({"objective.penalty": 0.1}, "`penalty` does not go with `margin: implicit_reward`; remove it"),
        # Sources.
        (HUB, "data.revision: nvidia/HelpSteer comes from the hub and needs its full commit hash"),
        ({**HUB, "data.revision": "main"}, "got 'main'; a path would be ./nvidia/HelpSteer"),
        ({"model.base": "https://host/model"}, "model.base: https://host/model is a URL"),
        ({"evaluation.rater": {**RATER, "model": "a/rater"}}, "evaluation.rater.revision: a/rater comes from the hub"),
        ({"model.revision": COMMIT}, "model.revision: goes with an id on the hub only, and embedded is none; remove"),
        # What does not go together.
        ({"data.source": "./x", "evaluation.rater": "embedded"}, "`embedded` rates answers to the embedded data's"),
        ({"evaluation.rater": "armo"}, "evaluation.rater: expected `none`, `embedded`, or a section that describes a"),
        ({"evaluation.rater": {**RATER, "heads": {"wit": 0}}}, "evaluation.rater.heads.wit: must be 'helpfulness',"),
        ({"data.margin_attribute": "helpfulness"}, "data.margin_attribute: the same as data.preference_attribute"),
        ({"sft.epochs": 1.0}, "sft: give either `steps` or `epochs`"),
        ({"modpo.steps": None}, "modpo: give either `steps` or `epochs`"),
        ({"model.max_prompt_length": 64}, "model: max_prompt_length (64) must be below max_length (64)"),
        ({"generation.engine": "vllm"}, "generation.engine: vllm needs model.precision: bf16"),
        ({"run.fsdp": True}, "run.fsdp: one process has nobody to share with"),
        (
            {"run.train_processes": 3, "sft.batch_size": 6, "margin_adapter.batch_size": 2},
            "run.train_processes: 3 processes cannot share a step of margin_adapter evenly, batch_size 2 x ",
        ),
    ],
)
def test_a_wrong_setting_is_told_by_its_key_and_what_is_right(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert expected in message_of(written(tmp_path, changed(changes)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected `key: value` lines, found nothing"),
        ("name: x\nseed: [1\ndata: 2\n", "is not valid YAML: line 3: expected ',' or ']', but got ':'"),
        ("extends: demo\nname: x\nsft:\n  steps: 1\n  steps: 2\n", "line 5: the key 'steps' stands twice; leave one"),
        ("extends: demo\nname: x\n7: 8\n", "7: a key is text, got 7"),
        ("extends: demo\n", "give it a `name` of its own; it extends 'demo'"),
        ("extends: demmo\nname: x\n", "'demmo', which is neither a shipped experiment (demo, smollm2, helpsteer)"),
        ("extends: ../{folder}/experiment.yaml\nname: x\n", "`extends` goes round in a circle"),
    ],
)
def test_a_file_that_is_no_experiment(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message_of(written(tmp_path, text.replace("{folder}", tmp_path.name)))

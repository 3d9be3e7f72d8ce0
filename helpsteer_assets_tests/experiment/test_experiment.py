"""Experiments: what is shipped, what is read, and what each mistake is told."""

import copy
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings, canonical_weight, is_hub_id, is_path

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


def changed(changes: dict[str, Any], removed: tuple[str, ...] = ()) -> dict[str, Any]:
    """VALID with values set and removed, each named by its dotted key."""
    data = copy.deepcopy(VALID)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    for dotted in removed:
        *sections, key = dotted.split(".")
        place = data
        for section in sections:
            place = place[section]
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
def test_shipped_experiment_validates_under_its_own_name(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.description


def test_demo_is_offline_deterministic_and_runs_in_the_users_role() -> None:
    demo = load_experiment("demo")
    assert (demo.data.source, demo.model.base, demo.evaluation.rater) == ("embedded", "embedded", "embedded")
    assert demo.objective.margin_role == "cost"
    assert len(demo.objective.weights) >= 4
    assert demo.model.precision == "fp32"
    assert demo.run.threads == 1


def test_smollm2_is_local_and_drops_bad_rows() -> None:
    smollm2 = load_experiment("smollm2")
    assert is_path(smollm2.model.base) and is_path(smollm2.data.source)
    assert smollm2.data.on_bad_rows == "drop"
    assert smollm2.evaluation.rater == "none"


def test_helpsteer_is_the_described_pipeline_with_the_role_cost() -> None:
    helpsteer = load_experiment("helpsteer")
    assert (helpsteer.data.source, helpsteer.data.revision) == (
        "nvidia/HelpSteer",
        "3ca5d59c1bc1080af195b4254e7407db60b6f450",
    )
    assert helpsteer.model.base == "meta-llama/Llama-2-7b-hf"
    assert helpsteer.model.precision == "bf16"
    assert helpsteer.model.max_length == 512
    assert helpsteer.objective.weights == ["0.1", "0.2", "0.4", "0.6", "0.8", "0.9"]
    assert (helpsteer.objective.beta, helpsteer.objective.margin_beta) == (0.1, 0.1)
    assert helpsteer.objective.margin_role == "cost"
    assert helpsteer.objective.margin_sign == -1
    assert (helpsteer.generation.max_prompt_length, helpsteer.generation.max_new_tokens) == (1536, 2560)
    assert helpsteer.evaluation.prompts == 300
    assert helpsteer.lora.r == 16
    assert helpsteer.data.on_bad_rows == "drop"


def test_every_setting_has_a_description() -> None:
    def undescribed(model: type[BaseModel], where: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if not field.description:
                found.append(f"{where}{name}")
            for section in sections_in(field.annotation):
                found += undescribed(section, f"{where}{name}.")
        return found

    def sections_in(annotation: Any) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [section for part in get_args(annotation) for section in sections_in(part)]

    assert RewardModelSettings in sections_in(
        Experiment.model_fields["evaluation"].annotation.model_fields["rater"].annotation
    )
    assert undescribed(Experiment, "") == []


def test_reading_an_experiment_imports_neither_torch_nor_dagster() -> None:
    code = (
        "import sys; from helpsteer_assets.experiment.settings import load_experiment; load_experiment('demo'); "
        "print([name for name in ('torch', 'transformers', 'dagster') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# Weights

weights = st.one_of(
    st.floats(min_value=0, max_value=1, exclude_min=True),
    st.decimals(min_value="0.0000000001", max_value=1, places=10),
    st.integers(1, 99).map(lambda percent: percent / 100),
)


def accepted(value: float | Decimal | str) -> str | None:
    try:
        return canonical_weight(value)
    except ValueError:
        return None


@given(weights)
def test_canonical_weight_is_idempotent_and_keeps_the_number(weight: float | Decimal) -> None:
    canonical = accepted(weight)
    if canonical is not None:
        assert canonical_weight(canonical) == canonical
        assert Decimal(canonical) == Decimal(str(weight))


@given(weights, st.integers(0, 4), st.booleans())
def test_equal_weights_have_equal_spellings(weight: float | Decimal, zeros: int, leading_zero: bool) -> None:
    canonical = accepted(weight)
    if canonical is None:
        return
    text = canonical if "." in canonical else f"{canonical}."
    spelled = text + "0" * zeros
    if not leading_zero:
        spelled = spelled.removeprefix("0")
    assert canonical_weight(spelled) == canonical
    assert canonical_weight(Decimal(canonical)) == canonical
    assert canonical_weight(float(canonical)) == canonical


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ("0.50", "0.5"),
        (".5", "0.5"),
        (0.5, "0.5"),
        (1, "1"),
        (1.0, "1"),
        ("1.00", "1"),
        ("1e-1", "0.1"),
        (1e-5, "0.00001"),
    ],
)
def test_canonical_weight_examples(value: object, canonical: str) -> None:
    assert canonical_weight(value) == canonical


@pytest.mark.parametrize("value", ["0." + "9" * 32, "1." + "0" * 32 + "1", "1e-999999999", 0.1 + 0.2])
def test_a_weight_is_never_rounded(value: object) -> None:
    with pytest.raises(ValueError, match=r"at most ten decimals|in \(0, 1\]"):
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


def test_a_number_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    text = yaml.safe_dump(VALID).replace("learning_rate: 0.001", "learning_rate: 1e-4")
    assert text.count("1e-4") == 3
    assert load_experiment(str(written(tmp_path, text))).sft.learning_rate == 0.0001


def test_extending_changes_only_the_named_keys(tmp_path: Path) -> None:
    path = written(
        tmp_path, "extends: demo\nname: mine\nobjective:\n  weights: [0.50]\nmodpo:\n  steps: null\n  epochs: 2\n"
    )
    mine, demo = load_experiment(str(path)), load_experiment("demo")
    assert mine.name == "mine"
    assert mine.objective.weights == ["0.5"]
    assert (mine.modpo.steps, mine.modpo.epochs) == (None, 2)
    assert mine.objective.margin_beta == demo.objective.margin_beta
    assert mine.data == demo.data


def test_extending_a_file_works_through_several_steps(tmp_path: Path) -> None:
    written(tmp_path, VALID, "base.yaml")
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub", "extends: ../base.yaml\nname: middle\nseed: 5\n", "middle.yaml")
    path = written(tmp_path, "extends: sub/middle.yaml\nname: last\n")
    last = load_experiment(str(path))
    assert (last.name, last.seed, last.objective.weights) == ("last", 5, ["0.1", "0.9"])


def test_switching_to_a_length_penalty_when_extending_takes_two_nulls(tmp_path: Path) -> None:
    text = "extends: demo\nname: mine\nobjective: {margin: length_penalty, penalty: 0.01"
    message = message_of(written(tmp_path, text + "}\n"))
    assert "margin_role and margin_beta cannot stand beside `margin: length_penalty`" in message
    assert "set it to null" in message
    mine = load_experiment(str(written(tmp_path, text + ", margin_role: null, margin_beta: null}\n")))
    assert mine.objective.margin_sign == 1
    assert not mine.has_margin_adapter


def test_relative_paths_mean_the_experiments_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    rater = {"model": "./rater", "heads": {"helpfulness": 0}}
    data = changed({"data.source": "../ratings", "model.base": "./base", "evaluation.rater": rater})
    path = written(tmp_path / "here", data)
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "here/experiment.yaml"):
        experiment = load_experiment(name)
        assert experiment.data.source == str(tmp_path / "ratings")
        assert experiment.model.base == str(tmp_path / "here" / "base")
        assert isinstance(experiment.evaluation.rater, RewardModelSettings)
        assert experiment.evaluation.rater.model == str(tmp_path / "here" / "rater")


def test_an_inherited_relative_path_means_its_own_files_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", changed({"data.source": "./ratings"}))
    path = written(tmp_path, "extends: base/experiment.yaml\nname: mine\n")
    assert load_experiment(str(path)).data.source == str(tmp_path / "base" / "ratings")


def test_relative_paths_of_a_shipped_experiment_mean_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_experiment("smollm2").data.source == str(tmp_path / "data" / "helpsteer")


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, changed({"data.source": "~/ratings"}))
    assert load_experiment("~/experiment.yaml").data.source == str(tmp_path / "ratings")


def test_paths_and_hub_ids_are_told_apart() -> None:
    assert all(is_path(source) for source in ("./x", "../x", "/x", "~/x"))
    assert is_hub_id("nvidia/HelpSteer")
    assert not is_hub_id("embedded")
    assert not is_hub_id("./nvidia/HelpSteer")


def test_margin_beta_has_a_default_beside_an_implicit_reward_only(tmp_path: Path) -> None:
    assert load_experiment(str(written(tmp_path, VALID))).objective.margin_beta == 0.1
    null = changed({"objective.margin_beta": None})
    assert load_experiment(str(written(tmp_path, null))).objective.margin_beta == 0.1
    penalty = changed({"objective.margin": "length_penalty", "objective.penalty": 0.1}, ("objective.margin_role",))
    assert load_experiment(str(written(tmp_path, penalty))).objective.margin_beta is None


def test_a_length_penalty_needs_no_margin_adapter_section(tmp_path: Path) -> None:
    data = changed(
        {"objective.margin": "length_penalty", "objective.penalty": 0.1}, ("objective.margin_role", "margin_adapter")
    )
    assert load_experiment(str(written(tmp_path, data))).margin_adapter is None


def test_role_reward_encourages_the_margin(tmp_path: Path) -> None:
    assert (
        load_experiment(str(written(tmp_path, changed({"objective.margin_role": "reward"})))).objective.margin_sign == 1
    )


def test_validated_settings_validate_again(tmp_path: Path) -> None:
    rater = {"model": "some/rater", "revision": COMMIT, "heads": {"helpfulness": 0, "verbosity": 4}}
    experiment = load_experiment(str(written(tmp_path, changed({"evaluation.rater": rater}))))
    assert Experiment.model_validate(experiment.model_dump()) == experiment


# What a mistake is told

NO_ROLE = ("objective.margin_role",)
RATER = {"model": "./rater", "heads": {"helpfulness": 0}}


@pytest.mark.parametrize(
    ("changes", "removed", "expected"),
    [
        (
            {"objective.margin_bta": 1},
            (),
            "objective.margin_bta: unknown key; did you mean `margin_beta`? (allowed: beta,",
        ),
        ({"objectiv": {}}, (), "objectiv: unknown key; did you mean `objective`? (allowed: checks, data,"),
        ({"evaluation.rater": {**RATER, "hads": {}}}, (), "evaluation.rater.hads: unknown key; did you mean `heads`?"),
        ({"sft.steps": "many"}, (), "sft.steps: expected a whole number, got 'many'"),
        ({"sft.steps": 2.5}, (), "sft.steps: expected a whole number, got 2.5"),
        ({"sft.steps": 0}, (), "sft.steps: must be greater than or equal to 1, got 0"),
        ({"objective.beta": "0.1"}, (), "objective.beta: expected a number, got '0.1' (remove the quotes)"),
        ({"objective.beta": True}, (), "objective.beta: expected a number, got true"),
        ({"objective.beta": None}, (), "objective.beta: expected a number, got null"),
        ({"objective.beta": float("inf")}, (), "objective.beta: must be a finite number, got inf"),
        ({"seed": True}, (), "seed: expected a whole number, got true"),
        ({"sft.enabled": "yes please"}, (), "sft.enabled: expected true or false, got 'yes please'"),
        ({"name": 3}, (), "name: expected text, got 3 (put it in quotes)"),
        ({"sft": "fast"}, (), "sft: expected a section of `key: value` lines, got 'fast'"),
        ({"run.report_to": "wandb"}, (), "run.report_to: expected a list, such as [a, b], got 'wandb'"),
        ({"data.source": ""}, (), "data.source: must not be empty"),
        (
            {"lora.target_modules": "q_proj"},
            (),
            "expected `all-linear` or a list of module names such as [q_proj, v_proj]",
        ),
        ({"lora.target_modules": []}, (), "lora.target_modules: expected `all-linear` or a list of module names"),
        ({"data.preference_attribute": "humour"}, (), "must be 'helpfulness', 'correctness', 'coherence',"),
        ({}, ("model.precision",), "model.precision: missing, and there is no default"),
        ({"model.precision": "fp16"}, (), "model.precision: must be 'fp32' or 'bf16', got 'fp16'"),
        ({}, ("sft", "modpo"), "sft: missing, and there is no default"),
        ({}, ("margin_adapter",), "margin_adapter: missing; `margin: implicit_reward` needs this section"),
        ({"run.fsdp": True}, (), "run.fsdp: there is nothing to share among one process"),
        ({"run.train_processes": 0}, (), "run.train_processes: must be greater than or equal to 1, got 0"),
        (
            {"run.train_processes": 3, "sft.batch_size": 6, "margin_adapter.batch_size": 2},
            (),
            "run.train_processes: 3 processes cannot share a step of margin_adapter evenly, batch_size 2 x ",
        ),
    ],
)
def test_wrong_key_or_type(tmp_path: Path, changes: dict[str, Any], removed: tuple[str, ...], expected: str) -> None:
    assert expected in message_of(written(tmp_path, changed(changes, removed)))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0], "a weight is a number in (0, 1] (0 is excluded: the loss divides by w), got 0"),
        ([-0.1], "a weight is a number in (0, 1]"),
        ([1.5], "got 1.5"),
        (["much"], "a weight is a number in (0, 1], got 'much'"),
        ([True], "a weight is a number in (0, 1], got true"),
        ([float("nan")], "a weight is a number in (0, 1]"),
        ([0.123456789012], "a weight has at most ten decimals"),
        ([0.5, "0.50"], "weight 0.5 stands there more than once (0.5, 0.50); leave one"),
        ([], "give a list of at least one weight in (0, 1], such as [0.1, 0.5, 0.9]"),
        (0.5, "give a list of at least one weight"),
    ],
)
def test_wrong_weights(tmp_path: Path, weights: object, expected: str) -> None:
    message = message_of(written(tmp_path, changed({"objective.weights": weights})))
    assert "objective.weights: " in message
    assert expected in message


def test_a_negative_margin_beta_is_told_what_it_did_in_the_described_pipeline(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, changed({"objective.margin_beta": -0.1})))
    assert "margin_beta is a magnitude and must be positive, got -0.1" in message
    assert "a negative MARGIN_BETA was documented as reward and acted as cost" in message
    assert "`margin_role: cost` (penalize what the margin adapter prefers) or `margin_role: reward`" in message


LENGTH_PENALTY = {"objective.margin": "length_penalty", "objective.penalty": 0.1}


@pytest.mark.parametrize(
    ("changes", "removed", "expected"),
    [
        ({"objective.margin_beta": 0}, (), "margin_beta must be positive, got 0: with 0 the margin counts for nothing"),
        (
            {},
            NO_ROLE,
            "margin_role is missing: `cost` penalizes what the margin adapter prefers, `reward` encourages it",
        ),
        ({"objective.margin_role": "punish"}, (), "objective.margin_role: must be 'cost' or 'reward', got 'punish'"),
        (LENGTH_PENALTY, (), "margin_role cannot stand beside `margin: length_penalty`"),
        ({**LENGTH_PENALTY, "objective.margin_beta": 0.1}, NO_ROLE, "margin_beta cannot stand beside"),
        (
            {"objective.margin": "length_penalty"},
            NO_ROLE,
            "`margin: length_penalty` needs `penalty`, the reward lost per",
        ),
        ({**LENGTH_PENALTY, "objective.penalty": -1.0}, NO_ROLE, "objective.penalty: must be greater than 0, got -1.0"),
        ({"objective.penalty": 0.1}, (), "`penalty` goes with `margin: length_penalty` only; remove it"),
    ],
)
def test_wrong_margin(tmp_path: Path, changes: dict[str, Any], removed: tuple[str, ...], expected: str) -> None:
    assert expected in message_of(written(tmp_path, changed(changes, removed)))


HUB = {"data.source": "nvidia/HelpSteer"}
OTHER_RATER = "`embedded` rates answers to the embedded data's prompts only; use `none`, or describe a reward model"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (HUB, "data.revision: missing; nvidia/HelpSteer comes from the hub and needs its full commit hash"),
        (HUB, "If nvidia/HelpSteer is meant to be a path, write ./nvidia/HelpSteer"),
        ({**HUB, "data.revision": "main"}, "data.revision: got 'main'; nvidia/HelpSteer comes from the hub"),
        ({**HUB, "data.revision": COMMIT[:12]}, f"data.revision: got '{COMMIT[:12]}'"),
        ({"data.source": "s3://bucket/ratings"}, "data.source: s3://bucket/ratings is a URL"),
        ({"model.base": "https://host/model"}, "model.base: https://host/model is a URL"),
        ({"model.base": "meta/llama"}, "model.revision: missing; meta/llama comes from the hub"),
        ({"evaluation.rater": {**RATER, "model": "a/rater"}}, "evaluation.rater.revision: missing; a/rater comes from"),
        ({"data.source": "./x", "data.revision": COMMIT}, "data.revision: goes with an id on the hub only"),
        (
            {"model.revision": COMMIT},
            "model.revision: goes with an id on the hub only, and embedded is none; remove it",
        ),
        ({"data.source": "./x", "evaluation.rater": "embedded"}, OTHER_RATER),
        ({"evaluation.kl_samples": -1}, "evaluation.kl_samples: must be greater than or equal to 0, got -1"),
        ({"evaluation.kl_samples": 1.5}, "evaluation.kl_samples: expected a whole number, got 1.5"),
        ({"evaluation.rater": "armo"}, "evaluation.rater: expected `none`, `embedded`, or a section that describes a"),
        ({"evaluation.rater": {"model": "./rater"}}, "evaluation.rater.heads: missing, and there is no default"),
        ({"evaluation.rater": {**RATER, "heads": {}}}, "evaluation.rater.heads: must not be empty"),
        ({"evaluation.rater": {**RATER, "heads": {"wit": 0}}}, "evaluation.rater.heads.wit: must be 'helpfulness',"),
        ({"data.margin_attribute": "helpfulness"}, "data.margin_attribute: the same as data.preference_attribute"),
        ({"sft.epochs": 1.0}, "sft: give `steps` or `epochs`, not both; remove one"),
        ({"modpo.steps": None}, "modpo: give `steps` (optimizer steps) or `epochs` (passes over the train pairs)"),
        ({"model.max_prompt_length": 64}, "model: max_prompt_length (64) must be below max_length (64)"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in message_of(written(tmp_path, changed(changes)))


def test_a_wrong_rater_is_told_one_thing(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, changed({"evaluation.rater": {"model": "./rater"}})))
    assert len(message.splitlines()) == 2


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = message_of(written(tmp_path, changed({"seed": -1, "sft.steps": 0, "modpo.speed": 1})))
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".hidden", "", "a b", "x" * 64, "-dash", "ä", "line\n"])
def test_a_name_serves_as_a_folder(tmp_path: Path, name: str) -> None:
    message = message_of(written(tmp_path, changed({"name": name})))
    assert "name: expected letters, digits, `-` and `_`, at most 63, the first a letter or digit" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "expected `key: value` lines, found a list"),
        ("just words\n", "expected `key: value` lines, found 'just words'"),
        ("", "expected `key: value` lines, found nothing"),
        ("name: x\nseed: [1\ndata: 2\n", "is not valid YAML: line 3: expected ',' or ']', but got ':'"),
        ("name: x\n\tseed: 1\n", "is not valid YAML: line 2: found character '\\t' that cannot start any token"),
        ("name: x\nseed: 1\nseed: 2\n", "line 3: the key 'seed' stands twice; leave one"),
        ("extends: demo\nname: x\nsft:\n  steps: 1\n  steps: 2\n", "line 5: the key 'steps' stands twice; leave one"),
        ("extends: demo\nname: x\n7: 8\n", "7: a key is text, got 7"),
        ("extends: demo\n", "give it a `name` of its own; it extends 'demo'"),
        ("extends: 5\nname: x\n", "`extends` names an experiment or a path, got 5"),
        (
            "extends: demmo\nname: x\n",
            "it extends 'demmo', which is neither a shipped experiment (demo, smollm2, helpsteer)",
        ),
        ("extends: experiment.yaml\nname: x\n", "`extends` goes round in a circle"),
        ("extends: ../{folder}/experiment.yaml\nname: x\n", "`extends` goes round in a circle"),
    ],
)
def test_a_file_that_is_no_experiment(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message_of(written(tmp_path, text.replace("{folder}", tmp_path.name)))


def test_a_circle_of_two_files_names_both(tmp_path: Path) -> None:
    first = written(tmp_path, "extends: second.yaml\nname: x\n", "first.yaml")
    second = written(tmp_path, "extends: first.yaml\nname: y\n", "second.yaml")
    assert f"goes round in a circle: {first} -> {second} -> {first}" in message_of(first)


def test_a_missing_file_is_told_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = message_of(tmp_path / "nowhere.yaml")
    assert "not found (shipped experiments: demo, smollm2, helpsteer; else give the path of a YAML file" in message
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "helpstear")
    with pytest.raises(HelpsteerError, match="not found; did you mean `helpsteer`"):
        load_experiment()


def test_what_cannot_be_read_is_told_why(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in message_of(tmp_path)
    (tmp_path / "experiment.yaml").write_bytes(b"name: \xff\n")
    assert "is not UTF-8 text" in message_of(tmp_path / "experiment.yaml")


def test_a_child_with_its_parents_name_is_refused(tmp_path):
    path = tmp_path / "same.yaml"
    path.write_text("extends: demo\nname: demo\n", encoding="utf-8")
    with pytest.raises(HelpsteerError, match="give it a `name` of its own; it extends 'demo'"):
        load_experiment(str(path))


def test_a_disabled_sft_needs_no_training_settings(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("extends: demo\nname: plain\nsft: {enabled: false, steps: null}\n", encoding="utf-8")
    assert not load_experiment(str(path)).sft.enabled


def test_all_bad_weights_are_named_at_once(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text("extends: demo\nname: weights\nobjective: {weights: [0, 1.2, x]}\n", encoding="utf-8")
    with pytest.raises(HelpsteerError) as caught:
        load_experiment(str(path))
    assert all(f"got {bad}" in str(caught.value) for bad in ("0", "1.2", "'x'"))

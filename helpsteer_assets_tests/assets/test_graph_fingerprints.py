"""Fingerprints: what a change of a setting or a source makes anew, and what it leaves alone."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.assets.graph import CODE_VERSIONS, code_version, fingerprints, stages
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ALL

BASE: dict[str, Any] = {
    "name": "base",
    "data": {"source": "embedded"},
    "model": {"base": "embedded", "precision": "fp32"},
    "objective": {"weights": [0.1, 0.9], "margin_role": "cost"},
    "sft": {"steps": 2, "learning_rate": 0.001},
    "margin_adapter": {"steps": 2, "learning_rate": 0.001},
    "modpo": {"steps": 2, "learning_rate": 0.001},
    "evaluation": {"rater": "embedded"},
}
LENGTH_PENALTY = {"objective": {"weights": [0.1, 0.9], "margin": "length_penalty", "penalty": 0.01}}

SUMMARY = {"score_summary", "tradeoff", "tradeoff_report"}
POLICIES = {"modpo_models", "generations", "scores", "kl_to_sft", *SUMMARY}
ADAPTER = {"margin_adapter", "margin_adapter_quality", "margin_rewards", "sft_scores", *POLICIES}
ANSWERS = {"sft_generations", "sft_scores", "generations", "scores", *SUMMARY}
ANSWERS_AND_SAMPLES = {"kl_to_sft", *ANSWERS}
TRAINED = {"sft_model", "reference_log_probs", "sft_generations", *ADAPTER}
EVERYTHING = {"helpsteer_ratings", "preference_pairs", "margin_pairs", "evaluation_prompts", *TRAINED}


def experiment(changes: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    """BASE with dotted keys changed, or whole sections replaced."""
    data = copy.deepcopy(BASE | sections)
    for dotted, value in (changes or {}).items():
        *path, key = dotted.split(".")
        place = data
        for section in path:
            place = place.setdefault(section, {})
        place[key] = value
    return Experiment.model_validate(data)


def changed(before: Experiment, after: Experiment) -> set[str]:
    """The assets of which a partition that both have got another fingerprint."""
    first, second = fingerprints(before), fingerprints(after)
    return {asset for asset, partition in first.keys() & second if differs(first, second, asset, partition)}


def differs(first: dict[Any, Any], second: dict[Any, Any], asset: str, partition: str) -> bool:
    return first[asset, partition].value != second[asset, partition].value


@pytest.mark.parametrize(
    ("key", "value", "made_anew"),
    [
        ("objective.beta", 0.3, POLICIES),
        ("objective.margin_beta", 0.3, POLICIES),
        ("objective.margin_role", "reward", POLICIES),
        ("modpo.learning_rate", 0.002, POLICIES),
        ("modpo.evaluate_every", 1, POLICIES),
        ("margin_adapter.beta", 0.3, ADAPTER),
        ("margin_adapter.steps", 3, ADAPTER),
        ("sft.steps", 3, TRAINED),
        ("lora.r", 4, TRAINED),
        ("lora.target_modules", ["q_proj"], TRAINED),
        ("seed", 1, TRAINED),
        ("model.max_length", 300, TRAINED),
        ("model.precision", "bf16", TRAINED),
        (
            "data.preference_attribute",
            "overall",
            EVERYTHING - {"helpsteer_ratings", "margin_pairs", "evaluation_prompts"},
        ),
        ("data.margin_attribute", "complexity", {"margin_pairs", "reference_log_probs", *ADAPTER}),
        ("data.selection_share", 0.1, EVERYTHING - {"helpsteer_ratings", "evaluation_prompts"}),
        ("data.max_train_prompts", 100, EVERYTHING),
        ("data.on_bad_rows", "drop", EVERYTHING),
        ("generation.max_new_tokens", 32, ANSWERS_AND_SAMPLES),
        ("generation.max_prompt_length", 32, ANSWERS_AND_SAMPLES),
        ("generation.repetition_penalty", 1.2, ANSWERS),
        ("generation.do_sample", True, ANSWERS),
        ("evaluation.prompts", 10, {"evaluation_prompts", *ANSWERS_AND_SAMPLES}),
        ("evaluation.kl_samples", 3, {"kl_to_sft", *SUMMARY}),
        ("evaluation.rater", "none", {"sft_scores", "scores", *SUMMARY}),
        ("evaluation.bootstrap_samples", 500, SUMMARY),
        ("name", "other", {"tradeoff", "tradeoff_report"}),
        ("description", "other words", {"tradeoff_report"}),
        ("checks.margin_adapter_min_accuracy", 0.9, set()),
        ("run.device", "cpu", set()),
        ("run.threads", 1, set()),
        ("run", {"train_processes": 2, "fsdp": True}, set()),
        ("run.report_to", ["wandb"], set()),
        ("generation.max_batch_tokens", 64, set()),
    ],
)
def test_a_setting_makes_anew_what_depends_on_it_and_nothing_else(key: str, value: Any, made_anew: set[str]) -> None:
    assert changed(experiment(), experiment({key: value})) == made_anew


def test_the_batch_counts_where_rounding_lets_it_change_responses() -> None:
    bf16 = experiment({"model.precision": "bf16"})
    other = experiment({"model.precision": "bf16", "generation.max_batch_tokens": 64})
    assert changed(bf16, other) == ANSWERS_AND_SAMPLES


def test_the_seed_counts_for_responses_that_are_sampled() -> None:
    sampled = {"generation.do_sample": True, "sft.enabled": False}
    greedy = {"sft.enabled": False}
    assert "sft_generations" in changed(experiment(sampled), experiment({**sampled, "seed": 1}))
    assert "sft_generations" not in changed(experiment(greedy), experiment({**greedy, "seed": 1}))
    assert "seed" in stages(experiment(greedy))["kl_to_sft"].settings, "its samples are drawn in any case"


def test_another_grid_leaves_the_policies_of_the_weights_it_keeps() -> None:
    grid = experiment({"objective.weights": [0.1, 0.5, 0.9]})
    assert changed(experiment(), grid) == SUMMARY
    assert len({fingerprints(grid)["modpo_models", w].value for w in ("0.1", "0.5", "0.9")}) == 3


def test_two_spellings_of_a_weight_are_one_policy() -> None:
    assert changed(experiment(), experiment({"objective.weights": ["0.10", ".9"]})) == set()


def test_code_makes_anew_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprints(experiment())

    def after(piece: str) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setitem(CODE_VERSIONS, piece, 99)
            now = fingerprints(experiment())
        return {asset for asset, partition in before if differs(before, now, asset, partition)}

    assert after("modpo/losses.py") == ADAPTER
    assert after("modpo/plots.py") == {"tradeoff", "tradeoff_report"}
    assert after("report/__init__.py") == {"tradeoff_report"}
    assert after("modpo/fronts.py") == after("modpo/comparisons.py") == {"tradeoff", "tradeoff_report"}
    assert after("modpo/diagnostics.py") == {"margin_adapter_quality", *SUMMARY}
    assert after("modpo/kl.py") == after("assets/evaluation.py:kl_to_sft") == {"kl_to_sft", *SUMMARY}
    assert after("modpo/schedule.py") == TRAINED
    assert after("assets/evaluation.py:sft_generations") == {"sft_generations", "sft_scores", *SUMMARY}
    assert after("embedded/generator.py") == EVERYTHING


def test_a_length_penalty_has_no_adapter_and_nothing_that_belongs_to_it() -> None:
    penalty = experiment(**LENGTH_PENALTY)
    graph = stages(penalty)
    of_adapter = {"margin_pairs", "margin_adapter", "margin_adapter_quality"}
    assert graph.keys() == stages(experiment()).keys() - of_adapter
    assert all(of_adapter.isdisjoint(stage.inputs) for stage in graph.values())
    # The section may stay in the file, for changing back; it has no part in the result.
    other = experiment({"margin_adapter.steps": 9, "data.margin_attribute": "coherence"}, **LENGTH_PENALTY)
    assert changed(penalty, other) == set()
    more = experiment({"objective.penalty": 0.02}, **LENGTH_PENALTY)
    assert changed(penalty, more) == POLICIES


def test_without_samples_for_it_there_is_no_kl_divergence_and_all_else_is_there() -> None:
    without = experiment({"evaluation.kl_samples": 0})
    graph = stages(without)
    assert graph.keys() == stages(experiment()).keys() - {"kl_to_sft"}
    assert all("kl_to_sft" not in stage.inputs for stage in graph.values())
    assert changed(experiment(), without) == SUMMARY


def test_without_sft_the_reference_policy_depends_on_the_base_model_alone() -> None:
    plain = experiment({"sft.enabled": False})
    assert stages(plain)["sft_model"].inputs == ()
    changes = {"sft.enabled": False, "sft.steps": 9, "lora.r": 4, "data.preference_attribute": "overall", "seed": 3}
    assert "sft_model" not in changed(plain, experiment(changes))
    assert "sft_model" in changed(experiment(), plain)


def test_every_input_stands_before_the_stage_that_reads_it() -> None:
    without_kl = stages(experiment({"evaluation.kl_samples": 0}))
    penalty, helpsteer = stages(experiment(**LENGTH_PENALTY)), stages(load_experiment("helpsteer"))
    for graph in (stages(experiment()), penalty, helpsteer, without_kl):
        seen: set[str] = set()
        for stage in graph.values():
            assert seen.issuperset(stage.inputs)
            seen.add(stage.name)


def test_every_setting_a_stage_names_is_one() -> None:
    for penalty in ({}, LENGTH_PENALTY):
        found = experiment(**penalty)
        dumped = found.model_dump(mode="json")
        for stage in stages(found).values():
            for dotted in stage.settings:
                place = dumped
                for part in dotted.split("."):
                    assert part in place, f"{stage.name}: {dotted}"
                    place = place[part]


def test_a_policy_reads_its_own_weight_and_the_summary_reads_them_all() -> None:
    found = fingerprints(experiment())
    for asset in ("scores", "kl_to_sft"):
        assert found[asset, "0.1"].inputs["modpo_models"] == {"0.1": found["modpo_models", "0.1"].value}
    assert found["tradeoff_report", ALL].inputs["kl_to_sft"].keys() == {"0.1", "0.9"}
    assert found["score_summary", ALL].inputs["scores"].keys() == {"0.1", "0.9"}
    assert found["modpo_models", "0.1"].settings["w"] == "0.1"
    assert "w" not in found["sft_model", ALL].settings


# Sources


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "first" / "ratings"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n')
    return folder


def local(source: Path) -> Experiment:
    return experiment(data={"source": str(source)}, evaluation={"rater": "none"})


def test_a_moved_source_changes_nothing_and_another_content_everything(source: Path, tmp_path: Path) -> None:
    before = local(source)
    first = fingerprints(before)
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(source, moved)
    assert changed(before, local(moved)) == set()
    (source / "train.jsonl").write_text('{"prompt": "b"}\n')
    second = fingerprints(before)
    assert {asset for asset, partition in first if differs(first, second, asset, partition)} == EVERYTHING


def test_a_changed_base_model_or_rater_is_another(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    shutil.copytree(tmp_path / "model", tmp_path / "rater")
    rater = {"model": str(tmp_path / "rater"), "heads": {"helpfulness": 0}}
    model = {"base": str(tmp_path / "model"), "precision": "fp32"}
    found = experiment(data={"source": str(source)}, model=model, evaluation={"rater": rater})

    def after(name: str) -> set[str]:
        first = fingerprints(found)
        (tmp_path / name / "config.json").write_text(json.dumps({"changed": os.urandom(4).hex()}))
        second = fingerprints(found)
        return {asset for asset, partition in first if differs(first, second, asset, partition)}

    assert after("model") == TRAINED
    assert after("rater") == {"sft_scores", "scores", *SUMMARY}


def test_hub_references_count_by_their_pinned_revision_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    one, two = (
        experiment(data={"source": "some/ratings", "revision": digit * 40}, evaluation={"rater": "none"})
        for digit in "ab"
    )
    assert changed(one, two) == EVERYTHING


def test_a_missing_source_names_its_key(tmp_path: Path) -> None:
    for found, key in (
        (local(tmp_path / "gone"), "data.source"),
        (experiment(model={"base": str(tmp_path / "gone"), "precision": "fp32"}), "model.base"),
    ):
        with pytest.raises(HelpsteerError, match=f"{key}: .*gone does not exist"):
            fingerprints(found)
    with pytest.raises(HelpsteerError, match=r"data\.source"):
        fetch(local(tmp_path / "gone"), "data")


# Dagster's code versions


def test_code_versions_follow_code_and_settings_and_leave_out_w_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def versions(found: Experiment) -> dict[str, str]:
        return {name: code_version(stage, found) for name, stage in stages(found).items()}

    def moved(changes: dict[str, Any]) -> set[str]:
        before, after = versions(experiment()), versions(experiment(changes))
        return {name for name in before if before[name] != after[name]}

    assert moved({"objective.beta": 0.3}) == {"modpo_models", "tradeoff_report"}
    assert moved({"objective.weights": [0.2]}) == {"score_summary", "tradeoff_report"}
    assert moved({"run.threads": 3}) == set()
    before = versions(experiment())
    monkeypatch.setitem(CODE_VERSIONS, "modpo/plots.py", 99)
    assert {name for name in before if before[name] != versions(experiment())[name]} == {
        "tradeoff",
        "tradeoff_report",
    }


def test_code_versions_read_no_source(tmp_path: Path) -> None:
    """Loading the definitions neither hashes gigabytes nor fails where a source is not there yet."""
    gone = experiment(
        data={"source": str(tmp_path / "gone")},
        model={"base": str(tmp_path / "gone"), "precision": "fp32"},
        evaluation={"rater": "none"},
    )
    assert all(code_version(stage, gone) for stage in stages(gone).values())

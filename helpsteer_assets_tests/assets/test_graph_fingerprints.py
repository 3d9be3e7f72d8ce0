"""Fingerprints: what a change of a setting, of code or of a source makes anew, and what it leaves alone."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.assets import graph
from helpsteer_assets.assets.graph import code_version, fingerprints, stages
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


def moved(before: dict[Any, Any], after: dict[Any, Any]) -> set[str]:
    """The assets of which a partition that both have got another fingerprint."""
    return {key[0] for key in before.keys() & after if before[key].value != after[key].value}


def changed(before: Experiment, after: Experiment) -> set[str]:
    return moved(fingerprints(before), fingerprints(after))


@pytest.mark.parametrize(
    ("key", "value", "made_anew"),
    [
        ("objective.beta", 0.3, POLICIES),
        ("objective.margin_beta", 0.3, {"sft_scores", *POLICIES}),
        ("objective.margin_role", "reward", POLICIES),
        ("margin_adapter.beta", 0.3, ADAPTER),
        ("lora.target_modules", ["q_proj"], TRAINED),
        ("seed", 1, TRAINED),
        ("model.max_length", 300, TRAINED),
        (
            "data.preference_attribute",
            "overall",
            EVERYTHING - {"helpsteer_ratings", "margin_pairs", "evaluation_prompts"},
        ),
        ("data.margin_attribute", "complexity", {"margin_pairs", "reference_log_probs", *ADAPTER}),
        ("data.selection_share", 0.1, EVERYTHING - {"helpsteer_ratings", "evaluation_prompts"}),
        ("data.on_bad_rows", "drop", EVERYTHING),
        ("generation.max_new_tokens", 32, ANSWERS_AND_SAMPLES),
        ("generation.repetition_penalty", 1.2, ANSWERS),
        ("evaluation.prompts", 10, {"evaluation_prompts", *ANSWERS_AND_SAMPLES}),
        ("evaluation.kl_samples", 3, {"kl_to_sft", *SUMMARY}),
        ("evaluation.kl_samples", 0, SUMMARY),
        ("evaluation.rater", "none", {"sft_scores", "scores", *SUMMARY}),
        ("evaluation.bootstrap_samples", 500, SUMMARY),
        ("name", "other", {"tradeoff", "tradeoff_report"}),
        ("description", "other words", {"tradeoff_report"}),
        ("checks.margin_adapter_min_accuracy", 0.9, set()),
        ("run", {"train_processes": 2, "fsdp": True}, set()),
        ("generation.max_batch_tokens", 64, set()),
        ("objective.weights", [0.1, 0.5, 0.9], SUMMARY),
        ("objective.weights", ["0.10", ".9"], set()),
    ],
)
def test_a_setting_makes_anew_what_depends_on_it_and_nothing_else(key: str, value: Any, made_anew: set[str]) -> None:
    assert changed(experiment(), experiment({key: value})) == made_anew


def test_batch_and_seed_count_where_they_can_change_responses() -> None:
    bf16 = {"model.precision": "bf16"}
    assert changed(experiment(bf16), experiment({**bf16, "generation.max_batch_tokens": 64})) == ANSWERS_AND_SAMPLES
    for sampled in (True, False):
        base = {"generation.do_sample": sampled, "sft.enabled": False}
        assert ("sft_generations" in changed(experiment(base), experiment({**base, "seed": 1}))) == sampled
        assert "seed" in stages(experiment(base))["kl_to_sft"].settings, "its samples are drawn in any case"


def raise_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As after a change of a stage's code."""
    newer = [replace(stage, version=99) if stage.name == name else stage for stage in graph.STAGES]
    monkeypatch.setattr(graph, "STAGES", tuple(newer))


@pytest.mark.parametrize(
    ("stage", "made_anew"),
    [
        ("helpsteer_ratings", EVERYTHING),
        ("sft_generations", {"sft_generations", "sft_scores", *SUMMARY}),
    ],
)
def test_a_raised_version_makes_the_stage_and_what_reads_it_anew(
    monkeypatch: pytest.MonkeyPatch, stage: str, made_anew: set[str]
) -> None:
    before = fingerprints(experiment())
    raise_version(monkeypatch, stage)
    assert moved(before, fingerprints(experiment())) == made_anew


def test_a_length_penalty_has_no_adapter_and_nothing_that_belongs_to_it() -> None:
    penalty = experiment(**LENGTH_PENALTY)
    of_adapter = {"margin_pairs", "margin_adapter", "margin_adapter_quality"}
    assert stages(penalty).keys() == stages(experiment()).keys() - of_adapter
    assert "reference_log_probs" not in stages(penalty)["margin_rewards"].inputs
    # The section may stay in the file, for changing back; it has no part in the result.
    other = experiment({"margin_adapter.steps": 9, "data.margin_attribute": "coherence"}, **LENGTH_PENALTY)
    assert changed(penalty, other) == set()
    more = experiment({"objective.penalty": 0.02}, **LENGTH_PENALTY)
    assert changed(penalty, more) == {"sft_scores", *POLICIES}


def test_without_sft_the_reference_policy_depends_on_the_base_model_alone() -> None:
    plain = experiment({"sft.enabled": False})
    assert stages(plain)["sft_model"].inputs == ()
    changes = {"sft.enabled": False, "sft.steps": 9, "lora.r": 4, "data.preference_attribute": "overall", "seed": 3}
    assert "sft_model" not in changed(plain, experiment(changes))
    assert "sft_model" in changed(experiment(), plain)


def test_a_policy_reads_its_own_weight_and_the_summary_reads_them_all() -> None:
    made = fingerprints(experiment())
    assert made["scores", "0.1"].inputs["modpo_models"] == {"0.1": made["modpo_models", "0.1"].value}
    assert made["score_summary", ALL].inputs["scores"].keys() == {"0.1", "0.9"}
    assert made["modpo_models", "0.1"].settings["w"] == "0.1"
    assert made["modpo_models", "0.1"].value != made["modpo_models", "0.9"].value


# Sources


@pytest.mark.parametrize(
    ("file", "made_anew"),
    [
        ("ratings/train.jsonl", EVERYTHING),
        ("model/config.json", TRAINED),
        ("rater/config.json", {"sft_scores", "scores", *SUMMARY}),
    ],
)
def test_local_sources_count_by_content_and_not_by_place(tmp_path: Path, file: str, made_anew: set[str]) -> None:
    def at(place: Path) -> Experiment:
        return experiment(
            data={"source": str(place / "ratings")},
            model={"base": str(place / "model"), "precision": "fp32"},
            evaluation={"rater": {"model": str(place / "rater"), "heads": {"helpfulness": 0}}},
        )

    for name in ("ratings/train.jsonl", "model/config.json", "rater/config.json"):
        (tmp_path / "here" / name).parent.mkdir(parents=True)
        (tmp_path / "here" / name).write_text('{"prompt": "a"}\n')
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = at(tmp_path / "here"), at(tmp_path / "there")
    assert changed(here, there) == set()
    (tmp_path / "there" / file).write_text('{"prompt": "b"}\n')
    assert changed(here, there) == made_anew


def test_hub_references_count_by_their_pinned_revision_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    one, two = (
        experiment(data={"source": "some/ratings", "revision": digit * 40}, evaluation={"rater": "none"})
        for digit in "ab"
    )
    assert changed(one, two) == EVERYTHING


# Dagster's code versions


def test_code_versions_follow_code_and_settings_and_leave_out_w_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def versions(declared: Experiment) -> dict[str, str]:
        return {name: code_version(stage, declared) for name, stage in stages(declared).items()}

    def other(changes: dict[str, Any]) -> set[str]:
        before, after = versions(experiment()), versions(experiment(changes))
        return {name for name in before if before[name] != after[name]}

    assert other({"objective.beta": 0.3}) == {"modpo_models", "tradeoff_report"}
    assert other({"objective.weights": [0.2]}) == {"score_summary", "tradeoff_report"}
    assert other({"run.threads": 3}) == set()
    before = versions(experiment())
    raise_version(monkeypatch, "tradeoff")
    assert {name for name, value in versions(experiment()).items() if value != before[name]} == {"tradeoff"}

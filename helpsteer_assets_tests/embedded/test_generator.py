"""The generated rows: their shape, that they are repeatable, and the properties that the demo's trade-off rests on."""

import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys

import pytest

from helpsteer_assets.embedded.generator import ATTRIBUTES, TASKS, build_rows, is_held_out, useful_sentences
from helpsteer_assets.embedded.rater import subject_of

ROWS = build_rows()


def words(row) -> int:
    return len(row["response"].split())


def by_prompt(rows) -> dict[str, list]:
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def preference_pairs(rows, attribute) -> list[tuple[dict, dict]]:
    """(chosen, rejected) over all answers of a prompt; equal ratings make no pair."""
    pairs = []
    for answers in by_prompt(rows).values():
        for first, second in itertools.combinations(answers, 2):
            if first[attribute] != second[attribute]:
                pairs.append((first, second) if first[attribute] > second[attribute] else (second, first))
    return pairs


def test_rows_have_helpsteers_columns_and_ratings_from_0_to_4():
    assert set(ROWS) == {"train", "validation"}
    for row in ROWS["train"] + ROWS["validation"]:
        assert list(row) == ["prompt", "response", *ATTRIBUTES]
        assert all(type(row[name]) is int and 0 <= row[name] <= 4 for name in ATTRIBUTES)
        assert row["prompt"] and row["response"]


def test_every_rating_occurs_for_both_attributes_of_the_demo():
    for attribute in ("helpfulness", "verbosity"):
        assert {row[attribute] for row in ROWS["train"]} == {0, 1, 2, 3, 4}


def test_each_prompt_has_four_distinct_answers_and_sizes_are_kept():
    for split, size in (("train", 800), ("validation", 120)):
        groups = by_prompt(ROWS[split])
        assert len(groups) == size
        assert all(len({row["response"] for row in answers}) == 4 for answers in groups.values())


def test_rows_are_the_same_in_other_processes_with_other_hash_seeds():
    script = (
        "import hashlib, json; from helpsteer_assets.embedded.generator import build_rows;"
        "print(hashlib.sha256(json.dumps(build_rows(50, 20, 7)).encode()).hexdigest())"
    )
    expected = hashlib.sha256(json.dumps(build_rows(50, 20, 7)).encode()).hexdigest()
    for hash_seed in ("0", "123"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected


def test_other_seeds_give_other_rows_and_larger_sizes_only_add_rows():
    small = build_rows(20, 5, seed=3)
    large = build_rows(40, 9, seed=3)
    assert large["train"][: len(small["train"])] == small["train"]
    assert large["validation"][: len(small["validation"])] == small["validation"]
    assert build_rows(20, 5, seed=4) != small


def test_sizes_beyond_the_world_are_refused_by_name():
    with pytest.raises(ValueError, match="train_prompts must be between 0 and 896, not 897"):
        build_rows(897, 0)
    with pytest.raises(ValueError, match="validation_prompts must be between 0 and 384, not -1"):
        build_rows(1, -1)


def test_no_validation_combination_occurs_in_training_whatever_the_seed():
    train = {subject_of(row["prompt"]) for row in build_rows(896, 0, seed=5)["train"]}
    validation = {subject_of(row["prompt"]) for row in build_rows(0, 384, seed=6)["validation"]}
    assert not train & validation
    assert all(is_held_out(*subject) for subject in validation)


def test_each_object_and_each_task_occurs_in_training():
    train = {subject_of(row["prompt"]) for row in ROWS["train"]}
    tasks_of_object = {name: {task for task, other in train if other == name} for _, name in train}
    assert len(tasks_of_object) == 32
    assert {len(tasks) for tasks in tasks_of_object.values()} == {7}
    assert {task for task, _ in train} == set(TASKS)


def test_validation_prompts_are_about_different_combinations():
    # As far as there are held-out combinations; after that, another phrasing of one.
    subjects = [subject_of(prompt) for prompt in by_prompt(ROWS["validation"])]
    assert len(set(subjects)) == 96
    assert max(subjects.count(subject) for subject in subjects) == 2


def test_useful_answers_get_longer_with_every_fact():
    for task in TASKS:
        vague, lead, details = useful_sentences(task, "kettle")
        answers = [vague, *(" ".join([lead, *details[:count]]) for count in range(5))]
        lengths = [len(answer.split()) for answer in answers]
        assert all(longer - shorter >= 2 for shorter, longer in itertools.pairwise(lengths))


def test_verbosity_follows_helpfulness_but_is_not_the_same_thing():
    helpfulness = [row["helpfulness"] for row in ROWS["train"]]
    verbosity = [row["verbosity"] for row in ROWS["train"]]
    assert 0.15 < statistics.correlation(helpfulness, verbosity) < 0.6
    long_answers = [row for row in ROWS["train"] if words(row) >= 35]
    assert sum(row["helpfulness"] <= 1 for row in long_answers) > 0.15 * len(long_answers)


def test_preferred_answers_are_often_longer_and_often_shorter():
    pairs = preference_pairs(ROWS["train"], "helpfulness")
    longer = sum(words(chosen) > words(rejected) for chosen, rejected in pairs) / len(pairs)
    shorter = sum(words(chosen) < words(rejected) for chosen, rejected in pairs) / len(pairs)
    assert longer > shorter > 0.25


def test_the_same_two_kinds_of_answers_are_preferred_in_both_directions():
    """The noise that small weights need: a complete answer loses to its own beginning now and then."""
    nested = [
        words(chosen) > words(rejected)
        for chosen, rejected in preference_pairs(ROWS["train"], "helpfulness")
        if chosen["response"].startswith(rejected["response"]) or rejected["response"].startswith(chosen["response"])
    ]
    assert len(nested) > 500
    assert 0.6 < sum(nested) / len(nested) < 0.95


def test_no_answer_contains_another_objects_or_tasks_answer():
    subjects = {subject_of(row["prompt"]) for row in ROWS["train"] + ROWS["validation"]}
    useful = {}
    for subject in subjects:
        vague, lead, details = useful_sentences(*subject)
        useful[subject] = {vague, lead, *details}
    everything = set().union(*useful.values())
    for row in ROWS["train"] + ROWS["validation"]:
        foreign = everything - useful[subject_of(row["prompt"])]
        sentences = {sentence.strip() + "." for sentence in row["response"].split(".") if sentence.strip()}
        assert not sentences & foreign, row

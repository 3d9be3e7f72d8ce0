"""The generated rows: that they stay the same, their shape, and the properties that the demo's trade-off rests on."""

import hashlib
import itertools
import json
import statistics

from helpsteer_assets.embedded.generator import ATTRIBUTES, build_rows, is_held_out
from helpsteer_assets.embedded.rater import subject_of

ROWS = build_rows()


def words(row) -> int:
    return len(row["response"].split())


def by_prompt(rows) -> dict[str, list]:
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def test_the_demos_rows_are_the_same_in_every_process_and_version():
    digest = hashlib.sha256(json.dumps(ROWS).encode()).hexdigest()
    assert digest == "8aea6559a6bfa5a2d2482e5bbc214e65ccaaa881cbe101da390922d2d8fdbda2"


def test_rows_have_helpsteers_form():
    for split, size in (("train", 800), ("validation", 120)):
        groups = by_prompt(ROWS[split])
        assert len(groups) == size
        assert all(len({row["response"] for row in answers}) == 4 for answers in groups.values())
        for row in ROWS[split]:
            assert list(row) == ["prompt", "response", *ATTRIBUTES]
            assert all(type(row[name]) is int and 0 <= row[name] <= 4 for name in ATTRIBUTES)
    for attribute in ("helpfulness", "verbosity"):
        assert {row[attribute] for row in ROWS["train"]} == {0, 1, 2, 3, 4}


def test_validation_combinations_never_occur_in_training_whatever_the_seed():
    train = {subject_of(row["prompt"]) for row in build_rows(896, 0, seed=5)["train"]}
    validation = {subject_of(row["prompt"]) for row in build_rows(0, 384, seed=6)["validation"]}
    assert not train & validation
    assert all(is_held_out(*subject) for subject in validation)


def test_verbosity_follows_helpfulness_but_is_not_the_same_thing():
    helpfulness, verbosity = ([row[name] for row in ROWS["train"]] for name in ("helpfulness", "verbosity"))
    assert 0.15 < statistics.correlation(helpfulness, verbosity) < 0.6
    long_answers = [row for row in ROWS["train"] if words(row) >= 35]
    assert sum(row["helpfulness"] <= 1 for row in long_answers) > 0.15 * len(long_answers)


def test_longer_answers_win_more_often_and_lose_often_enough():
    """Small weights need both directions, also between a complete answer and its own beginning."""
    pairs = [
        sorted(pair, key=lambda row: -row["helpfulness"])
        for answers in by_prompt(ROWS["train"]).values()
        for pair in itertools.combinations(answers, 2)
        if pair[0]["helpfulness"] != pair[1]["helpfulness"]
    ]
    longer = sum(words(chosen) > words(rejected) for chosen, rejected in pairs) / len(pairs)
    shorter = sum(words(chosen) < words(rejected) for chosen, rejected in pairs) / len(pairs)
    assert longer > shorter > 0.25
    nested = [
        words(chosen) > words(rejected)
        for chosen, rejected in pairs
        if chosen["response"].startswith(rejected["response"]) or rejected["response"].startswith(chosen["response"])
    ]
    assert len(nested) > 500
    assert 0.6 < sum(nested) / len(nested) < 0.95

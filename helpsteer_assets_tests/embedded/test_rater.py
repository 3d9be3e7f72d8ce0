"""The rater: the generator's latent ratings on its own answers, sensible ones on everything else."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.embedded.generator import (
    ATTRIBUTES,
    CLOSERS,
    EVASIONS,
    FILLERS,
    OPENERS,
    build_rows,
    useful_sentences,
)
from helpsteer_assets.embedded.rater import rate

PROMPT = "How do I clean my kettle?"
_, LEAD, DETAILS = useful_sentences("clean", "kettle")
ROWS = build_rows()["train"]


@pytest.mark.parametrize(
    ("response", "helpfulness", "correctness", "coherence", "complexity"),
    [
        ("Wipe it.", 1.2, 3, 4, 0),
        (LEAD, 2.4, 4, 4, 0),
        (" ".join([LEAD, *DETAILS]), 4, 4, 4, 3),
        (f"  {LEAD}\n\n{DETAILS[0]} ", 2.4 + 1.6 * 0.34, 4, 4, 0.75),
        (EVASIONS[0], 0.4, 1, 4, 0),
        (" ".join([OPENERS[0], *FILLERS[:3], CLOSERS[0]]), 0, 0, 2.75, 0),
        (" ".join([LEAD, *FILLERS[:2], CLOSERS[0]]), 2.4 - 3 * 0.2, 4, 3.25, 0),
        ("", 0, 0, 0, 0),
        (" \n\t", 0, 0, 0, 0),
    ],
)
def test_latent_ratings_of_each_kind_of_answer(response, helpfulness, correctness, coherence, complexity):
    verbosity = max(0, len(response.split()) - 2) / 12
    expected = dict(zip(ATTRIBUTES, (helpfulness, correctness, coherence, complexity, verbosity), strict=True))
    assert rate(PROMPT, response) == pytest.approx(expected)


def test_generated_ratings_are_the_raters_with_the_annotators_noise():
    """Clipping and rounding move means near the ends, so only the middle of the scale is held to be unbiased."""
    for attribute, noise in (("helpfulness", 0.9), ("verbosity", 0.5)):
        latent = [rate(row["prompt"], row["response"])[attribute] for row in ROWS]
        errors = [row[attribute] - value for row, value in zip(ROWS, latent, strict=True) if 1.4 < value < 2.6]
        assert len(errors) > 400
        assert abs(statistics.mean(errors)) < 0.1
        assert noise * 0.85 < statistics.stdev(errors) < noise * 1.15 + 0.1


def test_every_generated_answer_is_read_as_whole_and_about_its_prompt():
    for row in ROWS:
        ratings = rate(row["prompt"], row["response"])
        assert ratings["coherence"] >= 4 - 5 * 0.25
        assert ratings["correctness"] in {0.0, 1.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("flaw", "is_foreign"),
    [
        (useful_sentences("clean", "bicycle")[1], True),
        (useful_sentences("sell", "kettle")[2][2], True),
        ("Begin at the the lid work.", False),
        ("Begin at the", False),
        (LEAD, False),
    ],
    ids=["another object's", "another task's", "damaged", "cut", "repeated"],
)
def test_foreign_damaged_and_repeated_sentences_are_worth_less_than_nothing(flaw, is_foreign):
    whole, flawed = rate(PROMPT, LEAD), rate(PROMPT, f"{LEAD} {flaw}")
    assert flawed["helpfulness"] < whole["helpfulness"]
    assert flawed["coherence"] < whole["coherence"]
    assert not is_foreign or flawed["correctness"] == 2.5
    assert not is_foreign or rate(PROMPT, flaw)["helpfulness"] == 0.0


@settings(max_examples=200, deadline=None)
@given(prompt=st.one_of(st.text(), st.just(PROMPT)), response=st.text())
def test_any_text_gets_ratings_in_range(prompt, response):
    ratings = rate(prompt, response)
    assert list(ratings) == list(ATTRIBUTES)
    assert all(value is None or 0.0 <= value <= 4.0 for value in ratings.values())

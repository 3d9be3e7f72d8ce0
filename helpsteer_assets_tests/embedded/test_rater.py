"""The rater: the generator's latent ratings on its own answers, sensible ones on everything else."""

import itertools
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
from helpsteer_assets.embedded.rater import rate, subject_of

PROMPT = "How do I clean my kettle?"
_, LEAD, DETAILS = useful_sentences("clean", "kettle")
ROWS = build_rows()["train"]


def test_latent_ratings_of_each_kind_of_answer():
    assert rate(PROMPT, "Wipe it.") == {
        "helpfulness": 1.2,
        "correctness": 3.0,
        "coherence": 4.0,
        "complexity": 0.0,
        "verbosity": 0.0,
    }
    assert rate(PROMPT, LEAD)["helpfulness"] == 2.4
    complete = rate(PROMPT, " ".join([LEAD, *DETAILS]))
    assert complete["helpfulness"] == pytest.approx(4.0)
    assert (complete["correctness"], complete["coherence"], complete["complexity"]) == (4.0, 4.0, 3.0)
    assert rate(PROMPT, EVASIONS[0])["helpfulness"] == 0.4
    waffle = rate(PROMPT, " ".join([OPENERS[0], *FILLERS[:3], CLOSERS[0]]))
    assert (waffle["helpfulness"], waffle["correctness"]) == (0.0, 0.0)
    padded = rate(PROMPT, " ".join([LEAD, *FILLERS[:2], CLOSERS[0]]))
    assert padded["helpfulness"] == pytest.approx(2.4 - 3 * 0.2)
    assert padded["verbosity"] > rate(PROMPT, LEAD)["verbosity"] + 1.5


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


def test_each_further_fact_helps_less_and_adds_words():
    ratings = [rate(PROMPT, " ".join([LEAD, *DETAILS[:count]])) for count in range(5)]
    gains = [after["helpfulness"] - before["helpfulness"] for before, after in itertools.pairwise(ratings)]
    assert gains == pytest.approx([1.6 * 0.34, 1.6 * 0.28, 1.6 * 0.22, 1.6 * 0.16])
    assert [rating["verbosity"] for rating in ratings] == sorted({rating["verbosity"] for rating in ratings})


def test_details_are_worth_more_the_harder_the_task():
    gains = []
    for task in ("clean", "sell", "paint"):
        _, lead, details = useful_sentences(task, "kettle")
        prompt = f"How do I {task} my kettle?"
        assert rate(prompt, " ".join([lead, *details]))["helpfulness"] == pytest.approx(4.0)
        gains.append(rate(prompt, f"{lead} {details[0]}")["helpfulness"] - rate(prompt, lead)["helpfulness"])
    assert gains == sorted(gains)
    assert gains[2] == pytest.approx(2 * gains[0])


def test_foreign_content_costs_helpfulness_and_correctness():
    other_lead = useful_sentences("clean", "bicycle")[1]
    other_task = useful_sentences("sell", "kettle")[2][2]
    clean = rate(PROMPT, LEAD)
    for foreign in (other_lead, other_task):
        ratings = rate(PROMPT, f"{LEAD} {foreign}")
        assert ratings["helpfulness"] < clean["helpfulness"]
        assert ratings["correctness"] < clean["correctness"]
        assert ratings["coherence"] < clean["coherence"]
    assert rate(PROMPT, other_lead)["helpfulness"] == 0.0


def test_damaged_and_repeated_sentences_lower_coherence():
    whole = rate(PROMPT, f"{LEAD} {DETAILS[0]}")
    damaged = rate(PROMPT, f"{LEAD} Begin at the the lid work.")
    cut = rate(PROMPT, f"{LEAD} Begin at the")
    repeated = rate(PROMPT, f"{LEAD} {LEAD}")
    for ratings in (damaged, cut, repeated):
        assert ratings["coherence"] < whole["coherence"]
        assert ratings["helpfulness"] < whole["helpfulness"]
    assert rate(PROMPT, "lid. lid lid. a kettle. the")["coherence"] == 0.0


@pytest.mark.parametrize("response", ["", " \n\t"])
def test_empty_answers_are_rated_zero(response):
    assert rate(PROMPT, response) == dict.fromkeys(ATTRIBUTES, 0.0)


def test_of_unknown_prompts_only_form_is_rated():
    ratings = rate("What is the capital of France?", LEAD)
    assert ratings["helpfulness"] is ratings["correctness"] is ratings["complexity"] is None
    assert ratings["coherence"] == 4.0
    assert ratings["verbosity"] is not None


def test_prompts_in_other_words_are_understood_where_they_are_unambiguous():
    assert subject_of("  PLEASE: clean kettle!\n") == ("clean", "kettle")
    assert subject_of("clean the kettle or the sofa?") is None
    assert subject_of("the kettle") is None


def test_white_space_between_words_does_not_matter():
    assert rate(PROMPT, f"  {LEAD}\n\n{DETAILS[0]} ") == rate(PROMPT, f"{LEAD} {DETAILS[0]}")


@settings(max_examples=200, deadline=None)
@given(prompt=st.one_of(st.text(), st.just(PROMPT)), response=st.text())
def test_any_text_gets_ratings_in_range(prompt, response):
    ratings = rate(prompt, response)
    assert list(ratings) == list(ATTRIBUTES)
    assert all(value is None or 0.0 <= value <= 4.0 for value in ratings.values())

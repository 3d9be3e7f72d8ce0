import hashlib
import json
import random
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data import pairs as pairs_module
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.pairs import (
    PAIRS_SCHEMA,
    RATED,
    count_pairs,
    count_texts,
    describe_pairs,
    select_evaluation_prompts,
    unique_responses,
)
from helpsteer_assets.modpo.data.ratings import prompt_id, response_id, rows_to_ratings
from helpsteer_assets.modpo.data.readers import COLUMNS

Row = dict[str, Any]


def row(prompt: str, response: str, *ratings: int) -> Row:
    return dict(zip(COLUMNS, (prompt, response, *ratings), strict=True))


def ratings_of(train: list[Row], validation: list[Row] | None = None) -> pa.Table:
    rows = {"train": train, "validation": validation or [row("held out", "yes", 0, 0, 0, 0, 0)]}
    with tempfile.TemporaryDirectory() as folder:
        rows_to_ratings(rows, Path(folder) / "ratings.parquet")
        return pq.read_table(Path(folder) / "ratings.parquet")


def build_pairs(ratings: pa.Table, attribute: str, selection_share: float) -> pa.Table:
    with tempfile.TemporaryDirectory() as folder:
        pairs_module.build_pairs(ratings, attribute, selection_share, Path(folder) / "pairs.parquet")
        return pq.read_table(Path(folder) / "pairs.parquet")


def many_rows(prompts: int, tag: str = "") -> list[Row]:
    """Four responses each, one longer than the other, whose helpfulness is 0 to 3."""
    return [row(f"{tag}{p}", "word " * (r + 1), r, 2, 2, 2, 4 - r) for p in range(prompts) for r in range(4)]


def brute_force(ratings: pa.Table, attribute: str) -> dict[tuple[str, str, str], Row]:
    """(split, chosen_id, rejected_id) -> the ratings of both, by comparing all rows with all; selection is train."""
    best: dict[tuple[str, str, str], tuple[Any, Row]] = {}
    rows = [r | {"overall": sum(r[a] for a in ATTRIBUTES)} for r in ratings.to_pylist()]
    for chosen, rejected in permutations(rows, 2):
        same = chosen["split"] == rejected["split"] and chosen["prompt"] == rejected["prompt"]
        if same and chosen["response"] != rejected["response"] and chosen[attribute] > rejected[attribute]:
            key = (chosen["split"], chosen["response_id"], rejected["response_id"])
            rated = {f"{side}_{a}": r[a] for a in RATED for side, r in (("chosen", chosen), ("rejected", rejected))}
            order = (
                rejected[attribute] - chosen[attribute],
                *(rated[f"{side}_{a}"] for side in ("chosen", "rejected") for a in ATTRIBUTES),
            )
            if key not in best or order < best[key][0]:
                best[key] = (order, rated)
    return {key: rated for key, (_, rated) in best.items()}


rating = st.integers(0, 4)
responses = st.builds(row, st.sampled_from("abcd"), st.sampled_from("vwxyz"), rating, rating, rating, rating, rating)
held_out = st.builds(row, st.sampled_from("ABC"), st.sampled_from("xyz"), rating, rating, rating, rating, rating)


class TestBuildPairs:
    @settings(max_examples=12, deadline=None)
    @given(
        train=st.lists(responses, max_size=20),
        validation=st.lists(held_out, min_size=1, max_size=8),
        attribute=st.sampled_from(RATED),
        seed=st.randoms(use_true_random=False),
    )
    def test_they_are_all_pairs_wherever_the_rows_stand(
        self, train: list[Row], validation: list[Row], attribute: str, seed: random.Random
    ) -> None:
        # Two responses of known order, so that there is a train pair whatever was drawn.
        train = [*train, row("known", "high", 4, 4, 4, 4, 4), row("known", "low", 0, 0, 0, 0, 0)]
        ratings = ratings_of(train, validation)
        pairs = build_pairs(ratings, attribute, 0.0)
        made = {
            (r["split"], r["chosen_id"], r["rejected_id"]): {
                f"{side}_{a}": r[f"{side}_{a}"] for a in RATED for side in ("chosen", "rejected")
            }
            for r in pairs.to_pylist()
        }
        expected = brute_force(ratings, attribute)
        assert made == expected
        assert len(pairs) == len(expected)
        seed.shuffle(train)
        seed.shuffle(validation)
        assert build_pairs(ratings_of(train, validation), attribute, 0.0) == pairs

    def test_columns_ids_and_order(self) -> None:
        ratings = ratings_of(many_rows(30), many_rows(5, tag="new "))
        pairs = build_pairs(ratings, "helpfulness", 0.3)
        assert pairs.schema == PAIRS_SCHEMA
        rows = pairs.to_pylist()
        assert len(rows) == 35 * 6
        for r in rows:
            assert r["prompt_id"] == prompt_id(r["prompt"])
            assert r["chosen_id"] == response_id(r["prompt"], r["chosen"])
            assert r["rejected_id"] == response_id(r["prompt"], r["rejected"])
            assert r["pair_id"] == hashlib.sha256(f"{r['chosen_id']}{r['rejected_id']}".encode()).hexdigest()[:16]
            assert r["chosen_overall"] == sum(r[f"chosen_{a}"] for a in ATTRIBUTES)
            assert r["chosen_helpfulness"] == len(r["chosen"].split()) - 1
        assert len({r["pair_id"] for r in rows}) == len(rows)
        order = [(r["split"], r["prompt_id"], r["pair_id"]) for r in rows]
        assert order == sorted(order)

    def test_selection_holds_out_whole_train_prompts_and_a_larger_share_adds_to_them(self) -> None:
        ratings = ratings_of(many_rows(300), many_rows(40, tag="new "))

        def prompts(share: float) -> dict[str, set[str]]:
            by_split: dict[str, set[str]] = {"train": set(), "selection": set(), "validation": set()}
            for r in build_pairs(ratings, "helpfulness", share).to_pylist():
                by_split[r["split"]].add(r["prompt_id"])
            return by_split

        small, large = prompts(0.1), prompts(0.4)
        assert 12 < len(small["selection"]) < 55
        assert small["selection"] < large["selection"]
        assert not large["selection"] & large["train"]
        assert len(large["selection"] | large["train"]) == 300
        assert small["validation"] == large["validation"] == {prompt_id(f"new {p}") for p in range(40)}

    @pytest.mark.parametrize(
        ("attribute", "share", "message"),
        [
            ("correctness", 0.05, "helpfulness 30, correctness 0, coherence 0, complexity 0, verbosity 30, overall 0"),
            ("helpfulness", 1 - 1e-12, "but for 30 pairs held out by data.selection_share"),
        ],
    )
    def test_no_train_pairs_is_an_error_with_the_counts(self, attribute: str, share: float, message: str) -> None:
        ratings = ratings_of(many_rows(5), [row("v", "good", 2, 4, 2, 2, 2), row("v", "bad", 2, 0, 2, 2, 2)])
        with pytest.raises(HelpsteerError, match=f"{attribute} makes no train pairs.*{message}"):
            build_pairs(ratings, attribute, share)


def test_describe_pairs() -> None:
    train = [
        row("a", "one two three", 4, 0, 0, 0, 3),
        row("a", "one\u00a0two", 2, 0, 0, 0, 3),
        row("a", "one", 2, 0, 0, 0, 4),
        row("a", "one", 2, 0, 0, 0, 1),
        row("b", "tied", 1, 0, 0, 0, 1),
        row("b", "too", 1, 0, 0, 0, 1),
    ]
    validation = [row("v", "a b", 3, 0, 0, 0, 4), row("v", "a  b ", 0, 0, 0, 0, 1), row("v", "a b c d", 0, 0, 0, 0, 4)]
    ratings = ratings_of(train, validation)
    pairs = build_pairs(ratings, "helpfulness", 0.0)
    # a: "one two three" over "one two" (verbosity ties) and over "one" (its lower verbosity 1 is kept: agrees);
    # v: "a b" over "a  b " (agrees) and over "a b c d" (ties).
    described = describe_pairs(pairs, ratings, "helpfulness", "verbosity")
    assert described == {
        "pairs": {"train": 2, "selection": 0, "validation": 2},
        "prompts": {"train": 1, "selection": 0, "validation": 1},
        "ties": 2 + 1 + 1,
        "duplicate_responses": 1,
        "other": {"attribute": "verbosity", "agrees": 0.5, "opposes": 0.0, "ties": 0.5},
        "chosen_ratings": {"3": 2, "4": 2},
        "rejected_ratings": {"0": 2, "2": 2},
        "chosen_words": (3 + 3 + 2 + 2) / 4,
        "rejected_words": (2 + 1 + 2 + 4) / 4,
        "chosen_longer": 0.5,
    }
    assert json.loads(json.dumps(described)) == described


def test_evaluation_prompts_are_unique_validation_prompts_and_a_larger_count_only_adds() -> None:
    train, validation = many_rows(10), many_rows(30, tag="new ")
    few = select_evaluation_prompts(ratings_of(train, validation), 8).to_pylist()
    more = select_evaluation_prompts(ratings_of(train[::-1], validation[::-1]), 20).to_pylist()
    assert few == more[:8] and len({r["prompt"] for r in more}) == 20
    assert all(r["prompt"].startswith("new ") and r["prompt_id"] == prompt_id(r["prompt"]) for r in more)
    with pytest.raises(HelpsteerError, match=r"no validation prompts to evaluate on .* data.validation_share"):
        select_evaluation_prompts(ratings_of(many_rows(3), many_rows(3)), 300)


def test_unique_responses_are_all_responses_of_all_pair_tables_once() -> None:
    train = [*many_rows(20), row("x", "good", 4, 1, 1, 1, 1), row("x", "bad", 0, 1, 1, 1, 1)]
    train += [row("y", "good", 1, 1, 1, 1, 4), row("y", "bad", 1, 1, 1, 1, 0), row("z", "lone", 1, 1, 1, 1, 0)]
    ratings = ratings_of(train, many_rows(5, tag="new "))
    pairs, margin_pairs = build_pairs(ratings, "helpfulness", 0.2), build_pairs(ratings, "verbosity", 0.2)
    unique = unique_responses(margin_pairs, pairs)
    assert unique == unique_responses(pairs, margin_pairs)
    rows = unique.to_pylist()
    assert list(rows[0]) == ["prompt_id", "response_id", "prompt", "response"]
    ids = [(r["prompt_id"], r["response_id"]) for r in rows]
    assert ids == sorted(set(ids))
    rated = {(r["prompt"], r["response"]) for r in ratings.to_pylist() if r["prompt"] not in ("z", "held out")}
    assert {(r["prompt"], r["response"]) for r in rows} == rated
    of_pairs = pairs.to_pylist()
    for splits in (("train",), ("selection", "validation")):
        chosen = unique_responses(pairs, splits=splits, sides=("chosen",))
        assert set(chosen["response_id"].to_pylist()) == {r["chosen_id"] for r in of_pairs if r["split"] in splits}
        counts = count_texts(pairs, splits=splits, sides=("chosen",))
        assert counts == (len(set(chosen["prompt_id"].to_pylist())), len(chosen))


def test_pairs_and_ties_are_counted_for_all_attributes_as_they_are_made() -> None:
    rows = build_rows(60, 10)
    ratings = ratings_of([*rows["train"], *rows["train"][:9]], rows["validation"])
    counts = count_pairs(ratings, 0.1)
    for attribute in ("helpfulness", "overall"):
        described = describe_pairs(build_pairs(ratings, attribute, 0.1), ratings, attribute, attribute)
        assert counts[attribute] == {**described["pairs"], "tied": described["ties"]}
    assert all(all(counts[attribute].values()) for attribute in RATED)

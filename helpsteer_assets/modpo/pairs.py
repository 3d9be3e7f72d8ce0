"""Preference pairs: which of two responses to one prompt is rated higher on an attribute.

Pairs are formed over all responses to a prompt within one split, wherever their rows stand. Every function's result
depends on the set of rows alone, never on their order.
"""

import hashlib
from collections import Counter
from typing import Any

import pyarrow as pa

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.attributes import ATTRIBUTES, OVERALL
from helpsteer_assets.modpo.ratings import hash_share, query

RATED = (*ATTRIBUTES, OVERALL)
SPLITS = ("train", "selection", "validation")

PAIRS_SCHEMA = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("pair_id", "prompt_id", "split", "prompt", "chosen_id", "rejected_id", "chosen", "rejected")
    ]
    + [pa.field(f"{side}_{name}", pa.int8(), nullable=False) for side in ("chosen", "rejected") for name in RATED]
)
"""`split` is train, selection (train prompts held out to choose checkpoints) or validation."""

_OVERALL_SQL = " + ".join(ATTRIBUTES)


def pair_id(chosen_id: str, rejected_id: str) -> str:
    """First 16 hex digits of the SHA-256 of both response ids, in this order."""
    return hashlib.sha256((chosen_id + rejected_id).encode()).hexdigest()[:16]


def build_pairs(ratings: pa.Table, attribute: str, selection_share: float) -> pa.Table:
    """All pairs that an attribute decides.

    Equal ratings make no pair, nor do equal responses. Where a response was rated more than once, the same pair can
    arise more than once: the one whose ratings lie furthest apart is kept. (Two ratings of a response may also put it
    above another and below it; both pairs stay, as annotators' disagreement.)

    Args:
        ratings: RATINGS_SCHEMA.
        attribute: one of RATED; `overall` is the sum of the five attributes.
        selection_share: share of the train prompts, by a stable hash, whose pairs become `selection`, in [0, 1).

    Returns PAIRS_SCHEMA, ordered by split, prompt_id and pair_id. Raises HelpsteerError where no train pair arises.
    """
    pairs = query(
        f"""
        WITH responses AS (
            SELECT *, {_OVERALL_SQL} AS {OVERALL}, CASE
                WHEN split = 'train' AND {hash_share("selection", "prompt_id")} < $selection_share THEN 'selection'
                ELSE split END AS part
            FROM ratings
        ), pairs AS (
            SELECT part AS split, prompt_id,
                chosen.response_id AS chosen_id, rejected.response_id AS rejected_id,
                {_rated_columns("chosen")}, {_rated_columns("rejected")}
            FROM responses AS chosen JOIN responses AS rejected USING (part, prompt_id)
            WHERE chosen.{attribute} > rejected.{attribute} AND chosen.response_id <> rejected.response_id
        ), distinct_pairs AS (
            FROM pairs QUALIFY row_number() OVER (
                PARTITION BY split, chosen_id, rejected_id
                ORDER BY rejected_{attribute} - chosen_{attribute},
                    {", ".join(f"{side}_{name}" for side in ("chosen", "rejected") for name in ATTRIBUTES)}
            ) = 1
        ), texts AS (
            SELECT response_id, any_value(prompt) AS prompt, any_value(response) AS response
            FROM ratings GROUP BY response_id
        )
        SELECT left(sha256(chosen_id || rejected_id), 16) AS pair_id, distinct_pairs.*,
            chosen.prompt, chosen.response AS chosen, rejected.response AS rejected
        FROM distinct_pairs
            JOIN texts AS chosen ON chosen.response_id = chosen_id
            JOIN texts AS rejected ON rejected.response_id = rejected_id
        ORDER BY split, prompt_id, pair_id
        """,
        {"selection_share": selection_share},
        ratings=ratings,
    )
    pairs = pairs.select(PAIRS_SCHEMA.names).cast(PAIRS_SCHEMA)
    in_selection = pairs["split"].to_pylist().count("selection")
    if "train" not in set(pairs["split"].to_pylist()):
        counts = ", ".join(f"{name} {count}" for name, count in count_train_pairs(ratings).items())
        raise HelpsteerError(
            f"{attribute} makes no train pairs: every two responses to a train prompt are rated equally on it"
            + (f", but for {in_selection} pairs held out by data.selection_share" if in_selection else "")
            + f". Train pairs by attribute, those held out included: {counts}. Choose another attribute "
            "(data.preference_attribute, data.margin_attribute) or give more ratings"
        )
    return pairs


def _rated_columns(side: str) -> str:
    return ", ".join(f"{side}.{name} AS {side}_{name}" for name in RATED)


def count_train_pairs(ratings: pa.Table) -> dict[str, int]:
    """How many different pairs each attribute makes of the train prompts, those held out for selection included."""
    counted = ", ".join(
        f"count(DISTINCT chosen.response_id || rejected.response_id) FILTER (chosen.{name} > rejected.{name}) AS {name}"
        for name in RATED
    )
    return query(
        f"""
        WITH responses AS (SELECT *, {_OVERALL_SQL} AS {OVERALL} FROM ratings WHERE split = 'train')
        SELECT {counted} FROM responses AS chosen JOIN responses AS rejected USING (prompt_id)
        WHERE chosen.response_id <> rejected.response_id
        """,
        ratings=ratings,
    ).to_pylist()[0]


def describe_pairs(pairs: pa.Table, ratings: pa.Table, attribute: str, other: str) -> dict[str, Any]:
    """What the pairs of an attribute are like, JSON-able; shares and means are over the pairs of all splits.

    Args:
        pairs: as `build_pairs(ratings, attribute, ...)` returned them.
        ratings: RATINGS_SCHEMA.
        attribute: the one that decides the pairs.
        other: another attribute, to see how far it goes along.

    Returns
        pairs, prompts: their number by split;
        ties: different responses to one prompt of one split, rated equally (no pair), counted as two rows;
        duplicate_responses: rows that repeat a response to the same prompt of the same split;
        other: its name, and the shares of pairs in which the chosen response is rated higher on it (`agrees`), lower
            (`opposes`) and equally (`ties`);
        chosen_ratings, rejected_ratings: pairs by rating on the attribute;
        chosen_words, rejected_words: mean number of words (separated by white space);
        chosen_longer: share of pairs in which the chosen response has more words.
    """
    count = len(pairs)
    if not count:
        raise ValueError("there are no pairs to describe")
    splits = Counter(pairs["split"].to_pylist())
    prompts = Counter(
        split for split, _ in set(zip(pairs["split"].to_pylist(), pairs["prompt_id"].to_pylist(), strict=True))
    )
    ties = query(
        f"""
        WITH responses AS (SELECT *, {_OVERALL_SQL} AS {OVERALL} FROM ratings)
        SELECT count(*) AS ties FROM responses AS one JOIN responses AS two USING (split, prompt_id, {attribute})
        WHERE one.response_id < two.response_id
        """,
        ratings=ratings,
    )["ties"][0].as_py()
    duplicates = query(
        "SELECT count(*) - count(DISTINCT (split, response_id)) AS duplicates FROM ratings", ratings=ratings
    )["duplicates"][0].as_py()
    differences = [
        chosen - rejected
        for chosen, rejected in zip(
            pairs[f"chosen_{other}"].to_pylist(), pairs[f"rejected_{other}"].to_pylist(), strict=True
        )
    ]
    words = {
        response_id: len(response.split())
        for response_id, response in zip(
            *(unique_responses(pairs)[name].to_pylist() for name in ("response_id", "response")), strict=True
        )
    }
    chosen_words = [words[response] for response in pairs["chosen_id"].to_pylist()]
    rejected_words = [words[response] for response in pairs["rejected_id"].to_pylist()]
    return {
        "pairs": {split: splits[split] for split in SPLITS},
        "prompts": {split: prompts[split] for split in SPLITS},
        "ties": ties,
        "duplicate_responses": duplicates,
        "other": {
            "attribute": other,
            "agrees": sum(difference > 0 for difference in differences) / count,
            "opposes": sum(difference < 0 for difference in differences) / count,
            "ties": differences.count(0) / count,
        },
        "chosen_ratings": _histogram(pairs[f"chosen_{attribute}"]),
        "rejected_ratings": _histogram(pairs[f"rejected_{attribute}"]),
        "chosen_words": sum(chosen_words) / count,
        "rejected_words": sum(rejected_words) / count,
        "chosen_longer": sum(c > r for c, r in zip(chosen_words, rejected_words, strict=True)) / count,
    }


def _histogram(ratings: pa.ChunkedArray) -> dict[str, int]:
    """Pairs by rating; the keys are text, as in JSON."""
    return {str(rating): count for rating, count in sorted(Counter(ratings.to_pylist()).items())}


def select_evaluation_prompts(ratings: pa.Table, count: int) -> pa.Table:
    """`prompt_id` and `prompt` of the `count` unique validation prompts that come first by a stable hash.

    A larger count only adds prompts at the end. Where there are fewer than asked for, all of them. Raises
    HelpsteerError where there are none.
    """
    prompts = query(
        """
        SELECT prompt_id, any_value(prompt) AS prompt FROM ratings WHERE split = 'validation' GROUP BY prompt_id
        ORDER BY sha256('evaluation:' || prompt_id) LIMIT $count
        """,
        {"count": count},
        ratings=ratings,
    )
    if not len(prompts):
        raise HelpsteerError(
            "there are no validation prompts to evaluate on (prompts that stand in train too do not count): add a "
            "validation file to data.source; or, where one file is split by a hash, give more prompts or raise "
            "data.validation_share"
        )
    return prompts


def unique_responses(*pairs: pa.Table) -> pa.Table:
    """Every (prompt, response) in the pairs once, as prompt_id, response_id, prompt, response, ordered by the ids."""
    sides = " UNION ALL ".join(
        f"SELECT prompt_id, {side}_id AS response_id, prompt, {side} AS response FROM pairs_{number}"
        for number in range(len(pairs))
        for side in ("chosen", "rejected")
    )
    return query(
        f"""
        SELECT prompt_id, response_id, any_value(prompt) AS prompt, any_value(response) AS response FROM ({sides})
        GROUP BY prompt_id, response_id ORDER BY prompt_id, response_id
        """,
        **{f"pairs_{number}": table for number, table in enumerate(pairs)},
    )

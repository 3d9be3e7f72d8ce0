"""Preference pairs: which of two responses to one prompt is rated higher on an attribute.

Pairs are formed over all responses to a prompt within one split, wherever their rows stand. Every function's result
depends on the set of rows alone, never on their order. Files of ratings and pairs are read by the columns that are
needed, and never whole.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL
from helpsteer_assets.modpo.data.ratings import hash_share
from helpsteer_assets.modpo.data.tables import Source, database, query, stream, write_parquet

if TYPE_CHECKING:
    import duckdb

RATED = (*ATTRIBUTES, OVERALL)
SPLITS = ("train", "selection", "validation")

PAIRS_SCHEMA = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("pair_id", "prompt_id", "split", "prompt", "chosen_id", "rejected_id", "chosen", "rejected")
    ]
    + [pa.field(f"{side}_{name}", pa.int8(), nullable=False) for side in ("chosen", "rejected") for name in RATED]
)
"""`split` is train, selection (train prompts held out to choose checkpoints) or validation. `pair_id` is the first 16
hex digits of the SHA-256 of both response ids."""

_RESPONSES_SCHEMA = pa.schema([(name, pa.string()) for name in ("prompt_id", "response_id", "prompt", "response")])
_SHELF = "left(prompt_id, 1)"
_STRETCH_ROWS = 16_384
"""Responses of pairs whose texts the database holds at a time."""

_MOST_COMPARED = 10**9
"""Comparisons of two responses to one prompt: the work of minutes. Where a prompt has four responses, 60 million
prompts make as many."""

_OVERALL_SQL = " + ".join(ATTRIBUTES)
_RESPONSES_SQL = f"""
    SELECT prompt_id, response_id, {", ".join(ATTRIBUTES)}, {_OVERALL_SQL} AS {OVERALL}, CASE
        WHEN split = 'train' AND {hash_share("selection", "prompt_id")} < $selection_share THEN 'selection'
        ELSE split END AS part, count(*) AS rows
    FROM ratings GROUP BY ALL
"""
"""The rated responses of `ratings`, equal rows once: every two of a million equal rows would be compared. `part` is one
of SPLITS, and `rows` says how many rows were equal."""


def build_pairs(ratings: Source, attribute: str, selection_share: float, file: Path) -> dict[str, int]:
    """Write all pairs that an attribute decides; returns their number in each of SPLITS.

    Equal ratings make no pair, nor do equal responses. Where a response was rated more than once, the same pair can
    arise more than once: the one whose ratings lie furthest apart is kept. (Two ratings of a response may also put it
    above another and below it; both pairs stay, as annotators' disagreement.)

    Args:
        ratings: RATINGS_SCHEMA.
        attribute: one of RATED; `overall` is the sum of the five attributes.
        selection_share: share of the train prompts, by a stable hash, whose pairs become `selection`, in [0, 1).
        file: the Parquet file to write, ordered by split, prompt_id and pair_id (PAIRS_SCHEMA); its folder is used for
            temporary files.

    Raises HelpsteerError where no train pair arises, and where one prompt has so many responses that all too many do.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".pairs-", dir=file.parent) as scratch,
        database(Path(scratch), ratings=ratings) as connection,
    ):
        counts = _decide_pairs(connection, ratings, attribute, selection_share)
        _lay_out_texts(connection, Path(scratch) / "texts")
        write_parquet(_join_texts(connection, Path(scratch) / "texts"), PAIRS_SCHEMA, file)
    return counts


def _decide_pairs(
    connection: "duckdb.DuckDBPyConnection", ratings: Source, attribute: str, selection_share: float
) -> dict[str, int]:
    """Make the table `pairs`, PAIRS_SCHEMA without texts, of the table `ratings`; returns their number by split."""
    connection.execute(f"CREATE TABLE responses AS {_RESPONSES_SQL}", {"selection_share": selection_share})
    _require_few_responses(connection)
    connection.execute(
        f"""
        CREATE TABLE pairs AS
        WITH pairs AS (
            SELECT part AS split, prompt_id,
                chosen.response_id AS chosen_id, rejected.response_id AS rejected_id,
                {_rated_columns("chosen")}, {_rated_columns("rejected")}
            FROM responses AS chosen JOIN responses AS rejected USING (part, prompt_id)
            WHERE chosen.{attribute} > rejected.{attribute} AND chosen.response_id <> rejected.response_id
        )
        SELECT left(sha256(chosen_id || rejected_id), 16) AS pair_id, * FROM pairs QUALIFY row_number() OVER (
            PARTITION BY split, chosen_id, rejected_id
            ORDER BY rejected_{attribute} - chosen_{attribute},
                {", ".join(f"{side}_{name}" for side in ("chosen", "rejected") for name in ATTRIBUTES)}
        ) = 1
        """
    )
    by_split = connection.sql("SELECT split, count(*) FROM pairs GROUP BY split").fetchall()
    counts = dict.fromkeys(SPLITS, 0) | dict(by_split)
    if not counts["train"]:
        in_train = count_pairs(ratings, selection_share=0)
        by_attribute = ", ".join(f"{name} {counted['train']}" for name, counted in in_train.items())
        held_out = (
            f", but for {counts['selection']} pairs held out by data.selection_share" if counts["selection"] else ""
        )
        raise HelpsteerError(
            f"{attribute} makes no train pairs: every two responses to a train prompt are rated equally on "
            f"it{held_out}. Train pairs by attribute, those held out included: {by_attribute}. Choose another "
            "attribute (data.preference_attribute, data.margin_attribute) or give more ratings"
        )
    return counts


def _require_few_responses(connection: "duckdb.DuckDBPyConnection") -> None:
    """Refuse a table `responses` of which all too many have one prompt."""
    compared, largest, prompt = connection.sql(
        """
        SELECT sum(count * count), max(count), arg_max(prompt_id, count)
        FROM (SELECT prompt_id, count(*) AS count FROM responses GROUP BY prompt_id, part)
        """
    ).fetchall()[0]
    if compared is not None and compared > _MOST_COMPARED:
        raise HelpsteerError(
            f"the prompt with prompt_id {prompt} has {largest} different rated responses, and every two of a prompt "
            f"are compared: {compared} comparisons in all. Leave fewer responses to a prompt in data.source"
        )


def _lay_out_texts(connection: "duckdb.DuckDBPyConnection", folder: Path) -> None:
    """Write the texts of the table `ratings`, each once, to Arrow files, one for all prompts whose ids begin alike.

    The database's own joins and sorts fail where texts outgrow its memory. Only one of these files is needed at a time.
    """
    from pyarrow import dataset  # it brings pandas, which who only loads the definitions need not wait for

    dataset.write_dataset(
        stream(
            connection,
            f"""
            SELECT {_SHELF} AS shelf, response_id, prompt, response
            FROM ratings SEMI JOIN (
                SELECT response_id, file, min(row) AS row FROM ratings GROUP BY response_id, file
            ) USING (response_id, file, row)
            """,
        ),
        folder,
        format="ipc",
        partitioning=dataset.partitioning(pa.schema([("shelf", pa.string())])),
        use_threads=False,
    )


def _join_texts(connection: "duckdb.DuckDBPyConnection", folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of the table `pairs` with their texts, ordered by split, prompt_id and pair_id."""
    from pyarrow import dataset

    for batch in stream(connection, f"SELECT *, {_SHELF} AS shelf FROM pairs ORDER BY split, prompt_id, pair_id"):
        shelves = batch["shelf"].to_pylist()
        for shelf, of_shelf in groupby(range(len(shelves)), shelves.__getitem__):
            positions = list(of_shelf)
            pairs = batch.slice(positions[0], len(positions))
            texts = dataset.dataset(folder / shelf, format="ipc").to_table(use_threads=False).combine_chunks()
            chosen, rejected = (
                texts.take(pc.index_in(pairs[side], texts["response_id"])) for side in ("chosen_id", "rejected_id")
            )
            columns = {"prompt": chosen["prompt"], "chosen": chosen["response"], "rejected": rejected["response"]}
            for name, column in columns.items():
                pairs = pairs.append_column(name, column.combine_chunks())
            yield pairs


def _rated_columns(side: str) -> str:
    return ", ".join(f"{side}.{name} AS {side}_{name}" for name in RATED)


def count_pairs(
    ratings: Source, selection_share: float, attributes: Iterable[str] = RATED
) -> dict[str, dict[str, int]]:
    """For each attribute: how many pairs `build_pairs` makes in each of SPLITS, and how many are `tied`.

    Tied are different responses to one prompt of one split with equal ratings, counted as two rows: no pair.
    """
    counted = ", ".join(
        f"count(DISTINCT one.response_id || two.response_id) FILTER (one.{name} > two.{name}) AS {name}, "
        f"coalesce(sum(one.rows * two.rows) FILTER (one.{name} = two.{name} AND one.response_id < two.response_id), 0)"
        f"::BIGINT AS {name}_tied"
        for name in attributes
    )
    by_part = query(
        f"""
        WITH responses AS ({_RESPONSES_SQL})
        SELECT part, {counted} FROM responses AS one JOIN responses AS two USING (part, prompt_id)
        WHERE one.response_id <> two.response_id GROUP BY part
        """,
        {"selection_share": selection_share},
        ratings=ratings,
    ).to_pylist()
    return {
        name: dict.fromkeys(SPLITS, 0)
        | {row["part"]: row[name] for row in by_part}
        | {"tied": sum(row[f"{name}_tied"] for row in by_part)}
        for name in attributes
    }


def describe_pairs(pairs: Source, ratings: Source, attribute: str, other: str) -> dict[str, Any]:
    """Properties of the pairs of an attribute, JSON-able; shares and means are over the pairs of all splits.

    Args:
        pairs: as `build_pairs(ratings, attribute, ...)` wrote them.
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
    (compared,) = query(
        f"""
        SELECT count(*) AS count,
            count(*) FILTER (chosen_{other} > rejected_{other}) AS agrees,
            count(*) FILTER (chosen_{other} < rejected_{other}) AS opposes,
            count(*) FILTER (chosen_{other} = rejected_{other}) AS ties,
            avg(chosen.words) AS chosen_words, avg(rejected.words) AS rejected_words,
            count(*) FILTER (chosen.words > rejected.words) AS chosen_longer
        FROM pairs
            JOIN words AS chosen ON chosen.response_id = chosen_id
            JOIN words AS rejected ON rejected.response_id = rejected_id
        """,
        pairs=pairs,
        words=_count_words(ratings),
    ).to_pylist()
    by_split = query(
        "SELECT split, count(*) AS pairs, count(DISTINCT prompt_id) AS prompts FROM pairs GROUP BY split", pairs=pairs
    ).to_pylist()
    by_rating = {
        side: query(
            f"SELECT {side}_{attribute} AS rating, count(*) AS n FROM pairs GROUP BY ALL ORDER BY ALL", pairs=pairs
        )
        for side in ("chosen", "rejected")
    }
    repeated = query("SELECT count(*) - count(DISTINCT (split, response_id)) AS n FROM ratings", ratings=ratings)
    count = compared["count"]
    return {
        "pairs": dict.fromkeys(SPLITS, 0) | {row["split"]: row["pairs"] for row in by_split},
        "prompts": dict.fromkeys(SPLITS, 0) | {row["split"]: row["prompts"] for row in by_split},
        "ties": count_pairs(ratings, 0, [attribute])[attribute]["tied"],
        "duplicate_responses": repeated["n"][0].as_py(),
        "other": {"attribute": other} | {how: compared[how] / count for how in ("agrees", "opposes", "ties")},
        **{
            f"{side}_ratings": {str(row["rating"]): row["n"] for row in rows.to_pylist()}
            for side, rows in by_rating.items()
        },
        "chosen_words": compared["chosen_words"],
        "rejected_words": compared["rejected_words"],
        "chosen_longer": compared["chosen_longer"] / count,
    }


def _count_words(ratings: Source) -> pa.Table:
    """`response_id` and `words`, once for every response."""
    words: dict[str, int] = {}
    with database(ratings=ratings) as connection:
        for batch in stream(connection, "SELECT response_id, response FROM ratings"):
            counts = (len(response.split()) for response in batch["response"].to_pylist())
            words.update(zip(batch["response_id"].to_pylist(), counts, strict=True))
    return pa.table({"response_id": list(words), "words": list(words.values())})


def select_evaluation_prompts(ratings: Source, count: int) -> pa.Table:
    """`prompt_id` and `prompt` of the `count` unique validation prompts that come first by a stable hash.

    A larger count only adds prompts at the end. Where there are fewer than asked for, all of them. Raises
    HelpsteerError where there are none.
    """
    prompts = query(
        """
        WITH asked AS (
            SELECT prompt_id, sha256('evaluation:' || prompt_id) AS hash FROM ratings WHERE split = 'validation'
            GROUP BY prompt_id ORDER BY hash LIMIT $count
        )
        SELECT prompt_id, any_value(prompt) AS prompt FROM ratings JOIN asked USING (prompt_id)
        GROUP BY prompt_id, hash ORDER BY hash
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


def unique_responses(
    *pairs: Source, splits: Iterable[str] = SPLITS, sides: Iterable[str] = ("chosen", "rejected")
) -> pa.Table:
    """Every (prompt, response) in the pairs once, as prompt_id, response_id, prompt, response, ordered by the ids.

    Args:
        pairs: PAIRS_SCHEMA.
        splits: take pairs of these splits only.
        sides: take these responses of a pair only.
    """
    with _responses_of(pairs, splits, sides) as connection:
        stretches = connection.sql(
            f"""
            SELECT min(prompt_id), max(prompt_id) FROM (
                SELECT prompt_id, sum(count(*)) OVER (ORDER BY prompt_id) AS rows_up_to FROM sides GROUP BY prompt_id
            ) GROUP BY rows_up_to // {_STRETCH_ROWS} ORDER BY ALL
            """
        ).fetchall()
        batches = (
            batch
            for first, last in stretches
            for batch in stream(
                connection,
                """
                SELECT prompt_id, response_id, any_value(prompt) AS prompt, any_value(response) AS response FROM sides
                WHERE prompt_id BETWEEN $first AND $last
                GROUP BY prompt_id, response_id ORDER BY prompt_id, response_id
                """,
                {"first": first, "last": last},
            )
        )
        return pa.Table.from_batches(batches, _RESPONSES_SCHEMA)


def count_texts(
    *pairs: Source, splits: Iterable[str] = SPLITS, sides: Iterable[str] = ("chosen", "rejected")
) -> tuple[int, int]:
    """How many different prompts and responses `unique_responses` finds."""
    with _responses_of(pairs, splits, sides) as connection:
        return connection.sql("SELECT count(DISTINCT prompt_id), count(DISTINCT response_id) FROM sides").fetchall()[0]


@contextmanager
def _responses_of(
    pairs: Iterable[Source], splits: Iterable[str], sides: Iterable[str]
) -> "Iterator[duckdb.DuckDBPyConnection]":
    """A database with a view `sides`: each response of each pair, as prompt_id, response_id, prompt, response."""
    files = {f"pairs_{number}": source for number, source in enumerate(pairs)}
    listed = ", ".join(f"'{split}'" for split in splits)
    united = " UNION ALL ".join(
        f"SELECT prompt_id, {side}_id AS response_id, prompt, {side} AS response FROM {name} WHERE split IN ({listed})"
        for name in files
        for side in sides
    )
    with database(**files) as connection:
        connection.execute(f"CREATE VIEW sides AS {united}")
        yield connection

"""Group `data`: from rated responses to pairs and evaluation prompts.

helpsteer_ratings/ratings.parquet; preference_pairs/pairs.parquet and margin_pairs/pairs.parquet, one row per pair with
both texts and all ratings; evaluation_prompts/prompts.parquet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.display import arrow_schema, table_metadata
from helpsteer_assets.assets.materialization import AssetDeclaration, Inputs, Metrics, StageRun
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.experiment import Experiment
from helpsteer_assets.modpo.attributes import ATTRIBUTES
from helpsteer_assets.modpo.pairs import build_pairs, describe_pairs, select_evaluation_prompts
from helpsteer_assets.modpo.ratings import RATINGS_SCHEMA, read_ratings, rows_to_ratings
from helpsteer_assets.modpo.tables import query
from helpsteer_assets.resources.artifacts import Artifact
from helpsteer_assets.stages import fetch

PREVIEW_ROWS = 5


def helpsteer_ratings(run: StageRun) -> Metrics:
    """Prompts with responses that people rated from 0 to 4 on five attributes, helpfulness and verbosity among them."""
    data = run.experiment.data
    options: dict[str, Any] = {
        "on_bad_rows": data.on_bad_rows,
        "validation_share": data.validation_share,
        "max_train_prompts": data.max_train_prompts,
        "max_validation_prompts": data.max_validation_prompts,
    }
    file = run.folder / "ratings.parquet"
    if data.source == "embedded":
        report = rows_to_ratings(build_rows(), file, **options)
    else:
        report = read_ratings(fetch(run.experiment, "data"), file, **options)
    if report["bad_rows"]["count"]:
        run.log(f"helpsteer_ratings: dropped {report['bad_rows']['count']} bad rows (data.on_bad_rows: drop)")
    return report


def preference_pairs(run: StageRun) -> Metrics:
    """Pairs of responses to one prompt, one rated higher on the attribute that policies learn to prefer."""
    return _pairs(run, run.experiment.data.preference_attribute)


def margin_pairs(run: StageRun) -> Metrics:
    """Pairs of responses to one prompt, one rated higher on the attribute that the margin adapter learns."""
    return _pairs(run, run.experiment.data.margin_attribute)


def _pairs(run: StageRun, attribute: str) -> Metrics:
    ratings = run.input("helpsteer_ratings").file("ratings.parquet")
    counts = build_pairs(ratings, attribute, run.experiment.data.selection_share, run.folder / "pairs.parquet")
    return {"pairs": sum(counts.values())}


def evaluation_prompts(run: StageRun) -> Metrics:
    """Unique held-out prompts that SFT and every policy answer."""
    asked = run.experiment.evaluation.prompts
    prompts = select_evaluation_prompts(run.input("helpsteer_ratings").file("ratings.parquet"), asked)
    if prompts.num_rows < asked:
        run.log(
            f"evaluation_prompts: {prompts.num_rows} held-out prompts are there, evaluation.prompts asks for {asked}"
        )
    run.write(prompts, "prompts.parquet")
    return {"prompts": prompts.num_rows, "asked": asked}


def _describe_ratings(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    report = artifact.manifest["metrics"]
    ratings = pq.read_table(artifact.file("ratings.parquet"), columns=["split", *ATTRIBUTES])
    histograms = [
        {"attribute": attribute} | {str(rating): _counts(ratings[attribute]).get(rating, 0) for rating in range(5)}
        for attribute in ATTRIBUTES
    ]
    return {
        "dagster/row_count": ratings.num_rows,
        "dagster/column_schema": arrow_schema(RATINGS_SCHEMA),
        "train_rows": report["splits"]["train"]["rows"],
        "train_prompts": report["splits"]["train"]["prompts"],
        "validation_rows": report["splits"]["validation"]["rows"],
        "validation_prompts": report["splits"]["validation"]["prompts"],
        "bad_rows_dropped": report["bad_rows"]["count"],
        "prompts_removed_from_validation": report["removed_from_validation"]["prompts"],
        "rating_histograms": table_metadata(histograms),
        "report": dg.MetadataValue.json(report),
    }


def _describe_pairs(attribute: Callable[[Experiment], str], other: Callable[[Experiment], str]) -> Any:
    def describe(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
        (ratings,) = inputs["helpsteer_ratings"].values()
        pairs = artifact.file("pairs.parquet")
        report = describe_pairs(pairs, ratings.file("ratings.parquet"), attribute(experiment), other(experiment))
        count = sum(report["pairs"].values())
        shares = {how: report["other"][how] for how in ("agrees", "opposes", "ties")}
        return {
            "attribute": attribute(experiment),
            **{f"{split}_pairs": count for split, count in report["pairs"].items()},
            "tied_pairs": report["ties"],
            "duplicate_responses": report["duplicate_responses"],
            **{f"pairs_{other(experiment)}_{how}": round(share * count) for how, share in shares.items()},
            **{f"share_{other(experiment)}_{how}": share for how, share in shares.items()},
            "mean_words_chosen": report["chosen_words"],
            "mean_words_rejected": report["rejected_words"],
            "chosen_longer": report["chosen_longer"],
            "rating_histograms": table_metadata(_side_by_side(report["chosen_ratings"], report["rejected_ratings"])),
            "preview": table_metadata(_preview(pairs, attribute(experiment))),
        }

    return describe


def _preview(pairs: Path, attribute: str) -> list[dict[str, Any]]:
    """The first train pair of each of the first prompts."""
    return query(
        f"""
        WITH firsts AS (
            SELECT min(pair_id) AS pair_id FROM pairs WHERE split = 'train'
            GROUP BY prompt_id ORDER BY prompt_id LIMIT {PREVIEW_ROWS}
        )
        SELECT prompt, chosen, rejected, chosen_{attribute}, rejected_{attribute}
        FROM pairs JOIN firsts USING (pair_id) ORDER BY prompt_id
        """,
        pairs=pairs,
    ).to_pylist()


def _describe_prompts(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    prompts = pq.read_table(artifact.file("prompts.parquet"))
    preview = prompts.slice(0, PREVIEW_ROWS).to_pylist()
    return {
        "dagster/row_count": prompts.num_rows,
        "dagster/column_schema": arrow_schema(prompts.schema),
        "preview": table_metadata(preview),
    }


def _side_by_side(chosen: dict[str, int], rejected: dict[str, int]) -> list[dict[str, Any]]:
    ratings = sorted({*chosen, *rejected}, key=int)
    return [{"rating": int(r), "chosen": chosen.get(r, 0), "rejected": rejected.get(r, 0)} for r in ratings]


def _counts(column: pa.ChunkedArray) -> dict[int, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def _preference(experiment: Experiment) -> str:
    return experiment.data.preference_attribute


def _margin(experiment: Experiment) -> str:
    return experiment.data.margin_attribute


DATA_ASSETS = (
    AssetDeclaration(helpsteer_ratings, "data", {"huggingface", "parquet"}, describe=_describe_ratings),
    AssetDeclaration(
        preference_pairs,
        "data",
        {"duckdb", "parquet"},
        describe=_describe_pairs(_preference, _margin),
        table="preference_pairs",
        file="pairs.parquet",
    ),
    AssetDeclaration(
        margin_pairs,
        "data",
        {"duckdb", "parquet"},
        describe=_describe_pairs(_margin, _preference),
        table="margin_pairs",
        file="pairs.parquet",
    ),
    AssetDeclaration(evaluation_prompts, "data", {"duckdb", "parquet"}, describe=_describe_prompts),
)

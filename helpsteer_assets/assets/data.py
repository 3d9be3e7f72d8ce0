"""Group `data`: from rated responses to pairs and evaluation prompts.

helpsteer_ratings/ratings.parquet; preference_pairs/pairs.parquet and margin_pairs/pairs.parquet, one row per pair with
both texts and all ratings; evaluation_prompts/prompts.parquet.
"""

from typing import Any

from helpsteer_assets.assets.run import StageRun
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.assets.stage import Metrics, stage
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.data.pairs import build_pairs, select_evaluation_prompts
from helpsteer_assets.modpo.data.ratings import read_ratings, rows_to_ratings
from helpsteer_assets.store.artifacts import Artifact


def has_margin_adapter(experiment: Experiment) -> bool:
    """A length penalty has neither margin pairs nor a margin adapter."""
    return experiment.has_margin_adapter


@stage(
    group="data",
    kinds={"huggingface", "parquet"},
    settings=(
        "data.source",
        "data.on_bad_rows",
        "data.validation_share",
        "data.max_train_prompts",
        "data.max_validation_prompts",
    ),
)
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


@stage(
    group="data",
    kinds={"duckdb", "parquet"},
    settings=("data.preference_attribute", "data.selection_share"),
    table="preference_pairs",
    file="pairs.parquet",
)
def preference_pairs(run: StageRun, helpsteer_ratings: Artifact) -> Metrics:
    """Pairs of responses to one prompt, one rated higher on the attribute that policies learn to prefer."""
    return _pairs(run, helpsteer_ratings, run.experiment.data.preference_attribute)


@stage(
    group="data",
    kinds={"duckdb", "parquet"},
    settings=("data.margin_attribute", "data.selection_share"),
    table="margin_pairs",
    file="pairs.parquet",
    exists_if=has_margin_adapter,
)
def margin_pairs(run: StageRun, helpsteer_ratings: Artifact) -> Metrics:
    """Pairs of responses to one prompt, one rated higher on the attribute that the margin adapter learns."""
    return _pairs(run, helpsteer_ratings, run.experiment.data.margin_attribute)


def _pairs(run: StageRun, ratings: Artifact, attribute: str) -> Metrics:
    counts = build_pairs(
        ratings.file("ratings.parquet"), attribute, run.experiment.data.selection_share, run.folder / "pairs.parquet"
    )
    return {"pairs": sum(counts.values())}


@stage(group="data", kinds={"duckdb", "parquet"}, settings=("evaluation.prompts",))
def evaluation_prompts(run: StageRun, helpsteer_ratings: Artifact) -> Metrics:
    """Unique held-out prompts that SFT and every policy answer."""
    asked = run.experiment.evaluation.prompts
    prompts = select_evaluation_prompts(helpsteer_ratings.file("ratings.parquet"), asked)
    if prompts.num_rows < asked:
        run.log(
            f"evaluation_prompts: {prompts.num_rows} held-out prompts are there, evaluation.prompts asks for {asked}"
        )
    run.write(prompts, "prompts.parquet")
    return {"prompts": prompts.num_rows, "asked": asked}

"""How the Dagster UI shows numbers, texts and tables."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpsteer_assets.assets.evaluation import policy_scores
from helpsteer_assets.assets.stage import Inputs
from helpsteer_assets.assets.tradeoff import PLOTS, REPORT, wide_summary
from helpsteer_assets.assets.training import LOSS_CURVE
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.comparison.bootstrap import bootstrap_interval
from helpsteer_assets.modpo.comparison.plots import markdown_image
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.pairs import describe_pairs
from helpsteer_assets.modpo.data.ratings import RATINGS_SCHEMA
from helpsteer_assets.modpo.data.tables import query
from helpsteer_assets.modpo.generation.kl import kl_by_prompt
from helpsteer_assets.store.artifacts import Artifact

SHOWN_CHARACTERS = 300
SHOWN_DIGITS = 5
"""Significant digits of a number: 17 of them fill a column, and none beyond these says anything."""


def shorten(text: str) -> str:
    """The beginning of a text, for a table's cell."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def rounded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with its plain numbers cut to what people read; the artifact keeps the exact ones."""
    return {
        key: float(f"{value:.{SHOWN_DIGITS}g}") if isinstance(value, float) else value
        for key, value in metadata.items()
    }


def table_metadata(rows: list[dict[str, Any]]) -> dg.TableMetadataValue | dg.TextMetadataValue:
    """Rows as a table, numbers rounded, texts shortened; what is neither a number nor a truth value becomes text."""
    if not rows:
        return dg.MetadataValue.text("none")
    shown = [
        {
            key: value if isinstance(value, bool | int | float) else shorten(str(value))
            for key, value in rounded(row).items()
        }
        for row in rows
    ]
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    columns = [dg.TableColumn(key, names[type(value)]) for key, value in shown[0].items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in shown], schema=dg.TableSchema(columns=columns))


def arrow_schema(schema: pa.Schema) -> dg.TableSchema:
    """Columns of a Parquet file, for the UI."""
    return dg.TableSchema(columns=[dg.TableColumn(field.name, str(field.type)) for field in schema])


PREVIEW_ROWS = 5


def describe(stage: str, artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    """What the UI shows of a stage's finished artifact, the same whether it was computed or reused."""
    return _DESCRIPTIONS.get(stage, _describe_counts)(artifact, inputs, experiment)


def _one(inputs: Inputs, name: str) -> Artifact:
    """The artifact of an input that is read as one."""
    artifact = inputs[name]
    assert isinstance(artifact, Artifact)
    return artifact


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
        ratings = _one(inputs, "helpsteer_ratings")
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


def _describe_training(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    metrics = artifact.manifest["metrics"]
    if "history" not in metrics:
        return {"trained": False}
    history = metrics["history"]
    described = {
        "trained": True,
        "steps": metrics["steps"],
        "best_step": metrics["best_step"],
        "loss_curve": dg.MetadataValue.md(markdown_image(artifact.file(LOSS_CURVE).read_bytes(), "loss curve")),
    }
    last: dict[str, float] = next((row for row in reversed(history) if "loss" in row), {})
    described |= {f"final_{key}": last[key] for key in ("loss", "accuracy", "grad_norm") if key in last}
    if metrics["best_loss"] is not None:
        described["best_selection_loss"] = metrics["best_loss"]
    return described


def _describe_adapter(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    sanity = artifact.manifest["metrics"]["sanity"]
    return _describe_training(artifact, inputs, experiment) | {
        "sanity": table_metadata(
            [{"measure": key, "value": "" if value is None else f"{value:.4g}"} for key, value in sanity.items()]
        ),
        "worst_failures": table_metadata(artifact.manifest["metrics"]["worst_failures"]),
    }


def _describe_quality(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    quality = artifact.manifest["metrics"]

    def shown(share: dict[str, Any]) -> dict[str, Any]:
        if share["mean"] is None:
            return {"pairs": 0, "share": ""}
        return {"pairs": share["n"], "share": f"{share['mean']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"}

    shares = ("accuracy", "longer_wins", "prefers_longer", "length_rule_right", "length_rule_wrong", "gain_over_length")
    described: dict[str, Any] = {"verdict": quality["sentence"], "pairs": quality["n"], "prompts": quality["prompts"]}
    for name in ("pearson", "spearman"):
        if quality[name]["value"] is not None:
            described[f"{name}_with_length"] = quality[name]["value"]
    return described | {
        "shares": table_metadata([{"measure": name} | shown(quality[name]) for name in shares]),
        "accuracy_by_rating_gap": table_metadata(
            [{"rating_gap": row["rating_gap"]} | shown(row) for row in quality["by_rating_gap"]]
        ),
        "accuracy_by_length": table_metadata(
            [{"chosen_is": row["chosen_is"]} | shown(row) for row in quality["by_length"]]
        ),
    }


def _describe_counts(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    return dict(artifact.manifest["metrics"])


def _describe_generations(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    preview = pq.read_table(artifact.file("generations.parquet")).slice(0, 5).to_pylist()
    shown = [{"prompt": r["prompt"], "response": r["response"], "tokens": r["response_tokens"]} for r in preview]
    return {**artifact.manifest["metrics"], "preview": table_metadata(shown)}


def _describe_scores(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    scores = policy_scores(artifact, experiment)
    return {"responses": len(scores.prompt_ids)} | {f"mean_{k}": float(np.mean(v)) for k, v in scores.measures.items()}


def _describe_kl(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    table, metrics = pq.read_table(artifact.file("kl.parquet")), artifact.manifest["metrics"]
    estimates = kl_by_prompt(table["prompt_id"].to_pylist(), table["log_ratio"].to_numpy())
    kl = bootstrap_interval(list(estimates.values()), experiment.evaluation.bootstrap_samples, experiment.seed)
    return {
        "kl_in_words": f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}] nats per response (95% interval over prompts)",
        **metrics,
        "capped_share": metrics["capped"] / metrics["samples"],
        "preview": table_metadata(table.select(["response", "log_ratio", "response_tokens"]).slice(0, 5).to_pylist()),
    }


def _describe_summary(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    policies = wide_summary(pq.read_table(artifact.file("score_summary.parquet")).to_pylist())
    measures = [measure for measure in policies[0] if measure != "policy"]
    rows = [{"measure": m} | {policy["policy"]: policy[m] for policy in policies} for m in measures]
    return {"summary": table_metadata(rows)}


def _describe_tradeoff(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    result = json.loads(artifact.file("tradeoff.json").read_text(encoding="utf-8"))
    area = result["hypervolume_above_sft"]
    shown = [name for name in PLOTS if f"{name}.png" in artifact.manifest["files"]]
    return {
        **{name: _image(artifact, name) for name in shown},
        "headlines": dg.MetadataValue.md("\n".join(f"- {sentence}" for sentence in result["headlines"])),
        **(
            {"caveats": dg.MetadataValue.md("\n".join(f"- {c}" for c in result["caveats"]))}
            if result["caveats"]
            else {}
        ),
        "front_probabilities": table_metadata(
            [
                {"policy": point["label"], "on_front": point["on_front"], "probability": point["front_probability"]}
                for point in result["points"]
            ]
        ),
        "hypervolume_above_sft": f"{area['mean']:.3g} [{area['low']:.3g}, {area['high']:.3g}]",
        "direction": result["direction"]["sentence"],
        "preference_measured": result["preference_measured"],
        **({"note": result["note"]} if result["note"] else {}),
        "plot_files": dg.MetadataValue.path(str(artifact.path)),
    }


def _describe_report(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    tradeoff = _one(inputs, "tradeoff")
    shown = [name for name in PLOTS if f"{name}.png" in tradeoff.manifest["files"]]
    return {
        # No link: browsers follow none from here to a file.
        "report": dg.MetadataValue.path(str(artifact.file(REPORT))),
        "open_it_by": "helpsteer report --open",
        **dict(artifact.manifest["metrics"]),
        **{name: _image(tradeoff, name) for name in shown},
    }


def _image(artifact: Artifact, name: str) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(markdown_image(artifact.file(f"{name}.png").read_bytes(), PLOTS[name]))


_DESCRIPTIONS: dict[str, Callable[[Artifact, Inputs, Experiment], dict[str, Any]]] = {
    "helpsteer_ratings": _describe_ratings,
    "preference_pairs": _describe_pairs(_preference, _margin),
    "margin_pairs": _describe_pairs(_margin, _preference),
    "evaluation_prompts": _describe_prompts,
    "sft_model": _describe_training,
    "margin_adapter": _describe_adapter,
    "margin_adapter_quality": _describe_quality,
    "modpo_models": _describe_training,
    "sft_generations": _describe_generations,
    "generations": _describe_generations,
    "sft_scores": _describe_scores,
    "scores": _describe_scores,
    "kl_to_sft": _describe_kl,
    "score_summary": _describe_summary,
    "tradeoff": _describe_tradeoff,
    "tradeoff_report": _describe_report,
}
"""By stage; of the others the UI shows what the manifest's metrics say."""

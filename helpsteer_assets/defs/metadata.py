"""How the Dagster UI shows numbers, texts and tables."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.parquet as pq

from helpsteer_assets.assets.evaluation import policy_scores
from helpsteer_assets.assets.stage import Inputs
from helpsteer_assets.assets.tradeoff import PLOTS, REPORT, policy_kl, wide_summary
from helpsteer_assets.assets.training import LOSS_CURVE
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.comparison.bootstrap import bootstrap_interval
from helpsteer_assets.modpo.comparison.plots import markdown_image
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.pairs import describe_pairs
from helpsteer_assets.modpo.data.tables import query
from helpsteer_assets.store.artifacts import Artifact

PREVIEW_ROWS = 5
SHOWN_CHARACTERS = 300


def rounded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with its plain numbers cut to five digits, which fit a column; the artifact keeps the exact ones."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in metadata.items()}


def table_metadata(rows: list[dict[str, Any]]) -> dg.TableMetadataValue | dg.TextMetadataValue:
    """Rows as a table, numbers rounded, texts shortened; what is neither a number nor a truth value becomes text."""
    if not rows:
        return dg.MetadataValue.text("none")
    cells = [{key: _cell(value) for key, value in rounded(row).items()} for row in rows]
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    columns = [dg.TableColumn(key, names[type(value)]) for key, value in cells[0].items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in cells], schema=dg.TableSchema(columns=columns))


def _cell(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _table_facts(parquet: Path) -> dict[str, Any]:
    columns = [dg.TableColumn(field.name, str(field.type)) for field in pq.read_schema(parquet)]
    return {
        "dagster/row_count": pq.read_metadata(parquet).num_rows,
        "dagster/column_schema": dg.TableSchema(columns=columns),
    }


def describe(stage: str, artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    """Metadata of a stage's finished artifact for the UI, the same whether it was computed or reused."""
    return _DESCRIPTIONS.get(stage, _describe_counts)(artifact, inputs, experiment)


def _one(inputs: Inputs, name: str) -> Artifact:
    """The artifact of an input that is read as one."""
    artifact = inputs[name]
    assert isinstance(artifact, Artifact)
    return artifact


def _describe_ratings(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    report = artifact.manifest["metrics"]
    ratings = artifact.table("ratings.parquet", columns=list(ATTRIBUTES))
    histograms = []
    for attribute in ATTRIBUTES:
        counts = {entry["values"]: entry["counts"] for entry in ratings[attribute].value_counts().to_pylist()}
        histograms.append({"attribute": attribute} | {str(rating): counts.get(rating, 0) for rating in range(5)})
    return {
        **_table_facts(artifact.file("ratings.parquet")),
        **{f"{split}_{what}": number for split, kept in report["splits"].items() for what, number in kept.items()},
        "bad_rows_dropped": report["bad_rows"]["count"],
        "prompts_removed_from_validation": report["removed_from_validation"]["prompts"],
        "rating_histograms": table_metadata(histograms),
        "report": dg.MetadataValue.json(report),
    }


def _describe_pairs(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    attribute, other = experiment.data.preference_attribute, experiment.data.margin_attribute
    if artifact.asset == "margin_pairs":
        attribute, other = other, attribute
    pairs = artifact.file("pairs.parquet")
    report = describe_pairs(pairs, _one(inputs, "helpsteer_ratings").file("ratings.parquet"), attribute, other)
    ratings = {side: report[f"{side}_ratings"] for side in ("chosen", "rejected")}
    histograms = [
        {"rating": int(rating)} | {side: ratings[side].get(rating, 0) for side in ratings}
        for rating in sorted({*ratings["chosen"], *ratings["rejected"]}, key=int)
    ]
    return {
        "attribute": attribute,
        **{f"{split}_pairs": count for split, count in report["pairs"].items()},
        "tied_pairs": report["ties"],
        "duplicate_responses": report["duplicate_responses"],
        **{f"share_{other}_{how}": report["other"][how] for how in ("agrees", "opposes", "ties")},
        "mean_words_chosen": report["chosen_words"],
        "mean_words_rejected": report["rejected_words"],
        "chosen_longer": report["chosen_longer"],
        "rating_histograms": table_metadata(histograms),
        "preview": table_metadata(_preview(pairs, attribute)),
    }


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
    prompts = artifact.table("prompts.parquet").slice(0, PREVIEW_ROWS)
    return {**_table_facts(artifact.file("prompts.parquet")), "preview": table_metadata(prompts.to_pylist())}


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
    return described | ({} if metrics["best_loss"] is None else {"best_selection_loss": metrics["best_loss"]})


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

    def row(name: str, value: Any, share: dict[str, Any]) -> dict[str, Any]:
        if share["mean"] is None:
            return {name: value, "pairs": 0, "share": ""}
        interval = f"{share['mean']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
        return {name: value, "pairs": share["n"], "share": interval}

    shares = ("accuracy", "longer_wins", "prefers_longer", "length_rule_right", "length_rule_wrong", "gain_over_length")
    correlations = {f"{name}_with_length": quality[name]["value"] for name in ("pearson", "spearman")}
    tables = {
        "shares": [row("measure", name, quality[name]) for name in shares],
        "accuracy_by_rating_gap": [row("rating_gap", share["rating_gap"], share) for share in quality["by_rating_gap"]],
        "accuracy_by_length": [row("chosen_is", share["chosen_is"], share) for share in quality["by_length"]],
    }
    return {
        "verdict": quality["sentence"],
        "pairs": quality["n"],
        "prompts": quality["prompts"],
        **{name: value for name, value in correlations.items() if value is not None},
        **{name: table_metadata(rows) for name, rows in tables.items()},
    }


def _describe_counts(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    return dict(artifact.manifest["metrics"])


def _describe_generations(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    preview = artifact.table("generations.parquet", columns=["prompt", "response", "response_tokens"])
    return artifact.manifest["metrics"] | {"preview": table_metadata(preview.slice(0, PREVIEW_ROWS).to_pylist())}


def _describe_scores(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    scores = policy_scores(artifact, experiment)
    return {"responses": len(scores.prompt_ids)} | {f"mean_{k}": float(np.mean(v)) for k, v in scores.measures.items()}


def _describe_kl(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    metrics = artifact.manifest["metrics"]
    by_prompt = np.array(list(policy_kl(artifact).values()))
    kl = bootstrap_interval(by_prompt, experiment.evaluation.bootstrap_samples, experiment.seed)
    preview = artifact.table("kl.parquet", columns=["response", "log_ratio", "response_tokens"]).slice(0, PREVIEW_ROWS)
    return {
        "kl_in_words": f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}] nats per response (95% interval over prompts)",
        **metrics,
        "capped_share": metrics["capped"] / metrics["samples"],
        "preview": table_metadata(preview.to_pylist()),
    }


def _describe_summary(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    policies = wide_summary(artifact.table("score_summary.parquet").to_pylist())
    measures = [measure for measure in policies[0] if measure != "policy"]
    rows = [{"measure": m} | {policy["policy"]: policy[m] for policy in policies} for m in measures]
    return {"summary": table_metadata(rows)}


def _describe_tradeoff(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    result = json.loads(artifact.file("tradeoff.json").read_text(encoding="utf-8"))
    area = result["hypervolume_above_sft"]
    front = [
        {"policy": point["label"], "on_front": point["on_front"], "probability": point["front_probability"]}
        for point in result["points"]
    ]
    sentences = {name: "\n".join(f"- {sentence}" for sentence in result[name]) for name in ("headlines", "caveats")}
    return {
        **_plots(artifact),
        **{name: dg.MetadataValue.md(text) for name, text in sentences.items() if text},
        "front_probabilities": table_metadata(front),
        "hypervolume_above_sft": f"{area['mean']:.3g} [{area['low']:.3g}, {area['high']:.3g}]",
        "direction": result["direction"]["sentence"],
        "preference_measured": result["preference_measured"],
        **({"note": result["note"]} if result["note"] else {}),
        "plot_files": dg.MetadataValue.path(str(artifact.path)),
    }


def _describe_report(artifact: Artifact, inputs: Inputs, experiment: Experiment) -> dict[str, Any]:
    return {
        # No link: browsers follow none from here to a file.
        "report": dg.MetadataValue.path(str(artifact.file(REPORT))),
        "open_it_by": "helpsteer report --open",
        **artifact.manifest["metrics"],
        **_plots(_one(inputs, "tradeoff")),
    }


def _plots(tradeoff: Artifact) -> dict[str, dg.MarkdownMetadataValue]:
    files = {name: f"{name}.png" for name in PLOTS if f"{name}.png" in tradeoff.manifest["files"]}
    return {
        name: dg.MetadataValue.md(markdown_image(tradeoff.file(file).read_bytes(), PLOTS[name]))
        for name, file in files.items()
    }


_DESCRIPTIONS: dict[str, Callable[[Artifact, Inputs, Experiment], dict[str, Any]]] = {
    "helpsteer_ratings": _describe_ratings,
    "preference_pairs": _describe_pairs,
    "margin_pairs": _describe_pairs,
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

"""The summary, the trade-off and the report of a real run."""

import json
import re
from typing import Any

import numpy as np
import pytest

from helpsteer_assets.assets.tradeoff import read_measures, tradeoff_settings
from helpsteer_assets.modpo.comparison.text import repetition
from helpsteer_assets.modpo.comparison.tradeoff import measures_of
from helpsteer_assets.report.content import report_content
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets_tests.finished import Finished


def rows(run: Finished, asset: str, file: str, w: str | None = None) -> list[dict[str, Any]]:
    return run.artifact(asset, w or ALL).table(file).to_pylist()


def test_measures_are_those_of_the_scores_the_text_and_the_samples(finished_home: Finished) -> None:
    policies = read_measures(finished_home.artifact("score_summary"))
    assert [scores.w for scores in policies] == [None, "0.1", "0.9"]
    for scores in policies:
        prefix = "sft_" if scores.w is None else ""
        rated = {row["prompt_id"]: row for row in rows(finished_home, f"{prefix}scores", "scores.parquet", scores.w)}
        assert scores.measures["helpfulness"].tolist() == [rated[p]["helpfulness"] for p in scores.prompt_ids]
        made = rows(finished_home, f"{prefix}generations", "generations.parquet", scores.w)
        texts = {row["prompt_id"]: row["response"] for row in made}
        assert scores.measures["repetition"].tolist() == [repetition(texts[p]) for p in scores.prompt_ids]
        samples = rows(finished_home, "kl_to_sft", "kl.parquet", scores.w) if scores.w else []
        for prompt_id, kl in zip(scores.prompt_ids, scores.measures["kl_to_sft"], strict=True):
            drawn = [row["log_ratio"] for row in samples if row["prompt_id"] == prompt_id] or [0.0]
            assert kl == pytest.approx(np.mean(drawn)) and (kl != 0) == bool(samples)


def test_the_report_holds_every_response_and_nothing_of_this_machine(finished_home: Finished) -> None:
    file = finished_home.artifact("tradeoff_report").file("report.html")
    page = file.read_text(encoding="utf-8")
    payload = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert payload
    shown = json.dumps(json.loads(payload[1]), ensure_ascii=False)
    for asset, w in (("sft_generations", None), ("generations", "0.1"), ("generations", "0.9")):
        for row in rows(finished_home, asset, "generations.parquet", w):
            assert json.dumps(row["response"], ensure_ascii=False)[1:-1] in shown
    assert str(finished_home.home) not in page
    said = "\n".join(finished_home.announced)
    assert str(file) in said and "Against SFT, rated helpfulness is" in said


def test_the_report_says_what_the_summary_and_the_trade_off_say(finished_home: Finished) -> None:
    tradeoff, summary = finished_home.artifact("tradeoff"), finished_home.artifact("score_summary")
    weights = finished_home.experiment.objective.weights
    policies = read_measures(summary)
    sft, low, high = policies
    own = {p: i for i, p in enumerate(sft.prompt_ids)}
    for scores, reward in ((low, -1.0), (high, 1.0)):  # rater and margin reward move against each other, and together
        order = [own[p] for p in scores.prompt_ids]
        scores.measures["verbosity"] = sft.measures["verbosity"][order] + 1.0
        scores.measures["margin_reward"] = sft.measures["margin_reward"][order] + reward
    content = report_content(
        finished_home.experiment,
        measures_of(tradeoff_settings(finished_home.experiment), list(sft.measures)),
        policies,
        summary.table("score_summary.parquet").to_pylist(),
        json.loads(tradeoff.file("tradeoff.json").read_text(encoding="utf-8")),
        {
            None: finished_home.artifact("sft_generations").table("generations.parquet"),
            **{w: finished_home.artifact("generations", w).table("generations.parquet") for w in weights},
        },
        {},
        quality=finished_home.artifact("margin_adapter_quality").manifest["metrics"],
        kl={w: finished_home.artifact("kl_to_sft", w).manifest["metrics"] for w in weights},
    )
    assert [policy["label"] for policy in content["policies"]] == ["SFT", "w=0.1", "w=0.9"]
    all_rows = rows(finished_home, "score_summary", "score_summary.parquet")
    row = next(r for r in all_rows if r["w"] == "0.9" and r["measure"] == "helpfulness")
    shown = content["summary"]["helpfulness"]["w=0.9"]
    assert (shown["mean"], shown["low"], shown["high"]) == (row["mean"], row["ci_low"], row["ci_high"])
    assert shown["delta"] == pytest.approx(row["delta"])
    # The interval that holds for all weights at once is the wider one.
    assert shown["delta_high"] - shown["delta_low"] >= 0.9 * (row["delta_high"] - row["delta_low"])
    assert {measure["name"]: measure["role"] for measure in content["measures"]}["verbosity"] == "margin"
    assert [table["title"] for table in content["tables"]][:3] == ["At equal length", "Movement with w", "KL to SFT"]
    for prompt in content["prompts"]:
        of_sft, against, along = (response["disagreement"] for response in prompt["responses"])
        assert of_sft == along == 0 < against

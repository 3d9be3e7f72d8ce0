"""The summary, the trade-off and the report of a real run."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.assets.tradeoff import read_measures, tradeoff_settings
from helpsteer_assets.modpo.comparison.text import repetition
from helpsteer_assets.modpo.comparison.tradeoff import measures_of
from helpsteer_assets.report.content import report_content
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets_tests.assets.conftest import Finished


def test_measures_are_those_of_the_scores_and_of_the_text(quick: Finished) -> None:
    policies = read_measures(quick.artifact("score_summary"))
    assert [scores.w for scores in policies] == [None, "0.1", "0.9"]
    for scores in policies:
        of_sft = scores.w is None
        table = pq.read_table(
            quick.artifact("sft_scores" if of_sft else "scores", scores.w or ALL).file("scores.parquet")
        )
        rows = {row["prompt_id"]: row for row in table.to_pylist()}
        assert scores.measures["helpfulness"].tolist() == [rows[p]["helpfulness"] for p in scores.prompt_ids]
        made = quick.artifact("sft_generations" if of_sft else "generations", scores.w or ALL)
        texts = {r["prompt_id"]: r["response"] for r in pq.read_table(made.file("generations.parquet")).to_pylist()}
        assert scores.measures["repetition"].tolist() == [repetition(texts[p]) for p in scores.prompt_ids]


def test_the_kl_of_a_policy_is_the_mean_over_its_samples_and_that_of_sft_is_zero(quick: Finished) -> None:
    sft, low, _ = read_measures(quick.artifact("score_summary"))
    samples = pq.read_table(quick.artifact("kl_to_sft", "0.1").file("kl.parquet")).to_pylist()
    for prompt_id, kl in zip(low.prompt_ids, low.measures["kl_to_sft"], strict=True):
        assert kl == pytest.approx(np.mean([row["log_ratio"] for row in samples if row["prompt_id"] == prompt_id]))
    assert not sft.measures["kl_to_sft"].any()
    assert low.measures["kl_to_sft"].any()


def test_the_trade_off_is_kept_as_strict_json_and_as_pictures(quick: Finished) -> None:
    found = quick.artifact("tradeoff")
    assert {f"{name}.{kind}" for name in ("front", "kl", "lengths") for kind in ("png", "svg")} < set(
        found.manifest["files"]
    )
    text = found.file("tradeoff.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)


def test_the_report_holds_every_response_and_nothing_of_this_machine(quick: Finished) -> None:
    page = quick.artifact("tradeoff_report").file("report.html").read_text(encoding="utf-8")
    payload = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert payload
    shown = json.dumps(json.loads(payload[1]), ensure_ascii=False)
    for asset, partition in (("sft_generations", ALL), ("generations", "0.1"), ("generations", "0.9")):
        for response in pq.read_table(quick.artifact(asset, partition).file("generations.parquet"))["response"]:
            assert json.dumps(response.as_py(), ensure_ascii=False)[1:-1] in shown
    assert str(quick.home) not in page


def content(run: Finished, **changes: Any) -> dict[str, Any]:
    tradeoff, summary = run.artifact("tradeoff"), run.artifact("score_summary")
    weights = run.experiment.objective.weights
    given: dict[str, Any] = {
        "policies": read_measures(summary),
        "summary": pq.read_table(summary.file("score_summary.parquet")).to_pylist(),
        "result": json.loads(tradeoff.file("tradeoff.json").read_text(encoding="utf-8")),
        "responses": {
            None: pq.read_table(run.artifact("sft_generations").file("generations.parquet")),
            **{w: pq.read_table(run.artifact("generations", w).file("generations.parquet")) for w in weights},
        },
        "plots": {},
        "quality": run.artifact("margin_adapter_quality").manifest["metrics"],
        "kl": {w: run.artifact("kl_to_sft", w).manifest["metrics"] for w in weights},
    }
    given |= changes
    measures = measures_of(tradeoff_settings(run.experiment), list(given["policies"][0].measures))
    return report_content(run.experiment, measures, **given)


def test_the_report_says_what_the_summary_and_the_trade_off_say(quick: Finished) -> None:
    found = content(quick)
    assert [policy["label"] for policy in found["policies"]] == ["SFT", "w=0.1", "w=0.9"]
    rows = pq.read_table(quick.artifact("score_summary").file("score_summary.parquet")).to_pylist()
    row = next(r for r in rows if r["w"] == "0.9" and r["measure"] == "helpfulness")
    shown = found["summary"]["helpfulness"]["w=0.9"]
    assert (shown["mean"], shown["low"], shown["high"]) == (row["mean"], row["ci_low"], row["ci_high"])
    assert shown["delta"] == pytest.approx(row["delta"])
    # The interval that holds for all weights at once is the wider one.
    assert shown["delta_high"] - shown["delta_low"] >= 0.9 * (row["delta_high"] - row["delta_low"])
    assert {measure["name"]: measure["role"] for measure in found["measures"]}["verbosity"] == "margin"
    titles = [table["title"] for table in found["tables"]]
    assert titles[:3] == ["At equal length", "Movement with w", "KL to SFT"]


def test_rater_and_margin_reward_disagree_where_they_move_against_each_other(quick: Finished) -> None:
    policies = read_measures(quick.artifact("score_summary"))
    sft, low, high = policies
    for scores, (rating, reward) in zip((low, high), ((1.0, -1.0), (1.0, 1.0)), strict=True):
        own = {p: i for i, p in enumerate(sft.prompt_ids)}
        order = [own[p] for p in scores.prompt_ids]
        scores.measures["verbosity"] = sft.measures["verbosity"][order] + rating
        scores.measures["margin_reward"] = sft.measures["margin_reward"][order] + reward
    for prompt in content(quick, policies=policies)["prompts"]:
        of_sft, against, along = (response["disagreement"] for response in prompt["responses"])
        assert of_sft == along == 0 < against


def test_without_an_adapter_the_report_is_made_all_the_same(copied: Callable[..., Finished]) -> None:
    penalty = {"margin": "length_penalty", "margin_role": None, "margin_beta": None, "penalty": 0.01}
    run = copied(objective=penalty, evaluation={"rater": "none", "kl_samples": 0})
    assert run.run(), run.announced
    page = run.artifact("tradeoff_report").file("report.html").read_text(encoding="utf-8")
    assert "preference quality is unmeasured" in page and "below and to the right" in page
    assert "kl.svg" not in run.artifact("tradeoff").manifest["files"]


def test_where_the_report_is_stands_at_the_end_of_a_run(quick: Finished) -> None:
    said = "\n".join(quick.announced)
    assert str(quick.artifact("tradeoff_report").file("report.html")) in said
    assert "Against SFT, rated helpfulness is" in said

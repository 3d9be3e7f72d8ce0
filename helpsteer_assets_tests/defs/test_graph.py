"""The whole graph on a real Dagster instance: what it leaves, what it reuses, what a changed setting recomputes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.assets.graph import fingerprints, stages
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import status
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.store.artifacts import ALL, ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished

SUMMARY = {"score_summary", "tradeoff", "tradeoff_report"}


def query(run: Finished, sql: str) -> list[tuple[Any, ...]]:
    return Warehouse(run.home).query(sql)[1]


def recomputed(run: Finished) -> set[str]:
    """Assets whose latest materialization was not a reuse for each weight."""
    return {asset for (asset,) in query(run, "SELECT asset FROM materializations WHERE NOT reused")}


def test_after_a_run_everything_is_complete_and_scored_once_per_policy_and_prompt(finished_home: Finished) -> None:
    items = status(finished_home.experiment, Home(finished_home.home))
    assert {item.state for item in items} == {"complete"}
    assert {item.asset for item in items} == set(stages(finished_home.experiment))
    rows = query(
        finished_home,
        "SELECT policy, w, count(*), count(DISTINCT prompt_id), count(helpfulness), count(margin_reward) "
        "FROM scores GROUP BY ALL ORDER BY w NULLS FIRST",
    )
    assert rows == [("sft", None, 8, 8, 8, 8), ("modpo", 0.1, 8, 8, 8, 8), ("modpo", 0.9, 8, 8, 8, 8)]
    announced = "\n".join(finished_home.announced)
    assert "modpo_models w=0.1: 6 of 6, loss" in announced and "helpsteer query" in announced


def test_published_rewards_are_margin_beta_times_the_log_ratios_and_sft_differs_from_itself_by_nothing(
    finished_home: Finished,
) -> None:
    beta = finished_home.experiment.objective.margin_beta
    equal = f"max(abs(margin_reward - {beta} * margin_log_ratio)) < 1e-12"
    assert query(finished_home, f"SELECT {equal}, max(abs(margin_log_ratio)) > 0 FROM scores") == [(True, True)]
    ratios = "SELECT policy, min(abs(log_ratio_to_sft)) > 0, max(abs(log_ratio_to_sft)) FROM scores GROUP BY policy"
    (_, moved, _), (_, _, of_sft) = sorted(query(finished_home, ratios))
    assert moved and of_sft == 0


def test_pairs_recur_in_the_table_of_reference_log_probs_once_each(finished_home: Finished) -> None:
    pairs = "SELECT chosen_id AS id FROM {0} UNION SELECT rejected_id FROM {0}"
    both = f"{pairs.format('preference_pairs')} UNION {pairs.format('margin_pairs')}"
    unmatched = (
        f"SELECT count(*) FROM ({both}) LEFT JOIN reference_log_probs ON id = response_id WHERE log_prob IS NULL"
    )
    assert query(finished_home, unmatched) == [(0,)]
    counts = f"SELECT count(*) = (SELECT count(*) FROM ({both})), max(log_prob) < 0 FROM reference_log_probs"
    assert query(finished_home, counts) == [(True, True)]


def test_more_kl_samples_keep_the_first_and_the_manifest_their_mean_by_prompt(
    finished_home: Finished, copied: Callable[..., Finished]
) -> None:
    run = copied(evaluation={"kl_samples": 3})
    assert run.run(select='key:"kl_to_sft"', weights=["0.9"])
    artifact = run.artifact("kl_to_sft", "0.9")
    table, metrics = pq.read_table(artifact.file("kl.parquet")), artifact.manifest["metrics"]
    rows = query(run, "SELECT prompt_id, sample, log_ratio, finish_reason FROM kl_to_sft WHERE w = 0.9")
    prompts = {prompt for prompt, *_ in rows}
    assert {(p, s) for p, s, *_ in rows} == {(p, s) for p in prompts for s in range(3)} and len(rows) == 24
    assert metrics["samples"] == 24 and metrics["capped"] == sum(reason == "length" for *_, reason in rows)
    assert metrics["kl"] == pytest.approx(np.mean([ratio for _, _, ratio, _ in rows]))
    means = [np.mean([ratio for p, _, ratio, _ in rows if p == prompt]) for prompt in prompts]
    assert metrics["kl_standard_error"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(8))

    before = pq.read_table(finished_home.artifact("kl_to_sft", "0.9").file("kl.parquet"))
    first, second = (table.filter(pc.equal(table["sample"], number)) for number in (0, 1))
    assert first["token_ids"] == before["token_ids"] and first["prompt_id"] == before["prompt_id"]
    assert first["log_ratio"].to_pylist() == pytest.approx(before["log_ratio"].to_pylist(), abs=1e-4)
    responses = pq.read_table(finished_home.artifact("generations", "0.9").file("generations.parquet"))
    for other in (second, responses):
        same = zip(first["token_ids"].to_pylist(), other["token_ids"].to_pylist(), strict=True)
        assert sum(one == two for one, two in same) < 4, "some responses are two words long"


def test_the_quality_of_the_margin_adapter_is_that_of_the_rewards_it_was_judged_by(finished_home: Finished) -> None:
    """Same pairs, same order of the two responses, and the same share of pairs ranked right as the adapter's check."""
    rows = query(
        finished_home,
        "SELECT v.*, p.chosen_verbosity - p.rejected_verbosity AS gap, c.response_tokens, r.response_tokens "
        "FROM (SELECT pair_id, rating_gap, chosen_tokens, rejected_tokens, chosen_log_ratio - rejected_log_ratio AS d "
        "FROM margin_validation) v JOIN margin_pairs p USING (pair_id) "
        "JOIN reference_log_probs c ON c.response_id = p.chosen_id "
        "JOIN reference_log_probs r ON r.response_id = p.rejected_id WHERE p.split = 'validation'",
    )
    sanity = finished_home.artifact("margin_adapter").manifest["metrics"]["sanity"]
    metrics = finished_home.artifact("margin_adapter_quality").manifest["metrics"]
    assert query(finished_home, "SELECT count(*) FROM margin_validation") == [(len(rows),)]
    assert len(rows) == sanity["n"] == metrics["n"]
    assert all(row[1:4] == row[-3:] for row in rows)
    beta = finished_home.experiment.margin_adapter.beta
    assert beta * np.mean([row[4] for row in rows]) == pytest.approx(sanity["mean_margin"], abs=1e-4)
    assert metrics["accuracy"]["mean"] == pytest.approx(sanity["accuracy"], abs=0.01)


def test_every_row_and_materialization_leads_back_to_its_run_and_its_artifact(finished_home: Finished) -> None:
    store, expected = ArtifactStore(finished_home.home), fingerprints(finished_home.experiment)
    with dg.DagsterInstance.from_config(str(dagster_home(Home(finished_home.home), "quick"))) as instance:
        for w, fingerprint, run_id in query(finished_home, "SELECT DISTINCT w, fingerprint, run_id FROM scores"):
            asset, partition = ("sft_scores", ALL) if w is None else ("scores", f"{w:g}")
            artifact = store.get(asset, partition, fingerprint)
            run = instance.get_run_by_id(run_id)
            assert run is not None and run.status == dg.DagsterRunStatus.SUCCESS
            assert artifact is not None
            source = "sft_generations" if w is None else "generations"
            generations = store.get(source, partition, artifact.manifest["inputs"][source][partition])
            assert generations is not None and generations.manifest["settings"]["generation.max_new_tokens"] == 32
        for (asset, partition), known in expected.items():
            wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), None if partition == ALL else [partition])
            (record,) = instance.fetch_materializations(wanted, limit=1).records
            assert record.asset_materialization is not None
            assert record.asset_materialization.tags["dagster/data_version"] == known.value
        for asset, check in (
            ("margin_adapter", "margin_adapter_prefers_chosen"),
            ("margin_adapter_quality", "margin_adapter_measures_more_than_length"),
            ("tradeoff", "margin_follows_weight"),
        ):
            record = instance.get_latest_asset_check_evaluation_record(dg.AssetCheckKey(dg.AssetKey(asset), check))
            assert record is not None and isinstance(record.evaluation, dg.AssetCheckEvaluation), check


def test_a_changed_beta_recomputes_the_chosen_weight_and_the_summary_waits_for_the_other(
    copied: Callable[..., Finished],
) -> None:
    changed = copied(objective={"beta": 0.25})
    assert changed.run(weights=["0.9"])
    assert any("missing: 0.1" in line for line in changed.announced)
    assert recomputed(changed) >= {"modpo_models", "generations", "scores", "kl_to_sft"}
    reused = {asset for (asset,) in query(changed, "SELECT asset FROM materializations WHERE reused")}
    assert reused == {name for name, stage in stages(changed.experiment).items() if not stage.partitioned} - SUMMARY
    states = {(item.asset, item.partition): item.state for item in status(changed.experiment, Home(changed.home))}
    assert states["scores", "0.9"] == "complete"
    assert states["scores", "0.1"] == states["score_summary", ALL] == "out of date"


def test_a_changed_evaluation_leaves_training_alone_and_going_back_finds_the_earlier_results(
    copied: Callable[..., Finished],
) -> None:
    manifests = {path: path.stat().st_mtime_ns for path in copied().home.glob("artifacts/*/*/*/manifest.json")}
    changed = copied(evaluation={"prompts": 6})
    assert changed.run()
    evaluated = {"evaluation_prompts", "sft_generations", "generations", "sft_scores", "scores", "kl_to_sft"}
    assert recomputed(changed) == evaluated | SUMMARY
    assert query(changed, "SELECT count(*) FROM scores") == [(18,)]
    back = copied()
    assert back.run()
    assert recomputed(back) == set()
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests
    assert query(back, "SELECT count(*) FROM scores") == [(24,)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base model."""
    return shutil.copytree(local_path("model.base", "embedded"), tmp_path / "base")


def test_a_chat_template_that_writes_the_date_is_refused(base: Path, copied: Callable[..., Finished]) -> None:
    with (base / "chat_template.jinja").open("a") as template:
        template.write("{{ strftime_now('%d %b %Y') }}")
    changed = copied(model={"base": str(base)}, sft={"enabled": False})
    assert not changed.run(select='key:"sft_model"')
    assert any("writes today's date" in line for line in changed.announced)

"""The whole graph on a real Dagster instance: what it leaves, what it reuses, what a changed setting recomputes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.assets.graph import fingerprints, stages
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.assets.status import status
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.store.artifacts import ALL, Artifact, ArtifactStore
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished

SUMMARY = {"score_summary", "tradeoff", "tradeoff_report"}
BELOW_MODPO = {"modpo_models", "generations", "scores", "kl_to_sft", *SUMMARY}


def reused(run: Finished) -> dict[str, set[bool]]:
    """Whether the latest materialization of each asset's partitions was a reuse."""
    _, rows = Warehouse(run.home).query("SELECT asset, reused FROM materializations")
    found: dict[str, set[bool]] = {}
    for asset, was_reused in rows:
        found.setdefault(asset, set()).add(was_reused)
    return found


def recomputed(run: Finished) -> set[str]:
    return {asset for asset, how in reused(run).items() if how != {True}}


def query(run: Finished, sql: str) -> list[tuple]:
    return Warehouse(run.home).query(sql)[1]


def test_every_asset_and_weight_is_complete_after_a_run(quick: Finished) -> None:
    found = status(quick.experiment, quick.home)
    assert {s.state for s in found} == {"complete"}
    assert {s.asset for s in found} == set(stages(quick.experiment))
    assert [s.partition for s in found if s.asset == "scores"] == ["0.1", "0.9"]


def test_scores_hold_one_row_per_policy_and_prompt(quick: Finished) -> None:
    rows = query(
        quick,
        "SELECT policy, w, count(*), count(DISTINCT prompt_id), count(helpfulness), count(margin_reward), "
        "min(response_tokens) FROM scores GROUP BY ALL ORDER BY w NULLS FIRST",
    )
    assert [row[:6] for row in rows] == [
        ("sft", None, 8, 8, 8, 8),
        ("modpo", 0.1, 8, 8, 8, 8),
        ("modpo", 0.9, 8, 8, 8, 8),
    ]
    assert all(row[6] >= 1 for row in rows)


def test_the_published_margin_reward_is_margin_beta_times_the_stored_log_ratio(quick: Finished) -> None:
    beta = quick.experiment.objective.margin_beta
    (difference,) = query(quick, f"SELECT max(abs(margin_reward - {beta} * margin_log_ratio)) FROM scores")[0]
    assert difference < 1e-12
    assert query(quick, "SELECT max(abs(margin_log_ratio)) > 0 FROM scores") == [(True,)]


def test_the_log_ratio_of_sft_to_itself_is_zero_and_that_of_a_policy_is_not(quick: Finished) -> None:
    assert query(quick, "SELECT max(abs(log_ratio_to_sft)) FROM scores WHERE policy = 'sft'") == [(0.0,)]
    assert query(quick, "SELECT min(abs(log_ratio_to_sft)) > 0 FROM scores WHERE policy = 'modpo'") == [(True,)]


def test_pairs_recur_in_the_table_of_reference_log_probs_once_each(quick: Finished) -> None:
    pairs = "SELECT chosen_id AS id FROM {0} UNION SELECT rejected_id FROM {0}"
    both = f"{pairs.format('preference_pairs')} UNION {pairs.format('margin_pairs')}"
    unmatched = query(
        quick,
        f"SELECT count(*) FROM ({both}) LEFT JOIN reference_log_probs ON id = response_id "
        "WHERE log_prob IS NULL OR log_prob >= 0",
    )
    assert unmatched == [(0,)]
    assert query(quick, f"SELECT count(*) = (SELECT count(*) FROM ({both})) FROM reference_log_probs") == [(True,)]


def artifact_of(run: Finished, asset: str, partition: str = ALL) -> Artifact:
    found = ArtifactStore(run.home).get(asset, partition, fingerprints(run.experiment)[asset, partition].value)
    assert found is not None
    return found


def test_every_prompt_has_its_samples_and_the_manifest_their_mean(copied: Callable[..., Finished]) -> None:
    run = copied(evaluation={"kl_samples": 3})
    assert run.run(select='key:"kl_to_sft"')
    for w in (0.1, 0.9):
        rows = query(run, f"SELECT prompt_id, sample, log_ratio, finish_reason FROM kl_to_sft WHERE w = {w}")
        prompts = {prompt for prompt, _, _, _ in rows}
        assert len(prompts) == 8
        assert {(p, s) for p, s, _, _ in rows} == {(p, s) for p in prompts for s in range(3)} and len(rows) == 24
        metrics = artifact_of(run, "kl_to_sft", f"{w}").manifest["metrics"]
        assert metrics["samples"] == 24 and metrics["capped"] == sum(reason == "length" for *_, reason in rows)
        assert metrics["kl"] == pytest.approx(np.mean([ratio for _, _, ratio, _ in rows]))
        means = [np.mean([ratio for p, _, ratio, _ in rows if p == prompt]) for prompt in prompts]
        assert metrics["kl_standard_error"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(8))
        assert all(ratio != 0 for _, _, ratio, _ in rows)


def test_the_first_samples_stay_where_more_are_drawn_and_are_not_the_answers(
    quick: Finished, copied: Callable[..., Finished]
) -> None:
    run = copied(evaluation={"kl_samples": 2})
    assert run.run(select='key:"kl_to_sft"', weights=["0.1"])
    first = pq.read_table(artifact_of(quick, "kl_to_sft", "0.1").file("kl.parquet"))
    both = pq.read_table(artifact_of(run, "kl_to_sft", "0.1").file("kl.parquet"))
    kept, more = (both.filter(pc.equal(both["sample"], number)) for number in (0, 1))
    assert kept["token_ids"] == first["token_ids"] and kept["prompt_id"] == first["prompt_id"]
    assert kept["log_ratio"].to_pylist() == pytest.approx(first["log_ratio"].to_pylist(), abs=1e-4)
    answers = pq.read_table(artifact_of(quick, "generations", "0.1").file("generations.parquet"))
    assert answers["prompt_id"] == first["prompt_id"]
    for one, other in ((kept, more), (first, answers)):
        same = [a == b for a, b in zip(one["token_ids"].to_pylist(), other["token_ids"].to_pylist(), strict=True)]
        assert sum(same) < 4, "some answers are two words long"


def test_the_kl_divergence_can_be_left_out(copied: Callable[..., Finished]) -> None:
    without = copied(evaluation={"kl_samples": 0})
    assert without.run()
    assert "kl_to_sft" not in {s.asset for s in status(without.experiment, without.home)}
    assert query(without, "SELECT count(*) FROM kl_to_sft") == [(0,)]
    assert recomputed(without) == SUMMARY


def test_the_quality_of_the_margin_adapter_is_that_of_the_rewards_it_was_judged_by(quick: Finished) -> None:
    """Same pairs, same order of the two responses, and the same share of pairs ranked right as the adapter's check."""
    rows = query(
        quick,
        "SELECT v.*, p.chosen_verbosity - p.rejected_verbosity AS gap, c.response_tokens, r.response_tokens "
        "FROM (SELECT pair_id, rating_gap, chosen_tokens, rejected_tokens, chosen_log_ratio - rejected_log_ratio AS d "
        "FROM margin_validation) v JOIN margin_pairs p USING (pair_id) "
        "JOIN reference_log_probs c ON c.response_id = p.chosen_id "
        "JOIN reference_log_probs r ON r.response_id = p.rejected_id WHERE p.split = 'validation'",
    )
    sanity = artifact_of(quick, "margin_adapter").manifest["metrics"]["sanity"]
    metrics = artifact_of(quick, "margin_adapter_quality").manifest["metrics"]
    assert query(quick, "SELECT count(*) FROM margin_validation") == [(len(rows),)]
    assert len(rows) == sanity["n"] == metrics["n"]
    assert all((gap, chosen, rejected) == row[-3:] for row in rows for _, gap, chosen, rejected in [row[:4]])
    beta = quick.experiment.margin_adapter.beta
    assert beta * np.mean([row[4] for row in rows]) == pytest.approx(sanity["mean_margin"], abs=1e-4)
    assert metrics["accuracy"]["mean"] == pytest.approx(sanity["accuracy"], abs=0.01)
    assert metrics["only_length"] in (True, False, None) and "margin adapter" in metrics["sentence"]


def test_every_row_leads_back_to_its_run_and_its_artifact(quick: Finished) -> None:
    store = ArtifactStore(quick.home)
    with dg.DagsterInstance.from_config(str(dagster_home(quick.home, "quick"))) as instance:
        for w, fingerprint, run_id in query(quick, "SELECT DISTINCT w, fingerprint, run_id FROM scores"):
            asset, partition = ("sft_scores", ALL) if w is None else ("scores", f"{w:g}")
            artifact = store.get(asset, partition, fingerprint)
            assert artifact is not None
            assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.SUCCESS
            source = "sft_generations" if w is None else "generations"
            generations = store.get(source, partition, artifact.manifest["inputs"][source][partition])
            assert generations is not None and generations.manifest["settings"]["generation.max_new_tokens"] == 96


def test_dagster_knows_each_fingerprint_as_the_data_version(quick: Finished) -> None:
    expected = fingerprints(quick.experiment)
    with dg.DagsterInstance.from_config(str(dagster_home(quick.home, "quick"))) as instance:
        for (asset, partition), fingerprint in expected.items():
            records = instance.fetch_materializations(
                dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=None if partition == ALL else [partition]),
                limit=1,
            ).records
            assert records[0].asset_materialization.tags["dagster/data_version"] == fingerprint.value


def test_checks_were_evaluated(quick: Finished) -> None:
    with dg.DagsterInstance.from_config(str(dagster_home(quick.home, "quick"))) as instance:
        for asset, check in (
            ("margin_adapter", "margin_adapter_prefers_chosen"),
            ("margin_adapter_quality", "margin_adapter_measures_more_than_length"),
            ("tradeoff", "margin_follows_weight"),
        ):
            key = dg.AssetCheckKey(dg.AssetKey(asset), check)
            records = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            assert records, f"{check} was not evaluated"


def test_the_run_announces_progress_and_where_to_look(quick: Finished) -> None:
    text = "\n".join(quick.announced)
    for expected in (
        "modpo_models w=0.1: 6 of 6, loss",
        "- Against SFT, rated helpfulness is",
        "report.html",
        "helpsteer query",
        "helpsteer ui",
    ):
        assert expected in text


def test_the_tradeoff_is_kept_as_numbers_and_pictures(quick: Finished) -> None:
    found = fingerprints(quick.experiment)["tradeoff", ALL]
    artifact = ArtifactStore(quick.home).get("tradeoff", ALL, found.value)
    assert artifact is not None
    result = json.loads(artifact.file("tradeoff.json").read_text())
    assert [point["label"] for point in result["points"]] == ["SFT", "w=0.1", "w=0.9"]
    assert result["preference_measured"] and result["axes"]["x"] == "helpfulness"
    assert artifact.file("front.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in artifact.file("front.svg").read_bytes()


def test_a_second_run_reuses_everything(copied: Callable[..., Finished]) -> None:
    again = copied()
    manifests = {path: path.stat().st_mtime_ns for path in again.home.glob("artifacts/*/*/*/manifest.json")}
    assert again.run()
    assert set(reused(again)) == set(stages(again.experiment))
    assert recomputed(again) == set()
    assert {path: path.stat().st_mtime_ns for path in again.home.glob("artifacts/*/*/*/manifest.json")} == manifests


@pytest.mark.parametrize("change", [{"beta": 0.3}, {"margin_beta": 0.3}])
def test_a_changed_beta_recomputes_the_policies_and_what_follows_and_nothing_else(
    copied: Callable[..., Finished], change: dict[str, float]
) -> None:
    changed = copied(objective={"weights": [0.1], **change})
    assert changed.run()
    recomputed_now = {
        s.asset
        for s in status(changed.experiment, changed.home)
        if (artifact := ArtifactStore(changed.home).find(s.asset, s.partition, s.fingerprint))
        and not any(artifact.path == other for other in _folders(copied, changed))
    }
    assert recomputed_now == BELOW_MODPO


def _folders(copied: Callable[..., Finished], changed: Finished) -> set[Path]:
    before = copied(name="quick")
    return {
        changed.home / "artifacts" / asset / partition / fingerprint.value
        for (asset, partition), fingerprint in fingerprints(before.experiment).items()
    }


def test_a_changed_evaluation_size_leaves_training_alone(copied: Callable[..., Finished]) -> None:
    changed = copied(evaluation={"prompts": 6})
    assert changed.run()
    assert recomputed(changed) == {
        "evaluation_prompts",
        "sft_generations",
        "generations",
        "sft_scores",
        "scores",
        "kl_to_sft",
        *SUMMARY,
    }
    assert query(changed, "SELECT count(*) FROM scores") == [(18,)]


def test_going_back_to_earlier_settings_finds_the_earlier_artifacts(copied: Callable[..., Finished]) -> None:
    assert copied(evaluation={"prompts": 6}).run()
    back = copied()
    assert back.run()
    assert recomputed(back) == set()
    assert query(back, "SELECT count(*) FROM scores") == [(24,)]


def test_an_experiment_with_a_length_penalty_has_no_margin_adapter_and_runs(copied: Callable[..., Finished]) -> None:
    objective = {
        "weights": [0.5],
        "margin": "length_penalty",
        "penalty": 0.01,
        "margin_role": None,
        "margin_beta": None,
    }
    penalized = copied(objective=objective)
    assert penalized.run()
    of_adapter = {"margin_pairs", "margin_adapter", "margin_adapter_quality"}
    assert of_adapter.isdisjoint(stages(penalized.experiment))
    ((difference,),) = query(
        penalized, "SELECT max(abs(margin_reward + 0.01 * response_tokens)) FROM scores WHERE w = 0.5"
    )
    assert difference < 1e-12


def test_without_a_rater_preference_quality_is_said_to_be_unmeasured(copied: Callable[..., Finished]) -> None:
    unrated = copied(evaluation={"rater": "none"})
    assert unrated.run()
    assert query(unrated, "SELECT count(helpfulness) FROM scores") == [(0,)]
    found = fingerprints(unrated.experiment)["tradeoff", ALL]
    artifact = ArtifactStore(unrated.home).get("tradeoff", ALL, found.value)
    assert artifact is not None
    result = json.loads(artifact.file("tradeoff.json").read_text())
    assert result["axes"] == {"x": "kl_to_sft", "y": "margin", "x_larger_is_better": False}
    assert "unmeasured" in result["note"]
    assert result["note"] in unrated.announced


def test_the_base_model_can_be_the_reference_policy(copied: Callable[..., Finished]) -> None:
    changed = copied(sft={"enabled": False}, objective={"weights": [0.5]})
    assert changed.run(select='key:"reference_log_probs" or key:"sft_model" or key:"evaluation_prompts"')
    found = fingerprints(changed.experiment)["sft_model", ALL]
    artifact = ArtifactStore(changed.home).get("sft_model", ALL, found.value)
    assert artifact is not None and artifact.manifest["metrics"] == {}


def test_a_base_whose_generation_defaults_contradict_each_other_can_be_used(
    tmp_path: Path, copied: Callable[..., Finished]
) -> None:
    # Many a model on the hub states a temperature and no sampling, and transformers refuses to save that.
    base = tmp_path / "base"
    shutil.copytree(local_path("model.base", "embedded"), base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false}')
    changed = copied(model={"base": str(base)}, sft={"enabled": False})
    assert changed.run(select='key:"sft_model"'), changed.announced


def test_a_chat_template_that_writes_the_date_is_refused(tmp_path: Path, copied: Callable[..., Finished]) -> None:
    base = tmp_path / "base"
    shutil.copytree(local_path("model.base", "embedded"), base)
    with (base / "chat_template.jinja").open("a") as template:
        template.write("{{ strftime_now('%d %b %Y') }}")
    changed = copied(model={"base": str(base)}, sft={"enabled": False})
    assert not changed.run(select='key:"sft_model"')
    assert any("writes today's date" in line for line in changed.announced)


def test_selected_weights_run_alone_and_the_summary_waits_for_the_others(
    tmp_path: Path, copied: Callable[..., Finished]
) -> None:
    changed = copied(objective={"weights": [0.1, 0.9], "beta": 0.25})
    assert changed.run(weights=["0.9"])
    states = {(s.asset, s.partition): s.state for s in status(changed.experiment, changed.home)}
    assert states["scores", "0.9"] == "complete"
    assert states["scores", "0.1"] == "out of date"
    assert states["score_summary", ALL] == "out of date"
    assert any("missing: 0.1" in line for line in changed.announced)


def test_a_damaged_artifact_is_set_aside_and_computed_again(copied: Callable[..., Finished]) -> None:
    damaged = copied()
    found = fingerprints(damaged.experiment)["evaluation_prompts", ALL]
    artifact = ArtifactStore(damaged.home).get("evaluation_prompts", ALL, found.value)
    assert artifact is not None
    file = artifact.file("prompts.parquet")
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert damaged.run(select='key:"evaluation_prompts"')
    assert file.read_bytes() == intact
    assert pq.read_table(file).num_rows == 8
    assert list(artifact.path.parent.glob("*.damaged-*"))


def test_an_asset_whose_input_is_missing_says_what_to_materialize(
    tmp_path: Path, copied: Callable[..., Finished]
) -> None:
    alone = Finished(copied().experiment, tmp_path / "empty")
    assert not alone.run(select='key:"preference_pairs"')
    assert any("preference_pairs needs helpsteer_ratings" in line for line in alone.announced)

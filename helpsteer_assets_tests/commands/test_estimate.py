"""What an experiment will cost, stage by stage: what is shared, what each weight takes, and what the texts come to."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.assets.graph import stages
from helpsteer_assets.commands.cost import Tokens
from helpsteer_assets.commands.estimate import Texts, estimate, measure_texts, total
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.data.pairs import build_pairs, unique_responses
from helpsteer_assets.modpo.data.ratings import rows_to_ratings
from helpsteer_assets.modpo.generation.responses import SHARE_OF_PROMPTS
from helpsteer_assets.modpo.models.loading import ModelSize
from helpsteer_assets_tests.assets.test_graph_fingerprints import LENGTH_PENALTY, experiment
from helpsteer_assets_tests.commands.test_cost import MACHINE, SIZE

PROMPT, RESPONSE = 10, 20
"""Tokens of every prompt and response."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    rows_to_ratings(build_rows(60, 10), folder / "ratings.parquet")
    for name, attribute in (("preference", "helpfulness"), ("margin", "verbosity")):
        build_pairs(folder / "ratings.parquet", attribute, 0.1, folder / f"{name}.parquet")
    return {name: folder / f"{name}.parquet" for name in ("preference", "margin")}


def lengths_of(pairs: dict[str, Path]) -> pa.Table:
    ids = unique_responses(*pairs.values())["response_id"]
    return pa.table(
        {"response_id": ids, "prompt_tokens": [PROMPT] * len(ids), "response_tokens": [RESPONSE] * len(ids)}
    )


def texts_of(found: Experiment, pairs: dict[str, Path], lengths: pa.Table | None = None) -> Texts:
    margin = pairs["margin"] if found.has_margin_adapter else None
    measured = lengths_of(pairs) if lengths is None else lengths
    return measure_texts(found, pairs["preference"], margin, measured, [PROMPT] * 8)


@pytest.fixture(scope="module")
def texts(pairs: dict[str, Path]) -> Texts:
    return texts_of(experiment(), pairs)


def seconds(found: Experiment, texts: Texts, size: ModelSize = SIZE) -> dict[str, float]:
    return {name: work.seconds(MACHINE) for name, work in estimate(found, size, texts, 1024).items()}


def test_texts_are_counted_as_the_stages_read_them(pairs: dict[str, Path], texts: Texts) -> None:
    table = pq.read_table(pairs["preference"])
    train = table.filter(pa.compute.equal(table["split"], "train"))
    selected = unique_responses(pairs["preference"], splits=["selection"])
    both = unique_responses(*pairs.values())
    prompts, responses = len(set(both["prompt_id"].to_pylist())), len(both)

    assert texts.preference.train_pairs == len(train)
    assert texts.preference.pair.read == pytest.approx(PROMPT + 2 * RESPONSE)
    assert texts.preference.pair.predicted == pytest.approx(2 * RESPONSE)
    assert texts.preference.selection.responses == len(selected)
    assert texts.both.read == prompts * PROMPT + responses * RESPONSE
    assert texts.both.attended == prompts * 55 + responses * (PROMPT * RESPONSE + 210)
    assert texts.chosen_train == len(set(train["chosen_id"].to_pylist())) == len(texts.chosen)


def test_lengths_that_were_not_measured_count_as_the_mean(pairs: dict[str, Path], texts: Texts) -> None:
    some = texts_of(experiment(), pairs, lengths_of(pairs).slice(0, 7))

    assert vars(some.both) == pytest.approx(vars(texts.both))
    assert vars(some.preference.pair) == pytest.approx(vars(texts.preference.pair))


def test_texts_are_cut_as_the_stages_cut_them(pairs: dict[str, Path]) -> None:
    limits = {"model.max_length": 16, "model.max_prompt_length": 4, "generation.max_new_tokens": 5}
    cut = texts_of(experiment({**limits, "generation.max_prompt_length": 6}), pairs)

    assert cut.preference.pair == Tokens(*map(pytest.approx, (4 + 24, 24, 10 + 2 * (48 + 78), 2)))
    assert set(cut.chosen) == {(4, 12)} and set(cut.asked) == {6} and set(cut.answers) == {5}


@given(weights=st.lists(st.integers(1, 99), min_size=1, max_size=20, unique=True))
def test_only_what_each_weight_takes_grows_with_the_weights(texts: Texts, weights: list[int]) -> None:
    found = experiment({"objective.weights": [w / 100 for w in weights]})
    works, one = estimate(found, SIZE, texts, 1024), estimate(experiment(), SIZE, texts, 1024)
    shared, all_of_it = total(found, works, weights=0), total(found, works)

    assert works == one
    assert all_of_it.flops - shared.flops == pytest.approx(
        len(weights) * (total(found, works, weights=1).flops - shared.flops)
    )


def test_every_stage_that_computes_with_the_model_is_there(texts: Texts) -> None:
    without = {"helpsteer_ratings", "preference_pairs", "margin_pairs", "evaluation_prompts"}
    without |= {"score_summary", "tradeoff", "tradeoff_report"}

    assert list(seconds(experiment(), texts)) == [name for name in stages(experiment()) if name not in without]
    assert all(value > 0 for value in seconds(experiment(), texts).values())


def test_a_length_penalty_has_no_margin_adapter_to_pay_for(pairs: dict[str, Path], texts: Texts) -> None:
    short = experiment(**LENGTH_PENALTY)
    found, other = seconds(short, texts_of(short, pairs)), seconds(experiment(), texts)

    assert not {"margin_adapter", "margin_adapter_quality"} & set(found)
    assert found["margin_rewards"] < other["margin_rewards"] and found["scores"] < other["scores"]
    assert found["modpo_models"] == pytest.approx(other["modpo_models"])


@pytest.mark.parametrize(
    ("changes", "dearer"),
    [
        ({"modpo.steps": 9}, {"modpo_models"}),
        ({"modpo.accumulation": 2}, {"modpo_models"}),
        ({"modpo.gradient_checkpointing": True}, {"modpo_models"}),
        ({"margin_adapter.batch_size": 32}, {"margin_adapter"}),
        ({"sft.steps": 5}, {"sft_model"}),
        ({"generation.do_sample": True}, {"sft_generations", "generations"}),
        ({"evaluation.kl_samples": 3}, {"kl_to_sft"}),
    ],
)
def test_a_setting_makes_its_stages_dearer_and_no_others(
    texts: Texts, changes: dict[str, Any], dearer: set[str]
) -> None:
    before, after = seconds(experiment(), texts), seconds(experiment(changes), texts)

    assert {name for name in before if after[name] > before[name]} == dearer
    assert {name for name in before if after[name] != before[name]} == dearer


def test_without_sft_or_samples_nothing_is_computed_for_them(texts: Texts) -> None:
    found = experiment({"sft.enabled": False, "evaluation.kl_samples": 0})
    works = estimate(found, SIZE, texts, 1024)

    assert works["sft_model"].flops == 0 and "kl_to_sft" not in works


def test_prompts_are_decoded_in_the_shares_that_generation_makes() -> None:
    from helpsteer_assets.commands import estimate as module

    assert module._DECODED_TOGETHER == SHARE_OF_PROMPTS

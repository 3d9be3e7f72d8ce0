"""The estimate of an experiment's cost: FLOPs by torch's own counter, tokens of the pairs, rates of finished runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpsteer_assets.commands.estimate import Pairs, Work, estimate, measured_rates, product_rate
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.experiment.settings import Experiment, LoraSettings
from helpsteer_assets.modpo.data.pairs import build_pairs, unique_responses
from helpsteer_assets.modpo.data.ratings import rows_to_ratings
from helpsteer_assets.modpo.models.loading import load_model, model_size
from helpsteer_assets.store.artifacts import ALL, ArtifactStore
from helpsteer_assets.store.home import Home as FolderHome
from helpsteer_assets_tests.assets.test_graph_fingerprints import experiment

PROMPT, RESPONSE = 10, 20
"""Tokens of every prompt and response."""
LENGTHS = np.array([[PROMPT, RESPONSE]] * 5)
ASKED = np.array([PROMPT] * 8)
MODEL_BYTES = 10_000


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pairs]:
    folder = tmp_path_factory.mktemp("pairs")
    rows_to_ratings(build_rows(60, 10), folder / "ratings.parquet")
    made = {}
    for name, attribute in (("preference", "helpfulness"), ("margin", "verbosity")):
        file = folder / f"{name}.parquet"
        made[name] = Pairs(file, build_pairs(folder / "ratings.parquet", attribute, 0.1, file))
    return made


def works_of(pairs: dict[str, Pairs], found: Experiment, weights_per_token: int = 1) -> dict[str, Work]:
    margin = pairs["margin"] if found.has_margin_adapter else None
    return estimate(found, weights_per_token, pairs["preference"], margin, LENGTHS, ASKED)


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(tiny_model_path: Path, pairs: dict[str, Pairs]) -> None:
    model = load_model(tiny_model_path, precision="fp32")
    tokens = torch.randint(3, 250, (2, 40))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model.requires_grad_(False)  # as under a LoRA: the backward pass goes through, and the weights get no gradient
    forward = counted(lambda: model(tokens)) / tokens.numel()
    both_ways = counted(lambda: model(inputs_embeds=embedded).logits.sum().backward()) / tokens.numel()
    works = works_of(pairs, experiment(), model_size(tiny_model_path, LoraSettings()).weights_per_token)
    scoring, training = works["reference_log_probs"], works["modpo_models"]
    held_out = unique_responses(pairs["preference"].file, splits=("selection",))
    evaluated = 2 * (len(set(held_out["prompt_id"].to_pylist())) * PROMPT + len(held_out) * RESPONSE)
    trained = 2 * 8 * (PROMPT + 2 * RESPONSE)

    assert scoring.flops == pytest.approx(forward * scoring.tokens, rel=0.02)
    assert training.tokens == trained + evaluated, "two steps of eight pairs, and an evaluation after each"
    assert training.flops == pytest.approx(both_ways * trained + forward * evaluated, rel=0.02)


def test_each_stage_reads_its_texts_as_often_as_it_will(pairs: dict[str, Pairs]) -> None:
    both = unique_responses(*(each.file for each in pairs.values()))
    works = works_of(pairs, experiment({"evaluation.kl_samples": 3}))
    prompts = len(set(both["prompt_id"].to_pylist()))
    answered = len(ASKED) * (PROMPT + RESPONSE)

    assert works["reference_log_probs"].tokens == prompts * PROMPT + len(both) * RESPONSE
    assert works["generations"].tokens == answered and works["sft_scores"].tokens == 2 * answered
    assert works["scores"].tokens == 3 * answered, "the policy, the SFT model and the margin adapter"
    assert works["kl_to_sft"].tokens == 3 * 3 * answered
    assert {name for name, work in works.items() if work.each_weight} == {
        "modpo_models",
        "generations",
        "scores",
        "kl_to_sft",
    }


def test_texts_are_cut_as_the_stages_cut_them(pairs: dict[str, Pairs]) -> None:
    limits = {"model.max_length": 16, "model.max_prompt_length": 4, "generation.max_prompt_length": 6}
    works = works_of(pairs, experiment({**limits, "generation.max_new_tokens": 5}))
    both = unique_responses(*(each.file for each in pairs.values()))

    assert works["generations"].tokens == len(ASKED) * (6 + 5)
    assert works["reference_log_probs"].tokens == len(set(both["prompt_id"].to_pylist())) * 4 + len(both) * 12


# Rates


class Home:
    """A home with artifacts whose manifests hold what the stages write there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finish(self, asset: str, fingerprint: str, resumed: bool = False, **manifest: Any) -> float:
        """Finish a stage; its duration in seconds."""
        store, number = ArtifactStore(self.folder), f"{fingerprint:0>32}"
        if resumed:
            (store.partial(asset, ALL, number) / "checkpoints").mkdir(parents=True)
            (store.partial(asset, ALL, number) / "checkpoints" / "rows.jsonl").write_text("{}")

        def compute(folder: Path) -> dict[str, Any]:
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_bytes(bytes(manifest.get("bytes", MODEL_BYTES)))
            time.sleep(0.02)
            return manifest.get("metrics", {})

        content = {"settings": manifest.get("settings", {}), "inputs": {}}
        if base := manifest.get("base"):
            content["inputs"] = {"sft_model": {ALL: f"{base:0>32}"}}
        artifact, _ = store.build(asset, ALL, number, manifest=content, compute=compute, on_wait=print)
        return artifact.manifest["duration_s"]

    def rates(self, device: str = "cpu") -> dict[str, float]:
        works = {
            "reference_log_probs": Work(rows=10, tokens=100, flops=5000),
            "margin_adapter": Work(rows=10, tokens=100, flops=7000),
            "modpo_models": Work(rows=10, tokens=100, flops=7000),
            "margin_rewards": Work(rows=10, tokens=100, flops=5000),
        }
        return measured_rates(FolderHome(self.folder), works, MODEL_BYTES, device)


def test_a_finished_stage_gives_the_rate_of_the_next(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.rates() == {}
    home.finish("sft_model", "a")
    scored = home.finish("reference_log_probs", "1", base="a", metrics={"responses": 40})
    trained = home.finish(
        "modpo_models",
        "2",
        base="a",
        metrics={"steps": 3},
        settings={"modpo.batch_size": 4, "modpo.accumulation": 2},
    )

    assert home.rates() == pytest.approx(
        {"reference_log_probs": 500 * 40 / scored, "modpo_models": 700 * 3 * 4 * 2 / trained}
    )
    assert home.rates("NVIDIA H100") == {}, "it ran on another device"


def test_a_stage_that_was_resumed_or_did_other_work_gives_no_rate(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.finish("sft_model", "a")
    home.finish("sft_model", "b", bytes=2 * MODEL_BYTES)
    home.finish("reference_log_probs", "1", base="a", metrics={"responses": 40}, resumed=True)
    home.finish("reference_log_probs", "2", base="b", metrics={"responses": 40})
    home.finish("margin_rewards", "3", base="a", metrics={"responses": 40})  # of a length penalty: no margin adapter
    assert home.rates() == {}


def test_a_matrix_product_is_measured_in_both_precisions() -> None:
    for precision in ("fp32", "bf16"):
        assert 1e7 < product_rate(torch.device("cpu"), precision) < 1e14

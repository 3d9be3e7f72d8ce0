"""The benchmarks compare like with like: on a tiny model their numbers agree. Nothing here depends on a clock."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import data_at_size, generation, gpu, grid, scoring, start_up, training_step
from benchmarks.__main__ import main
from benchmarks.gemm_floor import GemmFloor, count_tokens
from benchmarks.models import Contenders, contenders, in_fp64
from benchmarks.optimizer import take_gradient
from benchmarks.pairs import MIXES, Pair, RandomText
from benchmarks.reference_procedure import exact_step
from benchmarks.timing import peak_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> Iterator[Contenders]:
    with contenders("tiny", CPU, "fp32") as made:
        yield made


@pytest.fixture
def text(models: Contenders) -> RandomText:
    return RandomText(models.vocabulary, MIXES["mid prompts"], max_tokens=48)


def test_training_steps_of_both_give_the_same_losses_and_gradients_and_leave_the_weights(
    models: Contenders, text: RandomText
) -> None:
    before = {name: tensor.clone() for name, tensor in models.policy.state_dict().items()}
    found = training_step.compare(models, [text.pairs(4) for _ in range(3)], CPU)

    assert found["loss_difference"] < 3e-5
    assert found["gradient_difference"] < 2e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.policy.state_dict().items())


def test_generated_responses_of_both_are_the_same() -> None:
    found = generation.compare("tiny", generation.Case((2, 20), 12, True), count=10, rounds=1)

    assert found["identical_responses"] == found["prompts"] == 10
    assert 1 < found["tokens_per_response"] < found["longest_response_of_a_batch"] <= 12


def test_both_are_close_to_fp64_and_so_is_fp64_to_itself(models: Contenders, text: RandomText) -> None:
    pairs = text.pairs(3)
    found = training_step.compare_with_fp64(models, pairs)
    doubled = in_fp64(models.reference)
    losses, _ = exact_step(doubled, pairs, w=0.5, beta=0.1)
    gradient = take_gradient(doubled)
    # Other micro-batches, other rounding: in fp64 far less of it than fp32 has.
    by_one = [exact_step(doubled, [pair], w=0.5, beta=0.1)[0] for pair in pairs]
    gradient_by_one = take_gradient(doubled) / len(pairs)

    for quantity in ("loss", "log_prob", "gradient"):
        assert 0 < found[f"{quantity}_error_of_reference"] < 1e-4
        assert 0 < found[f"{quantity}_error_of_ours"] < 1e-4
    assert losses.dtype == torch.float64
    assert torch.allclose(torch.cat(by_one), losses, rtol=1e-13)
    assert torch.allclose(gradient_by_one, gradient, rtol=1e-9, atol=1e-13)


def test_a_grid_of_both_gives_the_same_losses_for_every_weight(models: Contenders, text: RandomText) -> None:
    rows = grid.compare(models, text.helpsteer_like(4), (1, 3), 4, CPU)

    assert [row["weights"] for row in rows] == [1, 3]
    assert all(row["loss_difference"] < 3e-5 for row in rows)
    assert rows[0]["share_of_log_prob_table"] > rows[1]["share_of_log_prob_table"] > 0


def test_the_table_and_the_scores_of_both_are_the_same(models: Contenders, text: RandomText) -> None:
    pairs = text.helpsteer_like(3)
    table = scoring.compare_tables(models, pairs, 1, CPU)
    drawn = [text.prompt_and_responses(3) for _ in range(2)]
    by_policy = [[(prompt, responses[policy]) for prompt, responses in drawn] for policy in range(3)]
    scores = scoring.compare_scores(models, by_policy, 1, CPU)

    assert table["log_prob_difference"] < 1e-4
    assert table["unique_responses"] < 2 * table["pairs"]
    assert scores["log_ratio_difference"] < 1e-4


def test_trl_does_the_same_work_at_w_1(models: Contenders, text: RandomText) -> None:
    trl_dpo = pytest.importorskip("benchmarks.trl_dpo")
    found = trl_dpo.compare(models, text.pairs(4), 1, 3, CPU)

    assert found["loss_difference"] < 3e-5
    assert found["gradient_difference"] < 2e-5


def test_the_floor_counts_each_prompt_token_once(models: Contenders) -> None:
    pair = Pair([10] * 5, [11] * 2, [12] * 3)
    # Llama of 2 layers, d = 32: q and o 32 x 32, k and v 16 x 32, three of 64 x 32; vocabulary 300.
    body, head = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32), 32 * 300

    assert count_tokens([pair]) == (10, 5)
    assert GemmFloor(models.reference.get_base_model()).flops([pair]) == 4 * (body * 10 + head * 5)


def test_the_cases_of_data_and_start_up_run(tmp_path: Path) -> None:
    *_, tokenization = data_at_size.measure(rows=40)
    commands = start_up._commands(tmp_path, rounds=1)

    assert 20 < tokenization["kept"] <= 40 and tokenization["peak_mib"] >= tokenization["start_mib"]
    assert all(command["wall_s"] > 0 for command in commands)


def test_peak_memory_sees_what_was_freed_again() -> None:
    peak = peak_memory(lambda: torch.ones(64 * 2**18).sum(), CPU)

    assert peak is None or 60 < peak < 100


def test_the_parts_for_a_gpu_run_on_a_cpu_with_a_tiny_model(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    main(["gpu", "--tiny", "--json", str(file)])
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]

    assert list(parts) == [part.__name__ for part in gpu.PARTS]
    assert all(row["useful_tflops"] > 0 for row in parts["training_step"]["rows"])
    assert parts["noise"]["log_ratio"] < 0.1
    assert parts["merging"]["weights_put_back_exactly"] and parts["merging"]["log_ratio_of_the_policy"] > 0.1
    assert parts["training"]["last_loss"] < parts["training"]["first_loss"]

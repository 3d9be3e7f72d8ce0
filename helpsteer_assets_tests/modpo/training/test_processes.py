"""Several processes make the steps of one (fp32, CPU, gloo)."""

import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file

from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.training.loop import TrainingResult
from helpsteer_assets.modpo.training.preference import PreferencePair, train_preference
from helpsteer_assets.modpo.training.processes import ALONE, World
from helpsteer_assets.modpo.training.sft import train_sft
from helpsteer_assets_tests.conftest import make_sequences, run_to_its_death
from helpsteer_assets_tests.modpo.training.test_preference import as_dataset
from helpsteer_assets_tests.modpo.training.test_resume import at_step

LORA = Lora(r=4, alpha=8)
FIVE = {"steps": 5, "evaluate_every": 1, "learning_rate": 5e-3}


def in_processes(size: int, folder: Path, work: Callable[[World], Any], *, sharded: bool = False) -> list[Any]:
    """What `work` returns in each of so many processes that form a world."""

    def rank(number: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=number, world_size=size)
        torch.set_num_threads(1)
        (folder / f"result-{number}").write_bytes(pickle.dumps(work(World(number, size, sharded))))
        dist.barrier()

    folder.mkdir(parents=True, exist_ok=True)
    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(n,)) for n in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * size
    return [pickle.loads((folder / f"result-{number}").read_bytes()) for number in range(size)]


def loaded(base: Path, lora: Lora, world: World) -> PeftModel:
    model = attach_lora(load_model(base, precision="fp32"), lora, 0)
    return world.shard(model, torch.device("cpu")) if world.sharded else model


def by_preference(
    base: Path,
    folder: Path,
    pairs: list[PreferencePair],
    lora: Lora,
    *,
    progress: Progress = silent,
    **settings: Any,
) -> Callable[[World], TrainingResult]:
    """A MODPO training in a world, whose adapter lies in folder/<rank> afterwards."""

    def train(world: World) -> TrainingResult:
        model = loaded(base, lora, world)
        result = train_preference(
            model,
            train_pairs=as_dataset(pairs[:-3]),
            selection_pairs=as_dataset(pairs[-3:]),
            w=0.3,
            beta=0.1,
            settings=Training(**settings),
            batch_tokens=60,
            seed=0,
            report_to=[],
            what="w=0.3",
            checkpoints=folder / "checkpoints",
            progress=progress,
            world=world,
        )
        model.save_pretrained(folder / str(world.rank))
        return result

    return train


def by_sft(base: Path, folder: Path, tokenizer: Any, count: int, **settings: Any) -> Any:
    """An SFT in a world, whose adapter lies in folder/<rank> afterwards."""

    def train(world: World) -> TrainingResult:
        model = loaded(base, LORA, world)
        sequences = make_sequences(tokenizer, count)
        result = train_sft(
            model,
            tokenizer,
            train_sequences=sequences[:-3],
            selection_sequences=sequences[-3:],
            settings=Training(**settings),
            seed=0,
            report_to=[],
            checkpoints=folder / "checkpoints",
            world=world,
        )
        model.save_pretrained(folder / str(world.rank))
        return result

    return train


def adapter(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / str(rank) / "adapter_model.safetensors")


def assert_same_training(one: TrainingResult, several: TrainingResult) -> None:
    assert replace(several, history=[], best_loss=None) == replace(one, history=[], best_loss=None)
    assert several.best_loss == pytest.approx(one.best_loss, abs=1e-5)
    assert len(several.history) == len(one.history)
    for theirs, ours in zip(several.history, one.history, strict=True):
        assert theirs.keys() == ours.keys()
        for name in ("loss", "eval_loss"):
            assert theirs.get(name) == pytest.approx(ours.get(name), abs=1e-5), (name, ours["step"])
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4), ours["step"]
        for name in ("step", "learning_rate", "accuracy", "eval_accuracy"):
            assert theirs.get(name) == ours.get(name), (name, ours["step"])


# Pairs, batch size, accumulation and processes. In the last step of a pass there is one batch of two, the second one
# with a single pair; nothing short at all, for three processes.
SHAPES = [(15, 3, 2, 2), (12, 2, 3, 3)]


class TestSteps:
    def compare(
        self,
        tmp_path: Path,
        size: int,
        make: Callable[[Path], Callable[[World], TrainingResult]],
        *,
        sharded: bool = False,
    ) -> None:
        one = make(tmp_path / "one")(ALONE)
        found = in_processes(size, tmp_path / "several", make(tmp_path / "several"), sharded=sharded)
        assert found == [found[0]] * size
        assert_same_training(one, found[0])
        first = adapter(tmp_path / "several", 0)
        for rank in range(1, size):
            assert all(torch.equal(weight, first[name]) for name, weight in adapter(tmp_path / "several", rank).items())
        for name, weight in adapter(tmp_path / "one", 0).items():
            torch.testing.assert_close(first[name], weight, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(("count", "batch_size", "accumulation", "size"), SHAPES)
    def test_of_preference_trainings(
        self, tiny_model_path, pairs, tmp_path, count, batch_size, accumulation, size
    ) -> None:
        how = FIVE | {"batch_size": batch_size, "accumulation": accumulation}
        some = pairs[:count] + pairs[-3:]
        self.compare(tmp_path, size, lambda folder: by_preference(tiny_model_path, folder, some, LORA, **how))

    @pytest.mark.parametrize(("count", "batch_size", "accumulation", "size"), SHAPES)
    def test_of_sft(self, tiny_model_path, tokenizer, tmp_path, count, batch_size, accumulation, size) -> None:
        how = FIVE | {"batch_size": batch_size, "accumulation": accumulation}
        self.compare(tmp_path, size, lambda folder: by_sft(tiny_model_path, folder, tokenizer, count + 3, **how))

    # In a short last step one process idles; and passes of 60 tokens make different numbers of them for the two.
    def test_of_preference_trainings_with_sharded_weights(self, tiny_model_path, pairs, tmp_path) -> None:
        how = FIVE | {"batch_size": 8, "gradient_checkpointing": True}
        make = partial(by_preference, tiny_model_path, pairs=pairs, lora=LORA, **how)
        self.compare(tmp_path, 2, lambda folder: make(folder=folder), sharded=True)


def test_a_training_goes_on_in_another_number_of_processes(tiny_model_path, pairs, tmp_path) -> None:
    how = {"batch_size": 2, "accumulation": 2, "steps": 10, "evaluate_every": 3, "learning_rate": 5e-3}
    killed = tmp_path / "killed"
    run_to_its_death(lambda: by_preference(tiny_model_path, killed, pairs, LORA, progress=at_step(5), **how)(ALONE))
    resumed, _ = in_processes(2, killed, by_preference(tiny_model_path, killed, pairs, LORA, **how))
    assert resumed.resumed_from == 3
    one = by_preference(tiny_model_path, tmp_path / "one", pairs, LORA, **how)(ALONE)
    assert_same_training(one, replace(resumed, resumed_from=None))


def test_sharded_weights_lie_in_parts(tiny_model_path, tmp_path) -> None:
    def held(world: World) -> tuple[int, int]:
        model = loaded(tiny_model_path, LORA, world)
        layers = [p for name, p in model.named_parameters() if ".layers." in name]
        frozen = [p for p in layers if not p.requires_grad]
        return sum(p.to_local().numel() for p in frozen), sum(p.numel() for p in frozen)

    for here, whole in in_processes(2, tmp_path, held, sharded=True):
        assert here * 2 == whole

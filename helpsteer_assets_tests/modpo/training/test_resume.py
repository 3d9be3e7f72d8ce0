"""A training that is killed at any moment ends in the bytes of one that is not (fp32, CPU, one thread)."""

import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpsteer_assets.modpo.models.loading import attach_lora, load_model, load_tokenizer
from helpsteer_assets.modpo.progress import silent
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.training import checkpoints
from helpsteer_assets.modpo.training import loop as training
from helpsteer_assets.modpo.training.checkpoints import (
    checkpoint_progress,
    mark_complete,
    newest_checkpoint,
    prune,
)
from helpsteer_assets.modpo.training.loop import TrainingResult
from helpsteer_assets.modpo.training.preference import PreferencePair, train_preference
from helpsteer_assets.modpo.training.sft import train_sft
from helpsteer_assets_tests.conftest import die, make_sequences, run_to_its_death
from helpsteer_assets_tests.modpo.training.test_preference import as_dataset

# Dropout draws random numbers in every step, 10 steps cross two borders of a pass over the pairs, and 10 is no multiple
# of the 3 steps between checkpoints: those are at 3, 6, 9 and 10.
LORA = Lora(r=4, alpha=8, dropout=0.2)
HOW: dict[str, Any] = {"steps": 10, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "evaluate_every": 3}

Train = Callable[..., TrainingResult]


@pytest.fixture(scope="module", params=["preference", "sft"])
def train(request: pytest.FixtureRequest, tiny_model_path: Path, pairs: list[PreferencePair]) -> Train:
    """Train in a folder: checkpoints in folder/checkpoints, the adapter in folder/adapter."""

    def run(
        folder: Path, *, selection: bool = True, progress: Any = silent, lora: Lora = LORA, seed: int = 0, **how: Any
    ) -> TrainingResult:
        model = attach_lora(load_model(tiny_model_path, precision="fp32"), lora, 0)
        held_out = [replace(p, margin_chosen=0.0, margin_rejected=0.0) for p in pairs[16:]] if selection else []
        common: dict[str, Any] = {
            "settings": Training(**HOW | how),
            "seed": seed,
            "report_to": [],
            "checkpoints": folder / "checkpoints",
            "progress": progress,
        }
        if request.param == "preference":
            data = {"train_pairs": as_dataset(pairs[:16]), "selection_pairs": as_dataset(held_out)}
            result = train_preference(model, **data, w=0.3, beta=0.1, batch_tokens=60, what="w=0.3", **common)
        else:
            tokenizer = load_tokenizer(tiny_model_path)
            sequences, selected = make_sequences(tokenizer, 16), [pair.chosen for pair in held_out]
            result = train_sft(model, tokenizer, train_sequences=sequences, selection_sequences=selected, **common)
        model.save_pretrained(folder / "adapter")
        return result

    return run


preference_only = pytest.mark.parametrize("train", ["preference"], indirect=True)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def disturb_random_state() -> None:
    """A new process's random numbers are others than those of the one that died."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def at_step(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, **numbers: float) -> None:
        if done == step:
            die()

    return progress


@dataclass(frozen=True)
class Whole:
    """What a training comes to without a death."""

    folder: Path
    result: TrainingResult


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    return Whole(folder, train(folder))


class TestKilled:
    def resumes_to_the_same(self, train: Train, tmp_path: Path, whole: Whole, **how: Any) -> TrainingResult:
        disturb_random_state()
        resumed = train(tmp_path / "killed", **how)
        assert adapter(tmp_path / "killed") == adapter(whole.folder)
        assert replace(resumed, resumed_from=None) == whole.result
        return resumed

    def kill(self, train: Train, tmp_path: Path, **how: Any) -> None:
        run_to_its_death(lambda: train(tmp_path / "killed", **how))
        assert not (tmp_path / "killed" / "adapter").exists()

    @pytest.mark.parametrize(("step", "resumes_from"), [(2, None), (5, 3), (10, 9)])
    def test_between_two_checkpoints(self, train, tmp_path, whole, step, resumes_from):
        self.kill(train, tmp_path, progress=at_step(step))
        assert self.resumes_to_the_same(train, tmp_path, whole).resumed_from == resumes_from

    @preference_only
    def test_while_a_checkpoint_is_written(self, train, tmp_path, whole):
        def save_half(trainer: transformers.Trainer, folder: str) -> None:
            Path(folder, "rng_state.pth").write_bytes(b"half")
            if trainer.state.global_step == 6:
                die()

        with pytest.MonkeyPatch.context() as patch:
            original = transformers.Trainer._save_rng_state
            patch.setattr(
                transformers.Trainer,
                "_save_rng_state",
                lambda trainer, folder: (save_half if trainer.state.global_step == 6 else original)(trainer, folder),
            )
            self.kill(train, tmp_path)
        assert checkpoint_progress(tmp_path / "killed/checkpoints") == (3, 10)
        assert self.resumes_to_the_same(train, tmp_path, whole).resumed_from == 3

    @preference_only
    def test_while_an_old_checkpoint_is_deleted(self, train, tmp_path, whole):
        def delete_half(folder: Path) -> None:
            next(Path(folder).glob("*.safetensors")).unlink()
            die()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints.shutil, "rmtree", delete_half)
            self.kill(train, tmp_path)
        assert self.resumes_to_the_same(train, tmp_path, whole).resumed_from >= 6

    @preference_only
    @pytest.mark.parametrize("selection", [True, False])
    def test_after_the_last_step(self, train, tmp_path, selection):
        whole = Whole(tmp_path / "whole", train(tmp_path / "whole", selection=selection))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "set_peft_model_state_dict", lambda *_: die())
            self.kill(train, tmp_path, selection=selection)
        assert checkpoint_progress(tmp_path / "killed/checkpoints") == (10, 10)
        assert self.resumes_to_the_same(train, tmp_path, whole, selection=selection).resumed_from == 10

    @preference_only
    def test_goes_on_from_the_checkpoint_before_one_that_was_damaged_since(self, train, tmp_path, whole):
        self.kill(train, tmp_path, progress=at_step(8))
        flip_a_bit(tmp_path / "killed/checkpoints/checkpoint-6/optimizer.pt")
        assert self.resumes_to_the_same(train, tmp_path, whole).resumed_from == 3

    @preference_only
    @pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_code_in_a_checkpoint_that_vouches_for_itself_does_not_run(self, train, tmp_path, file):
        class Runs:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
                return open, (str(tmp_path / "ran"), "w")

        self.kill(train, tmp_path, progress=at_step(5))
        checkpoint = tmp_path / "killed/checkpoints/checkpoint-3"
        torch.save(Runs(), checkpoint / file)
        (checkpoint / "complete.json").unlink()
        mark_complete(checkpoint, 3, 10)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            train(tmp_path / "killed")
        assert not (tmp_path / "ran").exists()
        torch.load(checkpoint / file, weights_only=False).close()
        assert (tmp_path / "ran").exists(), "it would have run"

    @preference_only
    def test_in_a_training_that_stops_early(self, train, tmp_path):
        # A learning rate at which the held-out loss goes up and down.
        how = {"steps": 60, "evaluate_every": 2, "early_stopping": 3, "learning_rate": 0.1}
        whole = Whole(tmp_path / "whole", train(tmp_path / "whole", **how))
        assert whole.result.best_step + 6 == whole.result.steps < 60
        for step in (whole.result.steps - 3, whole.result.steps - 1):
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
            self.kill(train, tmp_path, progress=at_step(step), **how)
            self.resumes_to_the_same(train, tmp_path, whole, **how)

    @preference_only
    def test_after_it_stopped_early(self, train, tmp_path):
        how = {"steps": 60, "evaluate_every": 2, "early_stopping": 1, "learning_rate": 0.1}
        whole = Whole(tmp_path / "whole", train(tmp_path / "whole", **how))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "set_peft_model_state_dict", lambda *_: die())
            self.kill(train, tmp_path, **how)
        assert self.resumes_to_the_same(train, tmp_path, whole, **how).resumed_from == whole.result.steps < 60


@preference_only
def test_dropout_and_data_order_matter_here(train, tmp_path):
    """Were they without effect, the tests above could not see whether random state is restored."""
    plain = Lora(r=4, alpha=8)
    for name, how in (("as is", {}), ("no dropout", {"lora": plain}), ("other order", {"lora": plain, "seed": 1})):
        train(tmp_path / name, steps=3, **how)
    assert len({adapter(folder) for folder in tmp_path.iterdir()}) == 3


class TestCheckpoints:
    def make(self, folder: Path, step: int, *, complete: bool = True, best: int | None = None) -> Path:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"state")
        if complete:
            mark_complete(checkpoint, step, 20, best=best)
        return checkpoint

    def test_newest_is_the_one_with_most_steps_and_a_half_written_one_is_removed(self, tmp_path):
        assert newest_checkpoint(tmp_path / "missing") is None is checkpoint_progress(tmp_path / "missing")
        for step in (9, 10, 2):
            self.make(tmp_path, step)
        half = self.make(tmp_path, 12, complete=False)
        assert checkpoint_progress(tmp_path) == (10, 20)
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
        assert not half.exists()

    @pytest.mark.parametrize("how", ["truncated", "missing", "flipped", "complete.json flipped", "complete.json empty"])
    def test_a_damaged_one_is_thrown_away_with_a_warning_and_the_one_before_it_taken(self, tmp_path, how, caplog):
        self.make(tmp_path, 2)
        damaged = self.make(tmp_path, 4)
        file = damaged / ("complete.json" if "complete" in how else "optimizer.pt")
        if "flipped" in how:
            flip_a_bit(file)
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: 0 if "empty" in how else 2])
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        assert not damaged.exists()
        assert f"{damaged} is damaged" in caplog.text

    def test_swapped_ones_are_noticed(self, tmp_path):
        two, four = self.make(tmp_path, 2), self.make(tmp_path, 4)
        two.rename(tmp_path / "aside")
        four.rename(two)
        (tmp_path / "aside").rename(four)
        assert newest_checkpoint(tmp_path) is None

    def test_one_whose_best_is_lost_is_thrown_away(self, tmp_path):
        self.make(tmp_path, 2)
        self.make(tmp_path, 4, best=2)
        self.make(tmp_path, 6, best=2)
        flip_a_bit(tmp_path / "checkpoint-2" / "optimizer.pt")
        assert newest_checkpoint(tmp_path) is None
        assert not list(tmp_path.iterdir())

    def test_the_last_two_and_the_best_of_each_are_kept_and_what_is_no_checkpoint(self, tmp_path):
        for step, best in ((2, 2), (4, 4), (6, 6), (8, 4), (10, 10)):
            self.make(tmp_path, step, best=best)
        (tmp_path / "log_probs.jsonl").write_text("")
        prune(tmp_path)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == ["checkpoint-10", "checkpoint-4", "checkpoint-8", "log_probs.jsonl"]

"""A training in processes that torchrun starts: it ends as one process ends it, and nobody outlives anybody."""

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.settings import Compute, Lora, Training
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.modpo.training.launch import Job, ProcessDiedError, train_together
from helpsteer_assets.modpo.training.loop import TrainingResult
from helpsteer_assets.modpo.training.preference import train_preference
from helpsteer_assets.modpo.training.processes import World
from helpsteer_assets_tests.conftest import die
from helpsteer_assets_tests.modpo.training.test_preference import as_dataset
from helpsteer_assets_tests.modpo.training.test_processes import (
    adapter,
    assert_same_training,
    by_preference,
    in_processes,
)

ROOT = Path(__file__).parents[2]
LORA = Lora(r=4, alpha=8)
DROPOUT = Lora(r=4, alpha=8, dropout=0.2)
HOW = {"batch_size": 2, "accumulation": 2, "steps": 10, "evaluate_every": 3, "learning_rate": 5e-3}


@pytest.fixture(autouse=True)
def _ranks_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def job_of(
    base: Path, folder: Path, pairs: Any, *, train: Any = train_preference, lora=LORA, fsdp=False, **how: Any
) -> Job:
    return Job(
        base=base,
        precision="fp32",
        trust_remote_code=False,
        lora=lora,
        seed=0,
        run=Compute(device="cpu", threads=1, train_processes=2, fsdp=fsdp),
        train=partial(
            train,
            train_pairs=as_dataset(pairs[:14]),
            selection_pairs=as_dataset(pairs[14:17]),
            w=0.3,
            beta=0.1,
            settings=Training(**HOW | how),
            batch_tokens=60,
            seed=0,
            what="w=0.3",
            checkpoints=folder / "checkpoints",
        ),
        adapter=folder / "0",
    )


def dies_once(model: Any, *, world: World, progress: Any, checkpoints: Path, **rest: Any) -> TrainingResult:
    """A training whose second process is killed at step 5 of the first attempt."""
    again = checkpoints.with_name("died")

    def dying(done: int, total: int, **numbers: float) -> None:
        progress(done, total, **numbers)
        if done == 5 and world.rank == 1 and not again.exists():
            again.touch()
            die()

    return train_preference(model, world=world, progress=dying, checkpoints=checkpoints, **rest)


def goes_on_for_ever(model: Any, *, world: World, progress: Any, checkpoints: Path, **rest: Any) -> TrainingResult:
    """A training that stops at its first step, when its processes have left their ids."""

    def waiting(done: int, total: int, **numbers: float) -> None:
        partial = checkpoints.with_name(f"{world.rank}.partial")
        partial.write_text(f"{os.getpid()} {os.getppid()}")
        partial.rename(checkpoints.with_name(f"{world.rank}.pid"))
        world.wait()
        progress(done, total, **numbers)
        time.sleep(600)

    return train_preference(model, world=world, progress=waiting, checkpoints=checkpoints, **rest)


def living(folder: Path) -> list[int]:
    """Which of the agent and the two ranks, whose ids the ranks left, have not ended."""
    ids = {int(number) for file in folder.glob("?.pid") for number in file.read_text().split()}
    assert len(ids) == 3, ids
    return [number for number in ids if state_of(number) not in ("", "Z")]


def wait_for_the_end(folder: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while left := living(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def state_of(process: int) -> str:
    """A letter, Z for one that has ended and that nobody has asked about; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_it_is_the_training_of_one_process(tiny_model_path, pairs, tmp_path) -> None:
    steps, said = [], []
    result = train_together(
        job_of(tiny_model_path, tmp_path / "several", pairs, fsdp=True),
        tmp_path / "scratch",
        progress=lambda done, total, **numbers: steps.append((done, total, numbers)),
        log=said.append,
    )
    one = by_preference(tiny_model_path, tmp_path / "one", pairs[:17], LORA, **HOW)(World())
    assert_same_training(one, result)
    for name, weight in adapter(tmp_path / "one", 0).items():
        assert (adapter(tmp_path / "several", 0)[name] - weight).abs().max() < 1e-4
    assert said == ["2 processes train together, each on cpu"]
    assert [(done, total) for done, total, _ in steps] == [(row["step"], 10) for row in one.history]
    assert all(numbers["tokens_per_second"] > 0 for _, _, numbers in steps)
    assert steps[-1][2]["loss"] == result.history[-1]["loss"]


def test_a_rank_that_is_killed_is_named_and_the_next_attempt_ends_as_if_nothing_had_been(
    tiny_model_path, pairs, tmp_path
) -> None:
    job = job_of(tiny_model_path, tmp_path / "killed", pairs, train=dies_once, lora=DROPOUT)
    with pytest.raises(ProcessDiedError) as died:
        train_together(job, tmp_path / "scratch")
    assert "rank 1 (process" in str(died.value) and "was killed by SIGKILL" in str(died.value), died.value
    assert "rank 0" not in str(died.value).partition("\n")[0]
    assert checkpoint_progress(tmp_path / "killed" / "checkpoints") == (3, 10)
    resumed = train_together(job, tmp_path / "scratch")
    whole, _ = in_processes(
        2, tmp_path / "whole", by_preference(tiny_model_path, tmp_path / "whole", pairs[:17], DROPOUT, **HOW)
    )
    assert resumed.resumed_from == 3 and whole.resumed_from is None
    assert resumed.history == whole.history
    weights = "adapter_model.safetensors"
    assert (tmp_path / "killed/0" / weights).read_bytes() == (tmp_path / "whole/0" / weights).read_bytes()


def test_what_a_rank_refuses_is_refused_in_its_words(tiny_model_path, pairs, tmp_path) -> None:
    job = job_of(tiny_model_path, tmp_path, pairs, learning_rate=1e30)
    with pytest.raises(HelpsteerError, match=r"^training w=0\.3: .* Likely causes: a learning rate too high"):
        train_together(job, tmp_path / "scratch")


def test_all_of_them_end_when_the_step_is_killed(tiny_model_path, pairs, tmp_path) -> None:
    job = job_of(tiny_model_path, tmp_path, pairs, train=goes_on_for_ever)
    step = multiprocessing.get_context("fork").Process(target=train_together, args=(job, tmp_path / "scratch"))
    step.start()
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("?.pid"))) < 2:
        assert step.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    assert len(living(tmp_path)) == 3
    step.kill()
    step.join()
    wait_for_the_end(tmp_path)


def test_all_of_them_have_ended_when_the_step_is_interrupted(tiny_model_path, pairs, tmp_path) -> None:
    def interrupt(done: int, total: int, **numbers: float) -> None:
        raise KeyboardInterrupt

    job = job_of(tiny_model_path, tmp_path, pairs, train=goes_on_for_ever)
    with pytest.raises(KeyboardInterrupt):
        train_together(job, tmp_path / "scratch", progress=interrupt)
    # A process that is ending has let go of memory and files, whose end the step saw, before it is said to have ended.
    wait_for_the_end(tmp_path, seconds=10)

"""The part that all trainings share: arguments, resuming, progress, and guards against NaN and an exploding loss.

A checkpoint is written at each evaluation. Resuming restores weights, optimizer, schedule, random state and data order.
A resumed training ends in the same bytes (fp32, CPU, one thread) as an undisturbed one.
"""

import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import non_finite
from helpsteer_assets.modpo.progress import Progress
from helpsteer_assets.modpo.settings import Training
from helpsteer_assets.modpo.training.checkpoints import (
    checkpoint_folder,
    damage,
    is_finished,
    mark_complete,
    newest_checkpoint,
    prune,
    step_of,
)
from helpsteer_assets.modpo.training.processes import ALONE, World
from helpsteer_assets.modpo.training.schedule import count_steps, evaluation_interval

LOGS_PER_EVALUATION = 5


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training, besides the weights; it goes into the artifact's manifest."""

    steps: int
    """Optimizer steps done."""
    best_step: int
    """Step of the checkpoint that was kept: the one with the lowest loss on held-out train prompts, else the last."""
    best_loss: float | None
    """Loss of the kept checkpoint on the held-out train prompts; None where there are none."""
    resumed_from: int | None
    """Step of the checkpoint that this attempt resumed from; None where it began anew."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per logged step: step, loss, grad_norm, ..., and eval_loss after an evaluation."""


class WorldTrainer(Trainer):
    """A Trainer that makes the same steps in several processes; the first process writes the checkpoints."""

    world: World = ALONE
    tokens_seen: torch.Tensor | int = 0
    """Tokens that this process has trained on."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.world.is_first:
            super()._save_checkpoint(model, trial)


def training_arguments(
    settings: Training,
    *,
    items: int,
    has_selection: bool,
    output_dir: Path,
    seed: int,
    device: torch.device,
    report_to: list[str],
    eval_batch_size: int | None = None,
    world: World = ALONE,
    arguments: type[TrainingArguments] = TrainingArguments,
    **extra: Any,
) -> TrainingArguments:
    """transformers' arguments for one stage.

    Args:
        settings: the stage's settings.
        items: train sequences or pairs.
        has_selection: whether there are held-out train prompts, to choose a checkpoint by.
        output_dir: folder of the checkpoints.
        seed: seed of data order and dropout.
        device: where to train.
        report_to: experiment trackers.
        eval_batch_size: sequences or pairs in a batch of an evaluation; None: as in training.
        world: the processes that train. Several processes get the pairs or sequences of a whole optimizer step as one
            batch, from which each takes its share.
        arguments: the class to make (TRL has its own).
        extra: further arguments of that class.
    """
    steps = count_steps(settings, items)
    evaluate_every = evaluation_interval(settings, steps)
    # Evaluations fall on logged steps, so that a loss that is not finite is noticed before a checkpoint is written.
    log_every = next(n for n in range(math.ceil(evaluate_every / LOGS_PER_EVALUATION), 0, -1) if not evaluate_every % n)
    batch_size, accumulation = settings.batch_size, settings.accumulation
    if not world.alone:
        batch_size, accumulation = batch_size * accumulation, 1
    made = arguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup_share * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        **{_checkpointing_argument(arguments): settings.gradient_checkpointing},
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_selection else "no",
        eval_steps=evaluate_every,
        save_strategy="steps",
        save_steps=evaluate_every,
        metric_for_best_model="eval_loss" if has_selection else None,
        greater_is_better=False if has_selection else None,
        seed=seed,
        use_cpu=device.type == "cpu",
        bf16=False,  # the weights already are what model.precision says; no autocast on top
        report_to=report_to or "none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        # On a GPU, batches are copied from page-locked memory while the previous step still computes.
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        remove_unused_columns=False,
        **extra,
    )
    # One process trains on one device: several visible GPUs would make transformers wrap the model in DataParallel.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _checkpointing_argument(arguments: type[TrainingArguments]) -> str:
    """Name of the argument for activation checkpointing: transformers 5 renamed it, and warns about the old name."""
    new = "activation_checkpointing"
    return new if new in {argument.name for argument in fields(arguments)} else "gradient_checkpointing"


def train(
    trainer: WorldTrainer,
    settings: Training,
    *,
    what: str,
    loss_limit: float,
    likely_causes: str,
    progress: Progress,
) -> TrainingResult:
    """Train, from the newest complete checkpoint on if there is one, and leave the best weights in the model.

    Args:
        trainer: of a PeftModel, made with `training_arguments`.
        settings: the stage's settings.
        what: what is trained, for messages ("w=0.1").
        loss_limit: a training does not recover from a loss above it.
        likely_causes: likely causes of a loss that is not finite or above the limit, for the message.
        progress: called at each logged step.

    Raises:
        HelpsteerError: the loss, its gradient or the weights are no longer finite, or the loss exceeds the limit.
    """
    folder, world = Path(trainer.args.output_dir), trainer.world
    trainer.remove_callback(PrinterCallback)
    if settings.early_stopping is not None:
        trainer.add_callback(_EarlyStopping(settings.early_stopping))
    trainer.add_callback(_Watch(trainer, what, loss_limit, likely_causes, progress))
    newest = world.joined(newest_checkpoint(folder) if world.is_first else None)[0]
    if newest is not None and is_finished(newest):
        # transformers would do one step more.
        state = TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        state = trainer.state
    kept = state.best_global_step or state.global_step
    best = checkpoint_folder(folder, kept)
    if (problem := damage(best)) is not None:
        raise HelpsteerError(
            f"{best} was damaged after it was written: {problem}; run again: the training goes on from one before it"
        )
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(best), device="cpu"))
    return TrainingResult(
        steps=state.global_step,
        best_step=kept,
        best_loss=state.best_metric,
        resumed_from=None if newest is None else step_of(newest),
        history=_history(state),
    )


def _history(state: TrainerState) -> list[dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    for entry in state.log_history:
        measured = {key: value for key, value in entry.items() if isinstance(value, int | float)}
        by_step.setdefault(int(entry["step"]), {}).update(measured)
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "accuracy", "eval_accuracy")
    return [
        {key: row[key] for key in kept if key in row}
        for _, row in sorted(by_step.items())
        if "loss" in row or "eval_loss" in row
    ]


class _EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations in a row without a better loss.

    They are counted in the state's history, which is part of a checkpoint, so that a resumed training goes on counting.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if len(losses) - 1 - losses.index(min(losses)) >= self._patience:
            control.should_training_stop = True


class _Watch(TrainerCallback):
    """Reports progress, stops a training that is broken, and marks each whole checkpoint as complete."""

    def __init__(
        self, trainer: WorldTrainer, what: str, loss_limit: float, likely_causes: str, progress: Progress
    ) -> None:
        self._trainer = trainer
        self._what = what
        self._loss_limit = loss_limit
        self._likely_causes = likely_causes
        self._progress = progress
        self._last = (time.monotonic(), 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = (time.monotonic(), self._tokens())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The last step may fall between two logs; its loss has to be checked and shown, too.
        control.should_log |= state.global_step >= state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        world, step = self._trainer.world, state.global_step
        trained = [(name, weight) for name, weight in self._trainer.model.named_parameters() if weight.requires_grad]
        # A step computes its loss before it changes the weights, so a finite loss does not show that they are sound.
        if broken := non_finite(trained):
            self._stop(f"{len(broken)} weight(s) are not finite after step {step}", state)
        world.check_equal(weight for _, weight in trained)
        if world.is_first:
            folder = Path(args.output_dir)
            mark_complete(
                checkpoint_folder(folder, step),
                step,
                state.max_steps,
                best=state.best_global_step,
                finished=control.should_training_stop,
            )
            # transformers would delete before it writes: if the process died then, the best one could be lost.
            prune(folder)
        world.wait()
        # Evaluating and saving come after a log and do not count as training time.
        self._last = (time.monotonic(), self._tokens())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        for name, limit in (("loss", self._loss_limit), ("grad_norm", math.inf), ("eval_loss", self._loss_limit)):
            value = logs.get(name, 0.0)
            if not math.isfinite(value) or value > limit:
                beyond = f", beyond {limit:.4g}, from which no training comes back," if math.isfinite(value) else ""
                self._stop(f"{name} is {value:.4g}{beyond} by step {state.global_step}", state)
        if "loss" not in logs:
            return
        then, tokens = self._last
        self._last = now, tokens_now = time.monotonic(), self._tokens()
        numbers: dict[str, float] = {key: logs[key] for key in ("loss", "accuracy", "grad_norm") if key in logs}
        if tokens_now > tokens:
            numbers["tokens_per_second"] = (tokens_now - tokens) / max(now - then, 1e-9)
        self._progress(state.global_step, state.max_steps, **numbers)

    def _stop(self, problem: str, state: TrainerState) -> NoReturn:
        raise HelpsteerError(
            f"training {self._what}: {problem} of {state.max_steps}. Likely causes: {self._likely_causes}. Finished "
            "checkpoints are kept; a changed setting starts anew"
        )

    def _tokens(self) -> int:
        return sum(self._trainer.world.joined(int(self._trainer.tokens_seen)))

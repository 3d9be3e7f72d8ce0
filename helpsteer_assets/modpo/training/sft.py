"""Supervised fine-tuning of the reference policy: LoRA by TRL's SFTTrainer, loss on the response only."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import check_vocabulary
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import Training
from helpsteer_assets.modpo.training.loop import TrainingResult, WorldTrainer, train, training_arguments
from helpsteer_assets.modpo.training.processes import ALONE, World

IGNORED = -100
"""Label of a token that does not count in the loss."""
LOSS_LIMIT = 100.0
"""Nats per token. All tokens equally likely would be the logarithm of the vocabulary's size, about 12."""


def train_sft(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_sequences: Items[Sequence],
    selection_sequences: Items[Sequence],
    settings: Training,
    seed: int,
    report_to: list[str],
    checkpoints: Path,
    progress: Progress = silent,
    world: World = ALONE,
) -> TrainingResult:
    """Train the LoRA of `model` on responses and leave its best weights in it.

    Args:
        model: the base model with a fresh LoRA.
        tokenizer: its tokenizer, used for padding only: the sequences are tokenized already.
        train_sequences: prompts with the responses to learn.
        selection_sequences: the same of held-out train prompts, to choose a checkpoint by.
        settings: how the stage trains.
        seed: seed of data order and dropout.
        report_to: experiment trackers.
        checkpoints: folder of the checkpoints; the training resumes from those of an earlier attempt.
        progress: called at each logged step.
        world: the processes that train together; all of them call this.

    Raises HelpsteerError where there is nothing to train on, the tokenizer is not the model's, or the training breaks.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if not train_sequences:
        raise HelpsteerError(
            "training sft_model: there is no chosen response; look at the pair counts of `helpsteer check`"
        )

    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)

    def tokenized(sequences: Items[Sequence]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "input_ids": [*s.prompt_ids.tolist(), *s.response_ids.tolist()],
                    "labels": [IGNORED] * len(s.prompt_ids) + s.response_ids.tolist(),
                }
                for s in sequences
            ]
        )

    class SharingSFTTrainer(WorldTrainer, SFTTrainer):
        """Computes this process's share of each batch, and counts tokens for the progress report."""

        def training_step(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor],
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> torch.Tensor:
            self.world.seed_step(self.args.seed, self.state.global_step)
            total = torch.zeros((), device=self.args.device)
            for part, counts in _share(self.world, inputs, settings.batch_size):
                total += super().training_step(model, part, num_items_in_batch if counts else math.inf)
            return self.world.sum_step(model, total)

        def prediction_step(
            self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None, None]:
            if self.world.alone:
                return super().prediction_step(model, inputs, *args, **kwargs)
            inputs = self._prepare_inputs(inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            total = torch.zeros((), device=self.args.device)
            with torch.no_grad():
                for part, counts in _share(self.world, inputs, settings.batch_size):
                    total += self.compute_loss(model, part, num_items_in_batch=tokens if counts else math.inf)
            return self.world.sum(total), None, None

        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = SharingSFTTrainer(
        model,
        args=training_arguments(
            settings,
            items=len(train_sequences),
            has_selection=bool(selection_sequences),
            output_dir=checkpoints,
            seed=seed,
            device=model.device,
            report_to=report_to,
            world=world,
            arguments=SFTConfig,
            max_length=None,  # the sequences are cut already
            # Scoring and generation read the same tokens, so TRL must not change them.
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=tokenized(train_sequences),
        eval_dataset=tokenized(selection_sequences) if selection_sequences else None,
        processing_class=tokenizer,
    )
    trainer.world = world
    return train(
        trainer,
        settings,
        what="sft_model",
        loss_limit=LOSS_LIMIT,
        likely_causes=(
            f"a learning rate too high (lower sft.learning_rate, {settings.learning_rate:g}); weights that overflow in "
            "model.precision: bf16"
        ),
        progress=progress,
    )


def _share(
    world: World, inputs: dict[str, torch.Tensor], batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """The rows of a padded batch that this process computes, `batch_size` at a time, cut to the longest of them.

    Args:
        world: the processes that share the batch; a single process gets the batch unchanged.
        inputs: `input_ids`, `attention_mask` and `labels`, each [batch, length], padded on the right.
        batch_size: most rows of a forward pass.

    Yields:
        rows, and whether they count. An idle pass computes the shortest row, and its loss must not count.
    """
    if world.alone:
        yield inputs, True
        return
    lengths = inputs["attention_mask"].sum(dim=1)
    hands = world.deal(lengths.tolist())
    passes = [[(hand[i : i + batch_size], True) for i in range(0, len(hand), batch_size)] for hand in hands]
    for rows, counts in world.own(passes, lambda: ([int(lengths.argmin())], False)):
        yield {name: tensor[rows, : lengths[rows].max()] for name, tensor in inputs.items()}, counts

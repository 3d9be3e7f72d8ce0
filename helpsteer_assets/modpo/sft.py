"""Supervised fine-tuning of the reference policy: LoRA by TRL's SFTTrainer, loss on the response only."""

from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models import check_vocabulary
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.tokenization import Sequence
from helpsteer_assets.modpo.training import TrainingResult, train, training_arguments

if TYPE_CHECKING:
    from helpsteer_assets.experiment import SftSettings

IGNORED = -100
"""Label of a token that has no part in the loss."""
LOSS_LIMIT = 100.0
"""Nats per token; guessing blindly costs the logarithm of the vocabulary, 12 or so."""


def train_sft(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_sequences: Items[Sequence],
    selection_sequences: Items[Sequence],
    settings: "SftSettings",
    seed: int,
    report_to: list[str],
    checkpoints: Path,
    progress: Progress = silent,
) -> TrainingResult:
    """Train the LoRA of `model` on responses and leave its best weights in it.

    Args:
        model: the base model with a fresh LoRA.
        tokenizer: its tokenizer; the sequences are tokenized already, it only pads.
        train_sequences, selection_sequences: prompts with the responses to learn; the latter choose the checkpoint.
        settings: how the stage trains.
        seed: seed of data order and dropout.
        report_to: experiment trackers.
        checkpoints: folder of the checkpoints; an earlier attempt's are gone on from.
        progress: called at each logged step.

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

    class CountingSFTTrainer(SFTTrainer):
        """Counts tokens for the progress report."""

        tokens_seen: torch.Tensor | int = 0

        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = CountingSFTTrainer(
        model,
        args=training_arguments(
            settings,
            items=len(train_sequences),
            has_selection=bool(selection_sequences),
            output_dir=checkpoints,
            seed=seed,
            device=model.device,
            report_to=report_to,
            arguments=SFTConfig,
            max_length=None,  # they are cut already
            # The sequences train as they are: what scoring and generation read, too.
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=tokenized(train_sequences),
        eval_dataset=tokenized(selection_sequences) if selection_sequences else None,
        processing_class=tokenizer,
    )
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

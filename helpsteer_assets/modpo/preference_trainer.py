"""The preference trainer: MODPO with precomputed reference log-probabilities and margins; at w = 1 it is DPO."""

import math
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.batching import Batch, collate
from helpsteer_assets.modpo.log_probs import response_log_probs
from helpsteer_assets.modpo.losses import log_ratios, modpo_loss
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.tokenization import Sequence
from helpsteer_assets.modpo.training import TrainingResult, train, training_arguments

if TYPE_CHECKING:
    from helpsteer_assets.experiment import TrainingSettings


@dataclass(frozen=True)
class PreferencePair:
    """One training pair: tokens of both responses, and what was computed once for all weights."""

    chosen: Sequence
    rejected: Sequence
    reference_chosen: float
    """log p_sft of the chosen response, nats."""
    reference_rejected: float
    margin_chosen: float = 0.0
    """m of the chosen response, in reward units; 0 for DPO."""
    margin_rejected: float = 0.0


class PairDataset(Dataset):
    """Preference pairs as transformers' Trainer wants them."""

    def __init__(self, pairs: Items[PreferencePair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> PreferencePair:
        return self._pairs[index]


def make_pairs(
    rows: Items[Mapping[str, Any]],
    sequences: Mapping[str, Sequence],
    reference: Mapping[str, float],
    margins: Mapping[str, float] | None = None,
) -> list[PreferencePair]:
    """Join pairs with tokens, reference log-probabilities and margins.

    Args:
        rows: with `chosen_id` and `rejected_id`.
        sequences: tokens by response_id.
        reference: log p_sft by response_id, nats.
        margins: m by response_id, in reward units; None for DPO.
    """
    margins = defaultdict(float) if margins is None else margins
    return [
        PreferencePair(
            chosen=sequences[row["chosen_id"]],
            rejected=sequences[row["rejected_id"]],
            reference_chosen=reference[row["chosen_id"]],
            reference_rejected=reference[row["rejected_id"]],
            margin_chosen=margins[row["chosen_id"]],
            margin_rejected=margins[row["rejected_id"]],
        )
        for row in rows
    ]


class PairCollator:
    """Pads the chosen responses, then the rejected ones, into one batch [2 * pairs, length]."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, pairs: list[PreferencePair]) -> dict[str, torch.Tensor]:
        """`Batch`'s tensors, and `reference` and `margin`, [2 * pairs] float64 (nats and reward units)."""
        batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], self._pad_id)
        doubles = {
            "reference": [p.reference_chosen for p in pairs] + [p.reference_rejected for p in pairs],
            "margin": [p.margin_chosen for p in pairs] + [p.margin_rejected for p in pairs],
        }
        return vars(batch) | {key: torch.tensor(values, dtype=torch.float64) for key, values in doubles.items()}


class PreferenceTrainer(Trainer):
    """Minimises the MODPO loss of one policy; holds one model and does one forward and one backward a step.

    Args:
        model: the SFT model with the LoRA to train.
        w: weight of the preference in (0, 1]; 1 is DPO.
        beta: MODPO's (or DPO's) beta.
        kwargs: transformers.Trainer's.
    """

    # compute_loss returns a mean over the micro-batch: Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, model: PeftModel, *, w: float, beta: float, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.w = w
        self.beta = beta
        self.tokens_seen: torch.Tensor | int = 0
        # No `labels` in the inputs: tell Trainer's evaluation that there is a loss all the same.
        self.can_return_loss = True
        self._correct: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean MODPO loss of a batch of pairs."""
        batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"])
        chosen, rejected = log_ratios(response_log_probs(model, batch), inputs["reference"]).chunk(2)
        losses = modpo_loss(chosen, rejected, *inputs["margin"].chunk(2), w=self.w, beta=self.beta)
        if model.training:
            self.tokens_seen = self.tokens_seen + batch.attention_mask.sum()
        # A loss below log 2 is a positive logit: chosen is ranked first. Kept on the device until a log is due, so that
        # a step needs no synchronisation.
        self._correct["" if model.training else "eval_"].append(losses.detach() < math.log(2))
        return (losses.mean(), {"losses": losses.detach()}) if return_outputs else losses.mean()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a held-out batch."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the share of pairs whose logit is positive since the last log."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if correct := self._correct.pop(prefix, []):
            logs[f"{prefix}accuracy"] = torch.cat(correct).double().mean().item()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate needs `input_ids` to be one sequence per item."""
        return 0


def train_preference(
    model: PeftModel,
    *,
    train_pairs: list[PreferencePair],
    selection_pairs: list[PreferencePair],
    w: float,
    beta: float,
    settings: "TrainingSettings",
    pad_id: int,
    seed: int,
    report_to: list[str],
    what: str,
    checkpoints: Path,
    progress: Progress = silent,
) -> TrainingResult:
    """Train the LoRA of `model` by MODPO (at w = 1: DPO) and leave its best weights in it.

    Args:
        model: the SFT model with a fresh LoRA.
        train_pairs, selection_pairs: what to train on, and the pairs of held-out train prompts to choose a checkpoint.
        w: weight of the preference, in (0, 1].
        beta: strength of the pull to the SFT model.
        settings: how the stage trains.
        pad_id: padding token id.
        seed: seed of data order and dropout.
        report_to: experiment trackers.
        what: what is trained, for messages.
        checkpoints: folder of the checkpoints; an earlier attempt's are gone on from.
        progress: called at each logged step.
    """
    if not train_pairs:
        raise HelpsteerError(f"training {what}: there is no train pair; look at the pair counts of `helpsteer check`")
    trainer = PreferenceTrainer(
        model,
        w=w,
        beta=beta,
        args=training_arguments(
            settings,
            items=len(train_pairs),
            has_selection=bool(selection_pairs),
            output_dir=checkpoints,
            seed=seed,
            device=model.device,
            report_to=report_to,
        ),
        train_dataset=PairDataset(train_pairs),
        eval_dataset=PairDataset(selection_pairs) if selection_pairs else None,
        data_collator=PairCollator(pad_id),
    )
    return train(
        trainer,
        settings,
        what=what,
        likely_causes=(
            f"a learning rate ({settings.learning_rate:g}) too high, above all at small w, where 1/w = {1 / w:g} "
            "multiplies the gradients before they are clipped; a margin_beta that makes margins of hundreds; "
            "model.precision: bf16 with weights that overflow"
        ),
        progress=progress,
    )

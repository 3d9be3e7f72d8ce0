"""The preference trainer: MODPO with precomputed reference log-probabilities and margins; at w = 1 it is DPO."""

import math
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.scoring.log_probs import attention_for, response_log_probs
from helpsteer_assets.modpo.scoring.trees import Forest
from helpsteer_assets.modpo.settings import Training
from helpsteer_assets.modpo.training.loop import TrainingResult, WorldTrainer, train, training_arguments
from helpsteer_assets.modpo.training.losses import modpo_loss
from helpsteer_assets.modpo.training.processes import ALONE, World

EVALUATION_PAIRS = 64
"""Pairs in a batch of an evaluation."""
HOPELESS_ADVANTAGE = 100.0
"""Reward units by which a policy may prefer rejected to chosen, averaged over a batch: odds of e^100."""
HOPELESS_FACTOR = 10.0
"""A loss may be this many times the SFT model's."""


@dataclass(frozen=True)
class PreferencePair:
    """One training pair: the tokens of both responses, and the numbers that are the same for all weights w."""

    chosen: Sequence
    rejected: Sequence
    reference_chosen: float
    """log p_sft of the chosen response, nats."""
    reference_rejected: float
    margin_chosen: float = 0.0
    """m of the chosen response, in reward units; 0 for DPO."""
    margin_rejected: float = 0.0


class PairDataset(Dataset):
    """Preference pairs for transformers' Trainer; a pair gets its tokens, reference and margins when it is read.

    Args:
        pairs: (chosen response_id, rejected response_id) of each pair.
        sequences: tokens by response_id.
        reference: log p_sft by response_id, nats.
        margins: m by response_id, in reward units; None for DPO.
    """

    def __init__(
        self,
        pairs: Items[tuple[str, str]],
        sequences: Mapping[str, Sequence],
        reference: Mapping[str, float],
        margins: Mapping[str, float] | None = None,
    ) -> None:
        self._pairs = pairs
        self._sequences = sequences
        self._reference = reference
        self._margins = defaultdict(float) if margins is None else margins

    def __len__(self) -> int:
        return len(self._pairs)

    def loss_of_reference(self, *, w: float) -> float:
        """The mean MODPO loss of the SFT model itself, with log-ratios of 0: the loss that a training starts from."""
        margins = [(self._margins[chosen], self._margins[rejected]) for chosen, rejected in self._pairs]
        chosen, rejected = torch.tensor(margins, dtype=torch.float64).t()
        zeros = torch.zeros_like(chosen)
        return modpo_loss(zeros, zeros, chosen, rejected, w=w, beta=1.0).mean().item()

    def __getitem__(self, index: int) -> PreferencePair:
        chosen, rejected = self._pairs[index]
        return PreferencePair(
            self._sequences[chosen],
            self._sequences[rejected],
            self._reference[chosen],
            self._reference[rejected],
            self._margins[chosen],
            self._margins[rejected],
        )


_Group = tuple[float, Forest, list[PreferencePair], list[tuple[int, int]]]
"""A micro-batch: the divisor of its losses, its trees, its pairs, and the tree rows of their responses."""


class PairCollator:
    """Packs pairs into micro-batches of prompt trees. A prompt or response of several pairs is packed once.

    Args:
        max_tokens: most tokens of a micro-batch; a pair with more makes one of its own.
        world: the processes that share the pairs; only the pairs of this process are packed.
        batch_size: pairs in each of the batches that one optimizer step accumulates. Each batch, also a short last one,
            has the same share in the loss. None: the pairs are one batch.
    """

    def __init__(self, max_tokens: int, world: World = ALONE, batch_size: int | None = None) -> None:
        self._max_tokens = max_tokens
        self._world = world
        self._batch_size = batch_size

    def __call__(self, pairs: list[PreferencePair]) -> dict[str, Any]:
        """`micro_batches`: inputs for `pair_losses`, each with the `share` of its mean in the batch's loss."""
        size = self._batch_size or len(pairs)
        batches = math.ceil(len(pairs) / size)
        # The loss of a pair is divided by the number of batches times the number of pairs in its batch.
        divisors = [batches * min(size, len(pairs) - start) for start in range(0, len(pairs), size)]
        lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
        hands = self._world.deal(lengths)
        if not self._world.sharded:  # then no process needs to know about the passes of the others
            hands = [hand if rank == self._world.rank else [] for rank, hand in enumerate(hands)]
        groups = [self._group([(pairs[i], divisors[i // size]) for i in hand]) for hand in hands]
        mine = self._world.own(groups, lambda: self._group([(pairs[lengths.index(min(lengths))], math.inf)])[0])
        return {"micro_batches": [self._pack(*group) for group in mine]}

    def _group(self, pairs: list[tuple[PreferencePair, float]]) -> list[_Group]:
        groups: list[_Group] = []
        for pair, divisor in pairs:
            if not groups or divisor != groups[-1][0] or self._is_full(groups[-1][1], pair):
                groups.append((divisor, Forest(), [], []))
            _, forest, members, rows = groups[-1]
            members.append(pair)
            rows.append((forest.add(pair.chosen), forest.add(pair.rejected)))
        return groups

    def _is_full(self, forest: Forest, pair: PreferencePair) -> bool:
        return forest.tokens + forest.growth((pair.chosen, pair.rejected)) > self._max_tokens

    @staticmethod
    def _pack(
        divisor: float, forest: Forest, pairs: list[PreferencePair], rows: list[tuple[int, int]]
    ) -> dict[str, Any]:
        reference = [(pair.reference_chosen, pair.reference_rejected) for pair in pairs]
        margins = [(pair.margin_chosen, pair.margin_rejected) for pair in pairs]
        return {
            "share": len(pairs) / divisor,
            "trees": forest.pack(),
            "rows": torch.tensor(rows).t().contiguous(),
            "reference": torch.tensor(reference, dtype=torch.float64).t().contiguous(),
            "margin": torch.tensor(margins, dtype=torch.float64).t().contiguous(),
        }


def pair_losses(model: torch.nn.Module, inputs: Mapping[str, Any], *, w: float, beta: float) -> torch.Tensor:
    """MODPO loss of each pair of a micro-batch.

    Args:
        model: the policy.
        inputs: of B pairs: `trees`, a TreeBatch; `rows`, [2, B] the tree rows of the chosen and rejected responses;
            `reference`, [2, B] their log p_sft (nats), and `margin`, [2, B] their m (reward units), both float64.
        w: weight of the preference in (0, 1].
        beta: MODPO's beta.

    Returns:
        [B] float64.
    """
    chosen, rejected = response_log_probs(model, inputs["trees"])[inputs["rows"]] - inputs["reference"]
    return modpo_loss(chosen, rejected, *inputs["margin"], w=w, beta=beta)


class PreferenceTrainer(WorldTrainer):
    """Minimises the MODPO loss of one policy, with one model in memory and one forward and backward pass a step.

    `evaluation_collator` packs the batches of an evaluation, in which every pair has the same weight.
    """

    # compute_loss returns a mean over the batch: Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PeftModel,
        *,
        w: float,
        beta: float,
        evaluation_collator: PairCollator,
        world: World = ALONE,
        **kwargs: Any,
    ) -> None:
        self.data_collator: Any
        super().__init__(model, **kwargs)
        self._evaluation_collator = evaluation_collator
        self.world = world
        self.w = w
        self.beta = beta
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Held-out batches."""
        for_training, self.data_collator = self.data_collator, self._evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = for_training

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of a batch's mean loss, one micro-batch after the other; returns that loss.

        Several processes compute a share each; in the end all of them hold the sum of the gradients.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self.world.seed_step(self.args.seed, self.state.global_step)
        # The backward pass may recompute activations, and needs the same attention for that.
        with attention_for(model):
            for micro_batch in inputs["micro_batches"]:
                total += super().training_step(model, micro_batch, num_items_in_batch)
        return self.world.sum_step(model, total)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **_: Any) -> torch.Tensor:
        """The part that a micro-batch has in its batch's mean MODPO loss."""
        losses = pair_losses(model, inputs, w=self.w, beta=self.beta)
        if inputs["share"]:  # else an idle pass, while other processes still work
            if model.training:
                self.tokens_seen += inputs["trees"].tokens
            # They stay on the device until a log is due, so that a step needs no synchronisation.
            self._losses["" if model.training else "eval_"].append(losses.detach())
        return inputs["share"] * losses.mean()

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of a held-out batch."""
        loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for micro_batch in self._prepare_inputs(inputs)["micro_batches"]:
                loss += self.compute_loss(model, micro_batch)
        return self.world.sum(loss), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the accuracy: the share of the pairs since the last log that have a positive logit."""
        prefix = "eval_" if "eval_loss" in logs else ""
        losses = torch.cat([torch.zeros(0, device=self.args.device), *self._losses.pop(prefix, [])])
        # A loss below log 2 means a positive logit: chosen is ranked above rejected.
        ranked = torch.stack([losses < math.log(2), torch.ones_like(losses, dtype=torch.bool)]).sum(1)
        correct, pairs = self.world.sum(ranked).tolist()
        if pairs:
            logs[f"{prefix}accuracy"] = correct / pairs
        super().log(logs, start_time)


def train_preference(
    model: PeftModel,
    *,
    train_pairs: PairDataset,
    selection_pairs: PairDataset,
    w: float,
    beta: float,
    settings: Training,
    batch_tokens: int,
    seed: int,
    report_to: list[str],
    what: str,
    checkpoints: Path,
    progress: Progress = silent,
    world: World = ALONE,
) -> TrainingResult:
    """Train the LoRA of `model` by MODPO (at w = 1: DPO) and leave its best weights in it.

    Args:
        model: the SFT model with a fresh LoRA.
        train_pairs: the pairs to train on.
        selection_pairs: the pairs of held-out train prompts, to choose a checkpoint by.
        w: weight of the preference, in (0, 1].
        beta: strength of the pull to the SFT model.
        settings: how the stage trains.
        batch_tokens: tokens in one forward and backward pass.
        seed: seed of data order and dropout.
        report_to: experiment trackers.
        what: what is trained, for messages.
        checkpoints: folder of the checkpoints; the training resumes from those of an earlier attempt.
        progress: called at each logged step.
        world: the processes that train together; all of them call this. The result is the same in all of them and,
            but for rounding and the random numbers of dropout, the same as that of a single process.

    Raises HelpsteerError where there is nothing to train on, or the training breaks: a loss that is not finite, or is
    above both `HOPELESS_ADVANTAGE` / w and `HOPELESS_FACTOR` times the SFT model's. The second bound is for small
    weights and large margins, with which the loss is high from the start.
    """
    if not len(train_pairs):
        raise HelpsteerError(f"training {what}: there is no train pair; look at the pair counts of `helpsteer check`")
    trainer = PreferenceTrainer(
        model,
        w=w,
        beta=beta,
        args=training_arguments(
            settings,
            items=len(train_pairs),
            has_selection=len(selection_pairs) > 0,
            output_dir=checkpoints,
            seed=seed,
            device=model.device,
            report_to=report_to,
            # Pairs of one prompt are neighbours, and share its computation where they are in one batch.
            eval_batch_size=max(EVALUATION_PAIRS, settings.batch_size),
            world=world,
        ),
        train_dataset=train_pairs,
        eval_dataset=selection_pairs if len(selection_pairs) else None,
        data_collator=PairCollator(batch_tokens, world, settings.batch_size),
        evaluation_collator=PairCollator(batch_tokens, world),
        world=world,
    )
    return train(
        trainer,
        settings,
        what=what,
        loss_limit=max(HOPELESS_ADVANTAGE / w, HOPELESS_FACTOR * train_pairs.loss_of_reference(w=w)),
        likely_causes=(
            f"a learning rate too high (lower learning_rate, {settings.learning_rate:g}), above all at small w, "
            f"where 1/w = {1 / w:g} multiplies the gradients before they are clipped (raise the smallest weight); "
            "margins of hundreds (lower objective.margin_beta or objective.penalty); a large beta "
            f"({beta:g}), which multiplies every log-ratio; model.precision: bf16 with weights that overflow"
        ),
        progress=progress,
    )

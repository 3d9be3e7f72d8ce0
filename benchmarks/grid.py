"""The policies of a whole grid of weights, one after another, with all that must be computed for them."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from benchmarks import ours, reference_procedure
from benchmarks.models import SMOLLM2, Contenders, contenders
from benchmarks.optimizer import Optimizer, weights_put_back
from benchmarks.pairs import MIXES, Pair, RandomText
from benchmarks.setting import Setting
from benchmarks.timing import interleave

BETA = 0.1


def run(setting: Setting) -> dict[str, Any]:
    """W = 1, 3, 6 and 12 (the short form and SmolLM2: fewer), one step of HelpSteer-like pairs per policy."""
    rows = []
    for name in setting.models:
        grids = (1, 2) if not setting.long else (1, 3) if name == SMOLLM2 else (1, 3, 6, 12)
        with contenders(name, setting.device, setting.precision) as models:
            text = RandomText(models.vocabulary, MIXES["mid prompts"], setting.max_tokens)
            pairs = text.helpsteer_like(setting.pairs_per_step)[: setting.pairs_per_step]
            compared = compare(models, pairs, grids, setting.pairs_per_step, setting.device)
            rows += [{"model": name} | row for row in compared]
    return {"rows": rows}


def compare(
    models: Contenders, pairs: list[Pair], grids: tuple[int, ...], pairs_per_step: int, device: torch.device
) -> list[dict[str, Any]]:
    """Train the largest of the grids with both, weight by weight in turns; a smaller grid is its first weights.

    `pairs` are passed once per policy; `grids` are numbers of weights, ascending. Returns a row per grid.
    """
    weights = [(place + 1) / grids[-1] for place in range(grids[-1])]
    table: list[Any] = []
    losses: dict[str, list[torch.Tensor]] = {"reference": [], "ours": []}

    def precompute() -> None:
        table[:] = ours.make_table(models.scorer, pairs)

    def policies(name: str, model: PeftModel, training_step: Callable[..., torch.Tensor], data: list[Any]) -> Any:
        """A function that trains the policy of the next weight each time it is called."""
        of_next = itertools.cycle(weights)

        def train_policy() -> None:
            w = next(of_next)
            with weights_put_back(model):
                optimizer = Optimizer(model)
                for start in range(0, len(data), pairs_per_step):
                    losses[name].append(training_step(model, data[start : start + pairs_per_step], w=w, beta=BETA))
                    optimizer.step()

        return train_policy

    ours.make_table(models.scorer, pairs[:1])  # finds out what the model can do, once in a process
    of_table = interleave({"table": precompute}, 1, device)["table"][0]
    contestants = {
        "reference": policies("reference", models.reference, reference_procedure.training_step, pairs),
        "ours": policies("ours", models.policy, ours.training_step, table),
    }
    timed = interleave(contestants, len(weights), device)
    steps = len(losses["ours"]) // len(weights)
    rows = []
    for grid in grids:
        reference, own = sum(timed["reference"][:grid]), sum(timed["ours"][:grid])
        differences = [
            (a.double() - b.double()).abs().max().item()
            for a, b in zip(losses["reference"][: grid * steps], losses["ours"][: grid * steps], strict=True)
        ]
        rows.append(
            {
                "weights": grid,
                "smallest_w": weights[0],  # its loss magnifies differences of log-probabilities by beta / w
                "pairs_per_policy": len(pairs),
                "reference_seconds": reference,
                "our_seconds": of_table + own,
                "ratio": reference / (of_table + own),
                "share_of_log_prob_table": of_table / (of_table + own),
                "loss_difference": max(differences),
            }
        )
    return rows

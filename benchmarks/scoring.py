"""Log-probabilities without gradients: the table that training reads, and the scores of generated responses."""

import random
from typing import Any

import torch

from benchmarks import ours, reference_procedure
from benchmarks.models import Contenders, contenders
from benchmarks.pairs import MIXES, Pair, RandomText
from benchmarks.setting import Setting
from benchmarks.timing import compared, interleave, ratio

Record = tuple[list[int], list[int]]
"""Prompt and response."""


def run(setting: Setting) -> dict[str, Any]:
    """Both comparisons with every model."""
    (prompts, policies), rounds = (6, 7) if setting.long else (2, 3), 2
    tables, scores = [], []
    for name in setting.models:
        with contenders(name, setting.device, setting.precision) as models:
            text = RandomText(models.vocabulary, MIXES["mid prompts"], setting.max_tokens)
            pairs = text.helpsteer_like(prompts)
            random.Random(0).shuffle(pairs)
            ours.make_table(models.scorer, pairs[:1])  # finds out what the model can do, once in a process
            tables.append({"model": name} | compare_tables(models, pairs, rounds, setting.device))
            drawn = [text.prompt_and_responses(policies) for _ in range(prompts)]
            by_policy = [[(prompt, responses[policy]) for prompt, responses in drawn] for policy in range(policies)]
            scores.append({"model": name} | compare_scores(models, by_policy, rounds, setting.device))
    return {"log_prob_table": tables, "generations_of_all_policies": scores}


def compare_tables(models: Contenders, pairs: list[Pair], rounds: int, device: torch.device) -> dict[str, Any]:
    """log p_sft and log p_margin of every response: per pair with three forwards, against once per unique response."""
    results: dict[str, torch.Tensor] = {}

    def reference() -> None:
        results["reference"] = reference_procedure.reference_and_margin(models.reference, pairs)[0]

    def own() -> None:
        table = ours.make_table(models.scorer, pairs)
        log_probs = [[pair.reference_chosen, pair.reference_rejected] for pair in table]
        results["ours"] = torch.tensor(log_probs, dtype=torch.float64)

    timed = interleave({"reference": reference, "ours": own}, rounds, device)
    return {
        "pairs": len(pairs),
        "unique_responses": len({(*p.prompt_ids, *r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)}),
        **compared(timed),
        "log_prob_difference": _largest_difference(results),
    }


def compare_scores(
    models: Contenders, by_policy: list[list[Record]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """log p_margin - log p_sft of every policy's responses to the same prompts."""
    results: dict[str, torch.Tensor] = {}
    together = [record for records in by_policy for record in records]

    def reference() -> None:
        results["reference"] = reference_procedure.margin_log_ratios(models.reference, together)

    def own() -> None:
        results["ours"] = ours.margin_log_ratios(models.scorer, together)

    def policy_by_policy() -> None:
        for records in by_policy:
            ours.margin_log_ratios(models.scorer, records)

    timed = interleave({"reference": reference, "ours": own, "policy by policy": policy_by_policy}, rounds, device)
    return {
        "policies": len(by_policy),
        "prompts": len(by_policy[0]),
        **compared(timed),
        "ratio_policy_by_policy": ratio(timed["reference"], timed["policy by policy"]),
        "log_ratio_difference": _largest_difference(results),
    }


def _largest_difference(results: dict[str, torch.Tensor]) -> float:
    return (results["reference"].double().cpu() - results["ours"].cpu()).abs().max().item()

"""The MODPO optimizer step: eight pairs, clipping and AdamW, from the same weights on."""

import statistics
import sys
from typing import Any

import torch
from peft import PeftModel

from benchmarks import ours, reference_procedure
from benchmarks.gemm_floor import GemmFloor, count_tokens
from benchmarks.models import ALL_LINEAR, ATTENTION, SMOLLM2, Contenders, contenders, in_fp64
from benchmarks.optimizer import Optimizer, take_gradient, weights_put_back
from benchmarks.pairs import MIXES, Pair, RandomText
from benchmarks.setting import Setting
from benchmarks.timing import compared, interleave, peak_memory, ratio

W, BETA = 0.5, 0.1


def run(setting: Setting) -> dict[str, Any]:
    """Every model; in the long form the random ones with every length mix and more LoRA, and all against fp64."""
    rows = []
    for name in setting.models:
        thorough = setting.long and name != SMOLLM2
        for lora, targets in {"q, v": ATTENTION, "all linear": ALL_LINEAR}.items():
            if targets == ALL_LINEAR and not thorough:
                continue
            with contenders(name, setting.device, setting.precision, targets) as models:
                for mix in MIXES if thorough and targets == ATTENTION else ("mid prompts",):
                    text = RandomText(models.vocabulary, MIXES[mix], setting.max_tokens)
                    steps = [text.pairs(setting.pairs_per_step) for _ in range(3 if thorough else 2)]
                    row = compare(models, steps, setting.device)
                    if setting.long:
                        row |= compare_with_fp64(models, text.pairs(4))
                    rows.append({"model": name, "lengths": mix, "lora": lora} | row)
    return {"rows": rows}


def compare(models: Contenders, steps: list[list[Pair]], device: torch.device) -> dict[str, Any]:
    """Time both on these optimizer steps, one a round, and compare their losses and the first gradient."""
    with weights_put_back(models.reference), weights_put_back(models.policy):
        warm_up = steps[0][:2]
        reference, own = _reference_numbers(models.reference, warm_up), _our_numbers(models, warm_up)
        return {
            "pairs_per_step": len(steps[0]),
            **_time_steps(models, steps, device),
            "gradient_difference": _relative(own["gradient"], reference["gradient"]),
            **_peak_memory(models, steps[0], device),
        }


def compare_with_fp64(models: Contenders, pairs: list[Pair]) -> dict[str, float]:
    """How far both are from the same numbers in fp64: root mean square over the pairs; of gradients relative."""
    errors: dict[str, float] = {}
    exact_model = in_fp64(models.reference)
    losses, log_probs = reference_procedure.exact_step(exact_model, pairs, w=W, beta=BETA)
    exact = {"loss": losses, "log_prob": log_probs, "gradient": take_gradient(exact_model)}
    reference, own = _reference_numbers(models.reference, pairs), _our_numbers(models, pairs)
    for name, distance in (("loss", _root_mean_square), ("log_prob", _root_mean_square), ("gradient", _relative)):
        of_reference, of_ours = distance(reference[name], exact[name]), distance(own[name], exact[name])
        errors[f"{name}_error_of_reference"] = of_reference
        errors[f"{name}_error_of_ours"] = of_ours
        errors[f"{name}_error_ratio"] = of_reference / max(of_ours, sys.float_info.min)
    return errors


def _time_steps(models: Contenders, steps: list[list[Pair]], device: torch.device) -> dict[str, Any]:
    tables = [ours.make_table(models.scorer, pairs) for pairs in steps]
    tokens = statistics.mean(count_tokens(pairs)[0] for pairs in steps)
    floor = GemmFloor(models.reference.get_base_model())
    of_reference, of_ours = Optimizer(models.reference), Optimizer(models.policy)
    losses: dict[str, list[torch.Tensor]] = {"reference": [], "ours": []}

    def reference_step() -> None:
        pairs = steps[len(losses["reference"])]
        losses["reference"].append(reference_procedure.training_step(models.reference, pairs, w=W, beta=BETA))
        of_reference.step()

    def our_step() -> None:
        pairs = tables[len(losses["ours"])]
        losses["ours"].append(ours.training_step(models.policy, pairs, w=W, beta=BETA))
        of_ours.step()

    timed = interleave({"reference": reference_step, "ours": our_step, "floor": floor.measure}, len(steps), device)
    validated = interleave(
        {
            "reference": lambda: reference_procedure.validation(models.reference, steps[0][:2], w=W, beta=BETA),
            "ours": lambda: ours.validation(models.policy, tables[0][:2], w=W, beta=BETA),
        },
        rounds=2,
        device=device,
    )
    differences = torch.cat(losses["reference"]).double() - torch.cat(losses["ours"]).double()
    return {
        "tokens_per_pair": tokens / len(steps[0]),
        **compared(timed, len(steps[0])),
        "validation_ratio": ratio(validated["reference"], validated["ours"]),
        "floor_gflops": floor.rate / 1e9,
        "share_of_floor": ratio([floor.flops(pairs) / floor.rate for pairs in steps], timed["ours"]),
        "loss_difference": differences.abs().max().item(),
    }


def _reference_numbers(model: PeftModel, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    losses = reference_procedure.training_step(model, pairs, w=W, beta=BETA)
    log_probs, _ = reference_procedure.reference_and_margin(model, pairs)
    return {"loss": losses, "log_prob": log_probs, "gradient": take_gradient(model)}


def _our_numbers(models: Contenders, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    table = ours.make_table(models.scorer, pairs)
    losses = ours.training_step(models.policy, table, w=W, beta=BETA)
    log_probs = torch.tensor([[p.reference_chosen, p.reference_rejected] for p in table], dtype=torch.float64)
    return {"loss": losses, "log_prob": log_probs, "gradient": take_gradient(models.policy)}


def _root_mean_square(values: torch.Tensor, truth: torch.Tensor) -> float:
    return (values.double().cpu() - truth.cpu()).square().mean().sqrt().item()


def _relative(values: torch.Tensor, truth: torch.Tensor) -> float:
    return ((values - truth).norm() / truth.norm()).item()


def _peak_memory(models: Contenders, pairs: list[Pair], device: torch.device) -> dict[str, float | None]:
    table = ours.make_table(models.scorer, pairs)
    longest = max(pairs, key=lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)))
    return {
        "peak_mib_of_reference": peak_memory(
            lambda: reference_procedure.training_step(models.reference, [longest], w=W, beta=BETA), device
        ),
        "peak_mib_of_ours": peak_memory(lambda: ours.training_step(models.policy, table, w=W, beta=BETA), device),
    }

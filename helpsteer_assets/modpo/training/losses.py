"""The MODPO loss and the rewards behind it, as pure functions of log-probabilities.

Source: Zhou, Liu, Shao, Yue, Yang, Ouyang, Qiao: "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct
Preference Optimization", Findings of ACL 2024 (arXiv 2310.03708).
"""

import torch
import torch.nn.functional as F


def log_ratios(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log p_policy(y|x) - log p_sft(y|x).

    Args:
        policy, reference: [batch] summed log-probabilities, nats.
    """
    return policy - reference


def modpo_logits(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    chosen_margins: torch.Tensor,
    rejected_margins: torch.Tensor,
    *,
    w: float,
    beta: float,
) -> torch.Tensor:
    """The logits of the MODPO loss: by how much the implicit preference reward of chosen exceeds that of rejected.

    (1/w) (beta [log-ratio of chosen - log-ratio of rejected] - (1-w) [m(chosen) - m(rejected)]),
    the argument of log sigma in the paper's L_MODPO, where m is its margin reward model. Subtracting the margin
    *encourages* it: at the optimum beta log(pi/pi_sft) = w r_preference + (1-w) m + const(x).

    Args:
        chosen_log_ratios, rejected_log_ratios: [batch], nats.
        chosen_margins, rejected_margins: [batch] m of each response, in reward units.
        w: weight of the preference in (0, 1]; at 1 the margin has no effect, and these are the logits of DPO.
        beta: strength of the pull to the SFT model.

    Returns:
        [batch].
    """
    if not 0 < w <= 1:
        raise ValueError(f"w must lie in (0, 1], got {w}")
    advantages = beta * (chosen_log_ratios - rejected_log_ratios)
    margins = chosen_margins - rejected_margins
    return (advantages - (1 - w) * margins) / w


def modpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    chosen_margins: torch.Tensor,
    rejected_margins: torch.Tensor,
    *,
    w: float,
    beta: float,
) -> torch.Tensor:
    """-log sigmoid of `modpo_logits`, [batch]; at w = 1 the DPO loss, number for number."""
    logits = modpo_logits(chosen_log_ratios, rejected_log_ratios, chosen_margins, rejected_margins, w=w, beta=beta)
    return -F.logsigmoid(logits)

"""The MODPO loss, a pure function of log-probabilities and margins.

Source: Zhou, Liu, Shao, Yue, Yang, Ouyang, Qiao: "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct
Preference Optimization", Findings of ACL 2024 (arXiv 2310.03708).
"""

import torch
import torch.nn.functional as F


def modpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    chosen_margins: torch.Tensor,
    rejected_margins: torch.Tensor,
    *,
    w: float,
    beta: float,
) -> torch.Tensor:
    """The MODPO loss of pairs; at w = 1 the DPO loss, number for number.

    -log sigma((1/w) (beta [log-ratio of chosen - log-ratio of rejected] - (1-w) [m(chosen) - m(rejected)])),
    the paper's L_MODPO, where m is its margin reward model. Subtracting the margin *encourages* it: at the optimum
    beta log(pi/pi_sft) = w r_preference + (1-w) m + const(x).

    Args:
        chosen_log_ratios, rejected_log_ratios: [batch] log p_policy(y|x) - log p_sft(y|x) of each response, nats.
        chosen_margins, rejected_margins: [batch] m of each response, in reward units.
        w: weight of the preference in (0, 1]; at 1 the margin has no effect.
        beta: strength of the pull to the SFT model.

    Returns:
        [batch].
    """
    if not 0 < w <= 1:
        raise ValueError(f"w must lie in (0, 1], got {w}")
    advantages = beta * (chosen_log_ratios - rejected_log_ratios)
    margins = chosen_margins - rejected_margins
    return -F.logsigmoid((advantages - (1 - w) * margins) / w)

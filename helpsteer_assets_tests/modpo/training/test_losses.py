import math

import pytest
import torch
import torch.nn.functional as F

from helpsteer_assets.modpo.training.losses import modpo_loss


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


class TestModpoLoss:
    # The arguments of the sigmoid, worked out by hand from
    # (1/w) (beta [(chosen log-ratio) - (rejected log-ratio)] - (1-w) [m(chosen) - m(rejected)]).
    @pytest.mark.parametrize(
        ("ratios", "margins", "w", "beta", "argument"),
        [
            ((3.0, 1.0), (5.0, 2.0), 1.0, 0.1, 0.2),  # the margin is out
            ((3.0, 1.0), (0.1, 0.4), 0.5, 0.1, 0.7),  # 2 * (0.2 + 0.5 * 0.3)
            ((-2.0, 4.0), (1.0, -1.0), 0.1, 0.5, -48.0),  # 10 * (0.5 * -6 - 0.9 * 2)
            ((-2.0, 4.0), (-1.0, 1.0), 0.25, 0.5, -6.0),  # 4 * (0.5 * -6 + 0.75 * 2)
        ],
    )
    def test_equals_the_papers_formula_worked_out_by_hand(self, ratios, margins, w, beta, argument):
        expected = math.log1p(math.exp(-argument))
        assert modpo_loss(*tensors(*ratios, *margins), w=w, beta=beta).item() == pytest.approx(expected, abs=1e-12)

    def test_at_w_1_is_the_dpo_loss_number_for_number(self):
        torch.manual_seed(0)
        chosen, rejected, *margins = torch.randn(4, 50, dtype=torch.float64) * 30
        dpo = -F.logsigmoid(0.3 * (chosen - rejected))
        assert torch.equal(modpo_loss(chosen, rejected, *margins, w=1.0, beta=0.3), dpo)

    @pytest.mark.parametrize("w", [0.0, -0.1, 1.0001, math.nan])
    def test_refuses_a_weight_outside_0_to_1(self, w):
        with pytest.raises(ValueError, match=r"w must lie in \(0, 1\]"):
            modpo_loss(*tensors(1, 2, 3, 4), w=w, beta=0.1)

    def test_stays_finite_for_large_margins(self):
        assert modpo_loss(*tensors(0, 0, 500, -500), w=0.1, beta=0.1).item() == pytest.approx(9000)

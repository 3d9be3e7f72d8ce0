import pytest
import torch
import torch.nn.functional as F

from helpsteer_assets.modpo.scoring import log_prob_head
from helpsteer_assets.modpo.scoring.log_prob_head import LogProbHead

TOKENS, HIDDEN, VOCABULARY = 11, 6, 13

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 0.7, "softcap": 2.0},
}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(
    *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> LogProbHead:
    weight = 2 * draw(VOCABULARY, HIDDEN, dtype=dtype, seed=1)
    return LogProbHead(weight, draw(VOCABULARY, dtype=dtype, seed=2) if bias else None, scale, softcap)


def plain_log_probs(head: LogProbHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The head by its definition."""
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.fixture(params=[1, 4 * VOCABULARY - 1, 2**23])
def chunks(request, monkeypatch) -> None:
    """Chunks of one row, of three, the last a short one, and of all rows."""
    monkeypatch.setattr(log_prob_head, "CHUNK_ELEMENTS", request.param)


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_log_probabilities_and_gradients_equal_log_softmax_and_gather(kind, dtype, tolerance, targets):
    head = make_head(**HEADS[kind], dtype=dtype)
    hidden, upstream = draw(TOKENS, HIDDEN), draw(TOKENS, seed=4)
    ours, theirs = hidden.to(dtype).requires_grad_(), hidden.to(dtype).double().requires_grad_()
    accurate = LogProbHead(
        head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap
    )
    found, expected = head(ours, targets), plain_log_probs(accurate, theirs, targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=tolerance, rtol=tolerance)


def test_logits_of_any_size_have_finite_results(targets):
    """A softmax of saturated logits neither overflows nor makes a NaN of 0 times infinity."""
    head = LogProbHead(1e4 * draw(VOCABULARY, HIDDEN, seed=1).float())
    hidden = draw(TOKENS, HIDDEN).float().requires_grad_()
    found = head(hidden, targets)
    found.sum().backward()
    assert found.isfinite().all() and hidden.grad.isfinite().all()
    torch.testing.assert_close(found, plain_log_probs(head, hidden, targets).double(), rtol=1e-4, atol=1e-4)


def test_nothing_of_the_logits_size_is_kept_for_the_backward_pass(monkeypatch):
    tokens, vocabulary = 200, 5000
    monkeypatch.setattr(log_prob_head, "CHUNK_ELEMENTS", 8 * vocabulary)
    head = LogProbHead(draw(vocabulary, HIDDEN))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        found = head(draw(tokens, HIDDEN).requires_grad_() * 1, torch.zeros(tokens, dtype=torch.long))
    assert found.requires_grad
    # The gradient by hidden states and no more: not even the weights.
    assert max(kept) == tokens * HIDDEN

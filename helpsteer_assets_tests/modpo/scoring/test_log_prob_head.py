import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from helpsteer_assets.modpo.scoring import log_prob_head
from helpsteer_assets.modpo.scoring.log_prob_head import LogProbHead, find_head

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


@pytest.mark.usefixtures("chunks")
def test_without_gradients_is_the_same(targets):
    head, hidden = make_head(**HEADS["all"]), draw(TOKENS, HIDDEN)
    expected = head(hidden.clone().requires_grad_(), targets)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = head(hidden, targets)
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_of_one_row_and_of_none():
    head = make_head(**HEADS["all"])
    for rows in (1, 0):
        hidden, targets = draw(rows, HIDDEN).requires_grad_(), torch.full((rows,), 5)
        found = head(hidden, targets)
        torch.testing.assert_close(found, plain_log_probs(head, hidden, targets), atol=1e-12, rtol=0)
        found.sum().backward()
        assert hidden.grad.shape == (rows, HIDDEN)


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


SMALL = {
    "vocab_size": 29,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class TestFindHead:
    def frozen(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.requires_grad_(False).eval()

    @pytest.mark.parametrize(
        ("make", "scale", "softcap"),
        [
            (lambda small: LlamaForCausalLM(LlamaConfig(**small)), 1.0, None),
            (lambda small: LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)), 1.0, None),
            (lambda small: CohereForCausalLM(CohereConfig(**small, logit_scale=0.25, eos_token_id=2)), 0.25, None),
            (lambda small: GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0)), 0.25, None),
            (
                lambda small: Gemma2ForCausalLM(Gemma2Config(**small, head_dim=4, final_logit_softcapping=3.0)),
                1.0,
                3.0,
            ),
        ],
        ids=["llama", "tied", "cohere", "granite", "gemma2"],
    )
    def test_makes_the_models_own_logits(self, make, scale, softcap):
        model = self.frozen(make(SMALL).double())
        head = find_head(model)
        assert (head.scale, head.softcap) == (scale, softcap)
        assert head.weight is model.get_output_embeddings().weight
        ids = torch.randint(29, (1, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            expected = F.log_softmax(model(input_ids=ids).logits[0], dim=-1).gather(1, ids[0, :, None])[:, 0]
            torch.testing.assert_close(head(hidden, ids[0]), expected, atol=1e-12, rtol=0)

    def test_finds_none_that_is_trained(self, model):
        self.frozen(model)
        assert find_head(model) is not None
        model.lm_head.requires_grad_(True)
        assert find_head(model) is None
        with torch.no_grad():
            assert find_head(model) is not None

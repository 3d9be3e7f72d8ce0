import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from helpsteer_assets.experiment import LoraSettings
from helpsteer_assets.modpo import log_probs
from helpsteer_assets.modpo.batching import collate
from helpsteer_assets.modpo.log_probs import BASE, response_log_probs, score_sequences
from helpsteer_assets.modpo.models import attach_lora
from helpsteer_assets.modpo.tokenization import Sequence

PAD, EOS = 0, 2


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)

    def tokens(longest: int) -> list[int]:
        return [draw.randrange(3, 290) for _ in range(draw.randint(1, longest))]

    return [Sequence(tokens(20), [*tokens(25), EOS]) for _ in range(count)]


def one_token_at_a_time(model: torch.nn.Module, sequence: Sequence) -> float:
    """log p(y|x) by its definition: each token's probability given those before it, in a forward pass of its own."""
    total, seen = 0.0, list(sequence.prompt_ids)
    for token in sequence.response_ids:
        logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += (logits[token] - torch.logsumexp(logits, 0)).item()
        seen.append(token)
    return total


def two_adapters(model: torch.nn.Module) -> PeftModel:
    """Random LoRA adapters `first` and `second` that do something."""
    peft_model = attach_lora(model, LoraSettings(r=4, alpha=8), seed=0)
    for name in ("first", "second"):
        peft_model.add_adapter(name, peft_model.peft_config["default"])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft_model


class TestResponseLogProbs:
    # Llama's norms compute in fp32 even in an fp64 model.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 1e-4)])
    @torch.no_grad()
    def test_equal_a_loop_over_the_tokens(self, model, dtype, tolerance):
        model.to(dtype)
        sequences = make_sequences(6)
        found = response_log_probs(model, collate(sequences, PAD))
        assert found.dtype == torch.float64
        expected = [one_token_at_a_time(model, sequence) for sequence in sequences]
        torch.testing.assert_close(found, torch.tensor(expected).double(), atol=tolerance, rtol=0)

    @torch.no_grad()
    def test_do_not_depend_on_padding_or_on_what_else_is_in_the_batch(self, model):
        model.double()
        sequences = make_sequences(8)
        together = response_log_probs(model, collate(sequences, PAD))
        alone = torch.cat([response_log_probs(model, collate([sequence], PAD)) for sequence in sequences])
        torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)

    @torch.no_grad()
    def test_count_the_end_of_text_token_where_it_is_the_pad_token_too(self, model):
        model.double()
        sequences = make_sequences(8)
        with_own_pad = response_log_probs(model, collate(sequences, PAD))
        with_eos_as_pad = response_log_probs(model, collate(sequences, EOS))
        torch.testing.assert_close(with_own_pad, with_eos_as_pad, atol=1e-10, rtol=0)
        cut = [Sequence(s.prompt_ids, s.response_ids[:-1]) for s in sequences]
        without_eos = response_log_probs(model, collate(cut, EOS))
        assert (without_eos > with_eos_as_pad).all()

    def test_leave_the_prompts_tokens_out_of_the_gradient(self, model):
        sequence = Sequence([5, 6, 7], [8, EOS])
        logits: list[torch.Tensor] = []
        model.lm_head.register_forward_hook(lambda _m, _i, output: (output.retain_grad(), logits.append(output))[0])
        response_log_probs(model, collate([sequence], PAD)).sum().backward()
        moved = logits[0].grad[0].abs().sum(-1) > 0
        assert moved.tolist() == [False, False, True, True, False]


class TestScoreSequences:
    @pytest.fixture(autouse=True)
    def small_batches(self, monkeypatch):
        monkeypatch.setattr(log_probs, "SCORING_BATCH_TOKENS", 100)

    def test_keep_the_order_of_the_sequences(self, model):
        model.double()
        sequences = make_sequences(20)
        scored = score_sequences(model, sequences, pad_id=PAD)
        with torch.no_grad():
            expected = [response_log_probs(model, collate([sequence], PAD)).item() for sequence in sequences]
        assert scored[BASE] == pytest.approx(expected, abs=1e-9)

    def test_of_no_sequences_are_no_scores(self, model):
        assert score_sequences(model, [], pad_id=PAD) == {BASE: []}

    def test_score_each_adapter_and_the_model_without_any(self, model, tiny_model_path):
        sequences = make_sequences(6)
        base = score_sequences(model, sequences, pad_id=PAD)[BASE]
        peft_model = two_adapters(model)
        scored = score_sequences(peft_model, sequences, pad_id=PAD, adapters=("second", BASE, "first"))
        assert list(scored) == ["second", BASE, "first"]
        assert scored[BASE] == pytest.approx(base, abs=1e-5)
        for name in ("first", "second"):
            peft_model.set_adapter(name)
            with torch.no_grad():
                expected = [response_log_probs(peft_model, collate([s], PAD)).item() for s in sequences]
            assert scored[name] == pytest.approx(expected, abs=1e-4)
            assert abs(scored[name][0] - base[0]) > 0.1

    def test_report_progress_up_to_all(self, model):
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int, **_: float) -> None:
            seen.append((done, total))

        score_sequences(model, make_sequences(9), pad_id=PAD, progress=progress)
        assert seen[-1] == (9, 9)
        assert seen == sorted(seen)
        assert len(seen) > 2

    @pytest.mark.parametrize("cut", [1, 40, "half", "all but a byte"])
    def test_go_on_from_a_file_that_a_death_cut_anywhere_with_identical_numbers(self, model, tmp_path: Path, cut):
        sequences = make_sequences(15)
        peft_model = two_adapters(model)
        adapters = (BASE, "first")
        without_file = score_sequences(peft_model, sequences, pad_id=PAD, adapters=adapters)
        file = tmp_path / "new" / "log_probs.jsonl"
        assert score_sequences(peft_model, sequences, pad_id=PAD, adapters=adapters, checkpoint=file) == without_file
        content = file.read_bytes()
        size = {"half": len(content) // 2, "all but a byte": len(content) - 1}.get(cut, cut)
        file.write_bytes(content[:size])
        assert score_sequences(peft_model, sequences, pad_id=PAD, adapters=adapters, checkpoint=file) == without_file

    def test_do_not_compute_again_what_the_file_holds(self, model, tmp_path: Path, monkeypatch):
        sequences, file = make_sequences(15), tmp_path / "log_probs.jsonl"
        whole = score_sequences(model, sequences, pad_id=PAD, checkpoint=file)
        batches: list[int] = []
        monkeypatch.setattr(
            log_probs,
            "response_log_probs",
            lambda model, batch: batches.append(len(batch.input_ids)) or response_log_probs(model, batch),
        )
        assert score_sequences(model, sequences, pad_id=PAD, checkpoint=file) == whole
        assert batches == []
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:-1]))
        assert score_sequences(model, sequences, pad_id=PAD, checkpoint=file) == whole
        assert len(batches) == 1

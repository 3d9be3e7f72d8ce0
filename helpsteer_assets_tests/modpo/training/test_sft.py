from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import PeftModel

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import attach_lora, load_model, load_tokenizer
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.batching import collate
from helpsteer_assets.modpo.scoring.log_probs import padded_log_probs
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.training.loop import TrainingResult
from helpsteer_assets.modpo.training.sft import train_sft
from helpsteer_assets_tests.conftest import make_sequences, make_tokenizer


def train(
    path: Path,
    folder: Path,
    sequences: list[Sequence],
    selection: list[Sequence] | None = None,
    tokenizer: Any = None,
    **changes: Any,
) -> tuple[PeftModel, TrainingResult]:
    model = attach_lora(load_model(path, precision="fp32"), Lora(r=4, alpha=8), 0)
    how = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "evaluate_every": 2, "warmup_share": 0.0} | changes
    result = train_sft(
        model,
        tokenizer or load_tokenizer(path),
        train_sequences=sequences,
        selection_sequences=selection or [],
        settings=Training(**how),
        seed=0,
        report_to=[],
        checkpoints=folder,
    )
    return model, result


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What the trainer trains on."""
    seen: list[dict[str, torch.Tensor]] = []
    original = trl.SFTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", compute_loss)
    return seen


def test_sequences_train_untouched_and_the_loss_is_on_the_response_only(tiny_model_path, tokenizer, tmp_path, batches):
    sequences = make_sequences(tokenizer, 8)
    padding = make_tokenizer(pad=False)
    padding.pad_token = padding.eos_token
    train(tiny_model_path, tmp_path, sequences, tokenizer=padding, steps=2)
    found = set()
    for batch in batches:
        for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert (labels[length:] == -100).all()
            found.add((tuple(tokens[:length].tolist()), tuple(labels[:length].tolist())))
    assert found == {
        ((*s.prompt_ids.tolist(), *s.response_ids.tolist()), (*[-100] * len(s.prompt_ids), *s.response_ids.tolist()))
        for s in sequences
    }


def test_loss_is_the_mean_over_the_responses_tokens(tiny_model_path, tokenizer, model, tmp_path):
    sequences = make_sequences(tokenizer, 8)
    _, result = train(tiny_model_path, tmp_path, sequences, batch_size=8, steps=1)
    with torch.no_grad():
        total = padded_log_probs(model, collate(sequences, 0)).sum().item()
    assert result.history[0]["loss"] == pytest.approx(-total / sum(len(s.response_ids) for s in sequences), rel=1e-5)


def test_a_batch_of_4_equals_4_accumulated_batches_of_1(tiny_model_path, tokenizer, tmp_path):
    sequences = make_sequences(tokenizer, 10)
    found, histories = [], []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model, result = train(
            tiny_model_path,
            tmp_path / str(batch_size),
            sequences,
            sequences[:3],
            batch_size=batch_size,
            accumulation=accumulation,
        )
        histories.append(result.history)
        found.append({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < 1e-5
    # AdamW and clipping hide a gradient that is too large by a factor.
    for whole, parts in zip(*histories, strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-3)
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-3)


def test_training_lowers_the_loss_and_keeps_the_best_checkpoint(tiny_model_path, tokenizer, tmp_path):
    sequences = make_sequences(tokenizer, 12)
    _, result = train(tiny_model_path, tmp_path, sequences, sequences[:5], steps=10)
    losses = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert losses[10] < losses[2]
    assert result.best_loss == losses[result.best_step] == min(losses.values())
    assert all({"loss", "grad_norm"} <= row.keys() for row in result.history)


def test_a_loss_far_above_that_of_guessing_stops_the_run(tiny_model_path, tokenizer, tmp_path):
    loud = tmp_path / "loud"
    model = load_model(tiny_model_path, precision="fp32")
    model.lm_head.weight.data *= 1000  # sure of what is wrong
    model.save_pretrained(loud)
    with pytest.raises(
        HelpsteerError, match=r"training sft_model: loss is \S+, beyond 100, .* by step 1 of 6\. .*sft\.l"
    ):
        train(loud, tmp_path / "checkpoints", make_sequences(tokenizer, 8), tokenizer=tokenizer)

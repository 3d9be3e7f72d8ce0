import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.progress import silent
from helpsteer_assets.modpo.scoring.batching import collate
from helpsteer_assets.modpo.scoring.log_probs import BASE, padded_log_probs, score_sequences
from helpsteer_assets.modpo.scoring.trees import unpack
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.training.checkpoints import checkpoint_progress
from helpsteer_assets.modpo.training.loop import TrainingResult, training_arguments
from helpsteer_assets.modpo.training.preference import (
    PairCollator,
    PairDataset,
    PreferencePair,
    PreferenceTrainer,
    train_preference,
)
from helpsteer_assets_tests.modpo.scoring.test_log_probs import SMALL, make_family, randomize
from helpsteer_assets_tests.modpo.scoring.test_trees import TOKENS, sequence, tokens_of

LORA = Lora(r=4, alpha=8)


def settings_of(**changes: Any) -> Training:
    return Training(**({"steps": 6, "batch_size": 4, "learning_rate": 5e-3, "evaluate_every": 2} | changes))


def as_dataset(pairs: list[PreferencePair]) -> PairDataset:
    """The pairs as a data set of which each has two responses of its own."""
    ids = [(f"{number}, chosen", f"{number}, rejected") for number in range(len(pairs))]
    sequences, reference, margins = {}, {}, {}
    for (chosen, rejected), pair in zip(ids, pairs, strict=True):
        sequences |= {chosen: pair.chosen, rejected: pair.rejected}
        reference |= {chosen: pair.reference_chosen, rejected: pair.reference_rejected}
        margins |= {chosen: pair.margin_chosen, rejected: pair.margin_rejected}
    return PairDataset(ids, sequences, reference, margins)


def train(
    model_path: Path,
    folder: Path,
    pairs: list[PreferencePair],
    selection: list[PreferencePair],
    *,
    w: float = 0.5,
    beta: float = 0.1,
    lora: Lora = LORA,
    seed: int = 0,
    batch_tokens: int = 100,
    progress: Any = silent,
    **changes: Any,
) -> tuple[PeftModel, TrainingResult]:
    """Train a policy; its checkpoints lie in folder/checkpoints, the adapter in folder/adapter."""
    model = attach_lora(load_model(model_path, precision="fp32"), lora, seed)
    result = train_preference(
        model,
        train_pairs=as_dataset(pairs),
        selection_pairs=as_dataset(selection),
        w=w,
        beta=beta,
        settings=settings_of(**changes),
        batch_tokens=batch_tokens,
        seed=seed,
        report_to=[],
        what=f"w={w}",
        checkpoints=folder / "checkpoints",
        progress=progress,
    )
    model.save_pretrained(folder / "adapter")
    return model, result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def trainer_of(model: PeftModel, pairs: list[PreferencePair], folder: Path, *, w: float, beta: float, **changes: Any):
    """A trainer without a training."""
    arguments = training_arguments(
        settings_of(**changes),
        items=len(pairs),
        has_selection=True,
        output_dir=folder,
        seed=0,
        device=torch.device("cpu"),
        report_to=[],
    )
    return PreferenceTrainer(
        model,
        w=w,
        beta=beta,
        args=arguments,
        train_dataset=as_dataset(pairs),
        eval_dataset=as_dataset(pairs),
        data_collator=PairCollator(100),
        evaluation_collator=PairCollator(100),
    )


def test_a_data_set_joins_tokens_references_and_margins_by_response():
    sequences = {name: sequence([1], [5 + n]) for n, name in enumerate("abc")}
    reference = {"a": -1.0, "b": -2.0, "c": -3.0}

    def dataset(margins: dict[str, float] | None) -> PairDataset:
        return PairDataset([("a", "b"), ("b", "c")], sequences, reference, margins)

    expected = PreferencePair(sequences["b"], sequences["c"], -2.0, -3.0, 0.2, 0.3)
    assert dataset({"a": 0.1, "b": 0.2, "c": 0.3})[1] == expected
    assert dataset(None)[1] == replace(expected, margin_chosen=0.0, margin_rejected=0.0)
    with pytest.raises(KeyError, match="c"):
        dataset({"a": 0.1, "b": 0.2})[1]


PAIRS = st.lists(
    st.tuples(TOKENS, TOKENS, TOKENS, *[st.floats(-9, 9)] * 4).map(
        lambda drawn: PreferencePair(sequence(drawn[0], drawn[1]), sequence(drawn[0], drawn[2]), *drawn[3:])
    ),
    min_size=1,
    max_size=10,
)


def sides(pairs: list[PreferencePair]) -> list[Sequence]:
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


@settings(deadline=None)
@given(pairs=PAIRS, max_tokens=st.integers(1, 30))
def test_micro_batches_hold_the_pairs_in_order_and_are_as_full_as_may_be(pairs, max_tokens):
    rest = pairs
    for micro_batch in PairCollator(max_tokens)(pairs)["micro_batches"]:
        sequences, tokens = unpack(micro_batch["trees"]), micro_batch["trees"].tokens
        columns = [micro_batch[name].t().tolist() for name in ("rows", "reference", "margin")]
        held = [
            PreferencePair(sequences[chosen], sequences[rejected], *reference, *margin)
            for (chosen, rejected), reference, margin in zip(*columns, strict=True)
        ]
        assert held == rest[: len(held)]
        assert micro_batch["share"] == len(held) / len(pairs)
        assert tokens == tokens_of(sides(held))
        assert len(held) == 1 or tokens <= max_tokens
        assert held == rest or tokens_of(sides(rest[: len(held) + 1])) > max_tokens
        rest = rest[len(held) :]
    assert rest == []


def stepped(
    model: PeftModel, pairs: list[PreferencePair], folder: Path, *, batch_tokens: int = 100, **how: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step."""
    trainer = trainer_of(model, pairs, folder, **({"w": 0.3, "beta": 0.2} | how))
    trainer.current_gradient_accumulation_steps = 1
    model.zero_grad()
    loss = trainer.training_step(model, PairCollator(batch_tokens)(pairs))
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def padded_loss(model: PeftModel, pairs: list[PreferencePair], *, w: float, beta: float) -> torch.Tensor:
    """The mean MODPO loss the plain way: each response by itself, the formula written out."""
    losses = []
    for pair in pairs:
        chosen, rejected = (padded_log_probs(model, collate([side], 0)) for side in (pair.chosen, pair.rejected))
        advantage = beta * ((chosen - pair.reference_chosen) - (rejected - pair.reference_rejected))
        margin = (1 - w) * (pair.margin_chosen - pair.margin_rejected)
        losses.append(-F.logsigmoid((advantage - margin) / w))
    return torch.cat(losses).mean()


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


class TestTrainingStep:
    def crossing(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        """Pairs of which several have a prompt, or a response, in common, and one is there twice."""
        prompt = pairs[0].chosen.prompt_ids
        sides = [Sequence(prompt, pair.chosen.response_ids) for pair in pairs[1:4]]
        of_one_prompt = [
            PreferencePair(sides[a], sides[b], -20.0 - a, -21.0 - b, 0.1 * a, 0.2 * b)
            for a, b in ((0, 1), (1, 2), (2, 0), (0, 1))
        ]
        return [*pairs[:3], *of_one_prompt, pairs[3]]

    @pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
    def test_has_the_loss_and_gradients_of_the_plain_way_whatever_the_micro_batches(
        self, model, pairs, tmp_path, batch_tokens
    ):
        model = randomize(attach_lora(model, LORA, 0).double())
        crossing = self.crossing(pairs)
        model.zero_grad()
        expected = padded_loss(model, crossing, w=0.3, beta=0.2)
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        found, found_gradients = stepped(model, crossing, tmp_path, batch_tokens=batch_tokens)
        assert found == pytest.approx(expected.item(), rel=1e-6)
        assert_near(found_gradients, gradients, 1e-6)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("family", ["Falcon", "Lfm2"])
    def test_of_a_model_that_trees_do_not_fit_is_that_of_the_plain_way_too(self, pairs, tmp_path, family):
        config = {
            "Falcon": {"num_hidden_layers": 2, "num_attention_heads": 4},
            "Lfm2": SMALL | {"layer_types": ["conv", "full_attention"]},
        }[family]
        model = randomize(attach_lora(make_family(family, config | {"vocab_size": 300, "hidden_size": 32}), LORA, 0))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients = stepped(model, pairs[:3], tmp_path, batch_tokens=50)
        model.zero_grad()
        expected = padded_loss(model, pairs[:3], w=0.3, beta=0.2)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        plain = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        largest = max(gradient.norm() for gradient in plain.values())
        for name, gradient in plain.items():
            assert (gradients[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), 0.01 * largest), name


def test_loss_on_held_out_pairs_is_the_mean_over_pairs_whatever_the_batches(model, pairs, tmp_path):
    model = randomize(attach_lora(model, LORA, 0))
    with torch.no_grad():
        losses = [padded_loss(model, [pair], w=0.5, beta=0.3).item() for pair in pairs[:7]]
    # 7 pairs in batches of 4: the second batch is shorter.
    for batch_size in (1, 4, 64):
        trainer = trainer_of(model, pairs[:7], tmp_path, w=0.5, beta=0.3, batch_size=batch_size)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        correct = sum(loss < math.log(2) for loss in losses)
        assert trainer.state.log_history[-1]["eval_accuracy"] == pytest.approx(correct / 7)


class TestAgainstTrl:
    """The oracle: MODPO(w, beta, m) is DPO with beta' = beta / w and reference' = reference + ((1-w) / beta) m."""

    @pytest.fixture(scope="class")
    def trl_trainer(self, tiny_model_path, tokenizer, tmp_path_factory):
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        rows = [
            {"prompt": "How do I fold a shirt?\n", "chosen": "Lay it flat.", "rejected": "Ask somebody else, please."},
            {"prompt": "What is the best way?\n", "chosen": "Boil water, rinse it twice.", "rejected": "Ask."},
            {"prompt": "Clean?\n", "chosen": "Yes.", "rejected": "then fold it in half, then rinse it"},
        ]
        os.environ["TQDM_DISABLE"] = "1"
        trainer = DPOTrainer(
            load_model(tiny_model_path, precision="fp32"),
            args=DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                loss_type="sigmoid",
                precompute_ref_log_probs=True,
                per_device_train_batch_size=3,
                max_length=None,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        randomize(trainer.model)
        return trainer

    MARGINS = ((0.4, -0.7), (-1.5, 0.8), (0.2, 0.1))
    BETA = 0.2

    def gradients(self, model: PeftModel) -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    @pytest.mark.parametrize("w", [0.1, 1.0])
    def test_loss_and_lora_gradients_equal_stock_dpos(self, trl_trainer, tmp_path, w):
        model, rows = trl_trainer.model, list(trl_trainer.train_dataset)
        ours = [
            PreferencePair(
                sequence(row["prompt_ids"], row["chosen_ids"]),
                sequence(row["prompt_ids"], row["rejected_ids"]),
                row["ref_chosen_logps"],
                row["ref_rejected_logps"],
                *margins,
            )
            for row, margins in zip(rows, self.MARGINS, strict=True)
        ]
        shift = (1 - w) / self.BETA
        shifted = [
            row
            | {
                "ref_chosen_logps": row["ref_chosen_logps"] + shift * chosen,
                "ref_rejected_logps": row["ref_rejected_logps"] + shift * rejected,
            }
            for row, (chosen, rejected) in zip(rows, self.MARGINS, strict=True)
        ]
        trl_trainer.beta = self.BETA / w
        trl_trainer.train_dataset = Dataset.from_list(shifted)
        model.train()
        loss = trl_trainer.compute_loss(model, trl_trainer.data_collator(list(trl_trainer.train_dataset)))
        loss.backward()
        expected = self.gradients(model)

        trainer = trainer_of(model, ours, tmp_path, w=w, beta=self.BETA)
        trainer.current_gradient_accumulation_steps = 1
        our_loss = trainer.training_step(model, PairCollator(40)(ours))
        found = self.gradients(model)

        assert our_loss.item() == pytest.approx(loss.item(), rel=2e-5)
        assert found.keys() == expected.keys()
        assert all("lora_" in name for name in found)
        largest = max(gradient.abs().max() for gradient in expected.values())
        assert largest > 1e-3
        assert furthest(found, expected) < 2e-5 * largest


class TestTraining:
    def test_lowers_the_loss_and_leaves_everything_but_the_adapter_alone(self, tiny_model_path, pairs, tmp_path):
        model, result = train(tiny_model_path, tmp_path, pairs, [], steps=20, evaluate_every=5, learning_rate=1e-2)
        assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
        assert result.history[-1]["accuracy"] > result.history[0]["accuracy"]
        trained = model.get_base_model().state_dict()
        for name, weight in load_model(tiny_model_path, precision="fp32").state_dict().items():
            after = trained.get(name, trained.get(name.replace(".weight", ".base_layer.weight")))
            assert torch.equal(after, weight), name

    def test_batch_size_and_accumulation_come_to_the_same(self, tiny_model_path, pairs, tmp_path):
        # 18 pairs: the last batch of a pass is a short one.
        results = {}
        for batch_size, batch_tokens in ((8, 10_000), (4, 60), (1, 10_000)):
            name = f"{batch_size}, {batch_tokens}"
            _, results[name] = train(
                tiny_model_path,
                tmp_path / name,
                pairs[:18],
                pairs[18:],
                batch_size=batch_size,
                accumulation=8 // batch_size,
                batch_tokens=batch_tokens,
                steps=7,
            )
        first, *others = results
        for other in others:
            assert furthest(weights(tmp_path / first), weights(tmp_path / other)) < 5e-6
            # AdamW and clipping hide a gradient that is too large by a factor.
            for whole, parts in zip(results[first].history, results[other].history, strict=True):
                assert whole == pytest.approx(parts, rel=1e-3)

    def test_activation_checkpointing_is_switched_on_and_changes_no_result(self, tiny_model_path, pairs, tmp_path):
        for name, checkpointing in (("with", True), ("without", False)):
            model, _ = train(tiny_model_path, tmp_path / name, pairs, [], gradient_checkpointing=checkpointing)
            layers = model.get_base_model().model.layers
            assert all(layer.gradient_checkpointing == checkpointing for layer in layers)
        assert furthest(weights(tmp_path / "with"), weights(tmp_path / "without")) < 1e-6

    def test_history_and_progress_report_every_logged_step_and_the_last(self, tiny_model_path, pairs, tmp_path):
        seen: dict[int, dict[str, float]] = {}

        def progress(done: int, total: int, **numbers: float) -> None:
            assert total == 13
            seen[done] = numbers

        how = {"steps": 13, "evaluate_every": 12, "progress": progress}
        _, result = train(tiny_model_path, tmp_path, pairs[:16], pairs[16:], **how)
        # The last step is logged and evaluated, though it falls between two logs and two evaluations.
        assert [row["step"] for row in result.history] == list(seen) == [3, 6, 9, 12, 13]
        assert all({"loss", "grad_norm", "accuracy", "learning_rate"} <= row.keys() for row in result.history)
        assert all(0 <= row["accuracy"] <= 1 and row["grad_norm"] > 0 for row in result.history)
        assert [row["step"] for row in result.history if {"eval_loss", "eval_accuracy"} <= row.keys()] == [12, 13]
        assert all(n.keys() == {"loss", "accuracy", "grad_norm", "tokens_per_second"} for n in seen.values())

    def test_no_train_pair_is_an_error(self, tiny_model_path, pairs, tmp_path):
        with pytest.raises(HelpsteerError, match=r"training w=0.5: there is no train pair"):
            train(tiny_model_path, tmp_path, [], pairs)


class TestWhatIsKept:
    def opposite(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        """Held-out pairs on which the loss rises as training goes on."""
        return [PreferencePair(p.rejected, p.chosen, p.reference_rejected, p.reference_chosen, 0.0, 0.0) for p in pairs]

    def test_is_the_checkpoint_with_the_lowest_held_out_loss_and_not_the_last(self, tiny_model_path, pairs, tmp_path):
        model, result = train(tiny_model_path, tmp_path, pairs, self.opposite(pairs), learning_rate=1e-2, w=1.0)
        losses = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
        assert losses[2] == min(losses.values()) < losses[6]
        assert (result.steps, result.best_step, result.best_loss) == (6, 2, losses[2])
        assert furthest(weights(tmp_path), checkpoint(tmp_path, 2)) == 0
        assert furthest(weights(tmp_path), checkpoint(tmp_path, 6)) > 0
        # The model in hand is that of the file.
        trainer = trainer_of(model, self.opposite(pairs), tmp_path / "again", w=1.0, beta=0.1)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-4)

    def test_is_the_last_where_no_prompts_are_held_out(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs, [])
        assert (result.steps, result.best_step, result.best_loss) == (6, 6, None)
        assert not any("eval_loss" in row for row in result.history)
        assert furthest(weights(tmp_path), checkpoint(tmp_path, 6)) == 0


class TestNotFinite:
    def test_a_wild_learning_rate_stops_the_run_and_leaves_earlier_checkpoints(self, tiny_model_path, pairs, tmp_path):
        with pytest.raises(HelpsteerError, match=r"training w=0.5: \w+ is (nan|inf) by step 2 of 10.*1e\+30"):
            # The warm-up begins at a learning rate of 0: step 1 does no harm.
            train(
                tiny_model_path,
                tmp_path,
                pairs,
                pairs[:2],
                steps=10,
                evaluate_every=1,
                learning_rate=1e30,
                warmup_share=0.1,
            )
        assert checkpoint_progress(tmp_path / "checkpoints") == (1, 10)

    def test_a_held_out_loss_that_is_not_finite_stops_the_run(self, tiny_model_path, pairs, tmp_path):
        broken = [replace(pairs[0], reference_chosen=-math.inf)]
        with pytest.raises(HelpsteerError, match=r"eval_loss is (nan|inf) by step 2 of 6"):
            train(tiny_model_path, tmp_path, pairs[1:], [*broken, replace(pairs[1], reference_chosen=math.inf)])
        assert checkpoint_progress(tmp_path / "checkpoints") is None

    def test_weights_that_the_last_step_breaks_are_not_kept(self, tiny_model_path, pairs, tmp_path):
        # AdamW's first step is as long as the learning rate: beyond what fp32 holds.
        how = {"learning_rate": 1e39, "warmup_share": 0.0, "steps": 1}
        message = r"training w=0.5: \d+ weight\(s\) are not finite after step 1 of 1\..*1e\+39"
        with pytest.raises(HelpsteerError, match=message):
            train(tiny_model_path, tmp_path, pairs, [], **how)
        assert checkpoint_progress(tmp_path / "checkpoints") is None


class TestExploding:
    def wide(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        """Margins of hundreds, such as a penalty on every token makes."""
        return [replace(p, margin_chosen=300.0, margin_rejected=-300.0) for p in pairs]

    def test_the_loss_that_a_training_starts_from_is_that_of_the_model_without_its_lora(
        self, tiny_model_path, pairs, tmp_path
    ):
        dataset = as_dataset(pairs)
        logits = [-(1 - 0.3) * (p.margin_chosen - p.margin_rejected) / 0.3 for p in pairs]
        assert dataset.loss_of_reference(w=0.3) == pytest.approx(np.logaddexp(0, -np.array(logits)).mean(), rel=1e-12)
        assert as_dataset(self.wide(pairs)).loss_of_reference(w=0.1) == pytest.approx(0.9 * 600 / 0.1)
        without = PairDataset([("a", "b")], {}, {}, None)
        assert without.loss_of_reference(w=0.3) == pytest.approx(math.log(2))
        model = attach_lora(load_model(tiny_model_path, precision="fp32"), LORA, 0)
        trainer = trainer_of(model, pairs, tmp_path, w=0.3, beta=0.1)
        trainer.eval_dataset = dataset
        assert trainer.evaluate()["eval_loss"] == pytest.approx(dataset.loss_of_reference(w=0.3), rel=1e-4)

    def test_a_loss_beyond_what_a_training_comes_back_from_stops_it_and_says_what_to_do(
        self, tiny_model_path, pairs, tmp_path
    ):
        with pytest.raises(HelpsteerError) as raised:
            train(tiny_model_path, tmp_path, pairs, pairs[:4], w=0.05, beta=2000.0, learning_rate=0.1, steps=20)
        message = str(raised.value)
        assert re.match(r"training w=0.05: (eval_)?loss is \S+, beyond 2000, .* by step \d+ of 20\.", message), message
        for advice in ("lower learning_rate, 0.1", "1/w = 20", "raise the smallest weight", "objective.margin_beta"):
            assert advice in message

    def test_a_loss_that_starts_high_is_none_that_exploded(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, self.wide(pairs), self.wide(pairs[:4]), w=0.1)
        assert result.steps == 6
        assert all(5000 < row["loss"] < 6000 for row in result.history), "above 100 / w"


def test_the_adapter_loads_with_plain_peft_and_says_the_same(tiny_model_path, pairs, tmp_path):
    model, _ = train(tiny_model_path, tmp_path, pairs, pairs[:4], learning_rate=1e-2)
    sequences = [pair.chosen for pair in pairs]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapter")
    expected = score_sequences(model, sequences, adapters=("default", BASE))
    found = score_sequences(plain, sequences, adapters=("default", BASE))
    assert found["default"] == pytest.approx(expected["default"], abs=1e-5)
    assert abs(found["default"][0] - found[BASE][0]) > 1e-2


QUIET_TRAINING = """
import sys
from pathlib import Path
import numpy as np
from helpsteer_assets.modpo.settings import Lora, Training
from helpsteer_assets.modpo.models.loading import attach_lora, load_adapters, load_model, load_tokenizer
from helpsteer_assets.modpo.training.preference import PairDataset, train_preference
from helpsteer_assets.modpo.training.sft import train_sft
from helpsteer_assets.modpo.models.tokenization import Sequence

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
sequences = [Sequence(np.array([5, 6 + i], np.int32), np.array([9 + i, 2], np.int32)) for i in range(4)]
how = dict(steps=2, batch_size=2, learning_rate=1e-3, evaluate_every=1, early_stopping=5, gradient_checkpointing=True)
common = dict(seed=0, report_to=[])
for attempt in range(2):
    model = attach_lora(load_model(base, precision="fp32"), Lora(r=2), 0)
    train_sft(model, load_tokenizer(base), train_sequences=sequences, selection_sequences=sequences,
              settings=Training(**how), checkpoints=folder / "sft", **common)
    model = attach_lora(load_model(base, precision="fp32"), Lora(r=2), 0)
    by_id = {str(n): sequence for n, sequence in enumerate(sequences)}
    pairs = PairDataset([("0", "1"), ("1", "2"), ("2", "3")], by_id, dict.fromkeys(by_id, -9.0))
    train_preference(model, train_pairs=pairs, selection_pairs=pairs, w=0.5, beta=0.1, settings=Training(**how),
                     batch_tokens=100, what="w=0.5", checkpoints=folder / "modpo", **common)
    (folder / "sft/checkpoint-2/complete.json").unlink()
    (folder / "modpo/checkpoint-2/complete.json").unlink()
model.save_pretrained(folder / "adapter")
load_adapters(load_model(base, precision="fp32"), {"policy": folder / "adapter"})
"""


def test_training_and_resuming_say_nothing_but_through_the_progress_callback(tiny_model_path, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONWARNINGS", "TQDM_DISABLE")}
    done = subprocess.run(
        [sys.executable, "-c", QUIET_TRAINING, str(tiny_model_path), str(tmp_path)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

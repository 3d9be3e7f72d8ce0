import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment import LoraSettings, ModpoSettings
from helpsteer_assets.modpo.batching import collate
from helpsteer_assets.modpo.checkpoints import checkpoint_progress
from helpsteer_assets.modpo.log_probs import BASE, response_log_probs, score_sequences
from helpsteer_assets.modpo.models import attach_lora, load_model
from helpsteer_assets.modpo.preference_trainer import (
    PairCollator,
    PairDataset,
    PreferencePair,
    PreferenceTrainer,
    make_pairs,
    train_preference,
)
from helpsteer_assets.modpo.progress import silent
from helpsteer_assets.modpo.tokenization import Sequence
from helpsteer_assets.modpo.training import TrainingResult, training_arguments

LORA = LoraSettings(r=4, alpha=8)


def settings_of(**changes: Any) -> ModpoSettings:
    return ModpoSettings(**({"steps": 6, "batch_size": 4, "learning_rate": 5e-3, "evaluate_every": 2} | changes))


def train(
    model_path: Path,
    folder: Path,
    pairs: list[PreferencePair],
    selection: list[PreferencePair],
    *,
    w: float = 0.5,
    lora: LoraSettings = LORA,
    seed: int = 0,
    progress: Any = silent,
    **changes: Any,
) -> tuple[PeftModel, TrainingResult]:
    """Train a policy; its checkpoints lie in folder/checkpoints, the adapter in folder/adapter."""
    model = attach_lora(load_model(model_path, precision="fp32"), lora, seed)
    result = train_preference(
        model,
        train_pairs=pairs,
        selection_pairs=selection,
        w=w,
        beta=0.1,
        settings=settings_of(**changes),
        pad_id=0,
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
        train_dataset=PairDataset(pairs),
        eval_dataset=PairDataset(pairs),
        data_collator=PairCollator(0),
    )


def randomize(model: PeftModel) -> PeftModel:
    """A LoRA as in the midst of training: at first, with B = 0, half of its gradients vanish."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class TestMakePairs:
    rows = ({"chosen_id": "a", "rejected_id": "b"}, {"chosen_id": "b", "rejected_id": "c"})
    sequences = MappingProxyType({"a": Sequence([1], [5]), "b": Sequence([1], [6]), "c": Sequence([1], [7])})

    def test_join_tokens_references_and_margins_by_response(self):
        reference, margins = {"a": -1.0, "b": -2.0, "c": -3.0}, {"a": 0.1, "b": 0.2, "c": 0.3}
        made = make_pairs(self.rows, self.sequences, reference, margins)
        assert made[1] == PreferencePair(self.sequences["b"], self.sequences["c"], -2.0, -3.0, 0.2, 0.3)

    def test_without_margins_these_are_zero(self):
        (first, _) = make_pairs(self.rows, self.sequences, {"a": -1.0, "b": -2.0, "c": -3.0})
        assert (first.margin_chosen, first.margin_rejected) == (0.0, 0.0)

    def test_a_response_without_a_margin_is_an_error(self):
        with pytest.raises(KeyError, match="c"):
            make_pairs(self.rows, self.sequences, {"a": -1.0, "b": -2.0, "c": -3.0}, {"a": 0.1, "b": 0.2})


class TestLoss:
    @pytest.mark.parametrize("w", [0.1, 0.5, 0.9, 1.0])
    def test_is_the_formula_on_the_models_log_probabilities(self, model, pairs, tmp_path, w):
        model = randomize(attach_lora(model, LORA, 0))
        trainer = trainer_of(model, pairs, tmp_path, w=w, beta=0.3)
        with torch.no_grad():
            found = trainer.compute_loss(model, PairCollator(0)(pairs[:5])).item()
            losses = []
            for pair in pairs[:5]:
                chosen, rejected = (
                    response_log_probs(model, collate([sequence], 0)) for sequence in (pair.chosen, pair.rejected)
                )
                advantage = 0.3 * ((chosen - pair.reference_chosen) - (rejected - pair.reference_rejected))
                margin = (1 - w) * (pair.margin_chosen - pair.margin_rejected)
                losses.append(-F.logsigmoid((advantage - margin) / w).item())
        assert found == pytest.approx(sum(losses) / 5, rel=1e-5)

    def test_of_the_untrained_policy_without_margins_is_log_2(self, model, pairs, tmp_path):
        bare = [replace(pair, margin_chosen=0.0, margin_rejected=0.0) for pair in pairs]
        model = attach_lora(model, LORA, 0)
        found = trainer_of(model, bare, tmp_path, w=0.1, beta=0.1).compute_loss(model, PairCollator(0)(bare))
        assert found.item() == pytest.approx(math.log(2), abs=1e-5)

    def test_on_held_out_pairs_is_the_mean_over_pairs_whatever_the_batches(self, model, pairs, tmp_path):
        model = randomize(attach_lora(model, LORA, 0))

        def evaluated(batch_size: int) -> tuple[float, float]:
            trainer = trainer_of(model, pairs[:7], tmp_path, w=0.5, beta=0.3, batch_size=batch_size)
            loss = trainer.evaluate()["eval_loss"]
            return loss, trainer.state.log_history[-1]["eval_accuracy"]

        # 7 pairs in batches of 4: the second batch is shorter.
        assert evaluated(4) == pytest.approx(evaluated(7), rel=1e-5)
        assert evaluated(7)[1] == pytest.approx(round(evaluated(7)[1] * 7) / 7)


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

    @pytest.mark.parametrize("w", [0.1, 0.3, 0.8, 1.0])
    def test_loss_and_lora_gradients_equal_stock_dpos(self, trl_trainer, tmp_path, w):
        model, rows = trl_trainer.model, list(trl_trainer.train_dataset)
        ours = [
            PreferencePair(
                Sequence(row["prompt_ids"], row["chosen_ids"]),
                Sequence(row["prompt_ids"], row["rejected_ids"]),
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
        our_loss = trainer.compute_loss(model, PairCollator(0)(ours))
        our_loss.backward()
        found = self.gradients(model)

        assert our_loss.item() == pytest.approx(loss.item(), rel=2e-5)
        assert found.keys() == expected.keys()
        assert all("lora_" in name for name in found)
        largest = max(gradient.abs().max() for gradient in expected.values())
        assert largest > 1e-3
        assert furthest(found, expected) < 2e-5 * largest


class TestTraining:
    def test_moves_the_adapter_and_lowers_the_loss(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs, [], steps=20, evaluate_every=5, learning_rate=1e-2)
        fresh = attach_lora(load_model(tiny_model_path, precision="fp32"), LORA, 0)
        fresh.save_pretrained(tmp_path / "fresh" / "adapter")
        assert furthest(weights(tmp_path), weights(tmp_path / "fresh")) > 1e-3
        assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
        assert result.history[-1]["accuracy"] > result.history[0]["accuracy"]

    def test_leaves_everything_but_the_adapter_alone(self, tiny_model_path, pairs, tmp_path):
        model, _ = train(tiny_model_path, tmp_path, pairs, [])
        untouched = load_model(tiny_model_path, precision="fp32").state_dict()
        trained = model.get_base_model().state_dict()
        for name, weight in untouched.items():
            found = trained.get(name, trained.get(name.replace(".weight", ".base_layer.weight")))
            assert torch.equal(found, weight), name

    def test_a_margin_draws_the_policy_to_what_has_more_of_it(self, tiny_model_path, pairs, tmp_path):
        def drawn(sign: float) -> float:
            """How much likelier than under the reference what the margin values has become, in nats a pair."""
            one = [replace(p, margin_chosen=sign * 0.5, margin_rejected=0.0) for p in pairs]
            # Each pair in both directions: the preference is undecided, and the margin alone draws.
            other = [
                PreferencePair(
                    p.rejected, p.chosen, p.reference_rejected, p.reference_chosen, p.margin_rejected, p.margin_chosen
                )
                for p in one
            ]
            how = {"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "evaluate_every": 30}
            model, _ = train(tiny_model_path, tmp_path / str(sign), one + other, [], w=0.5, **how)
            sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
            scored = score_sequences(model, sequences, pad_id=0, adapters=("default", BASE))
            ratios = [a - b for a, b in zip(scored["default"], scored[BASE], strict=True)]
            return (sum(ratios[: len(pairs)]) - sum(ratios[len(pairs) :])) / len(pairs)

        # The optimum is (1-w)/beta * sign * 0.5 = +-2.5.
        assert drawn(+1) > 1 > -1 > drawn(-1)

    def test_a_batch_of_4_equals_4_accumulated_batches_of_1(self, tiny_model_path, pairs, tmp_path):
        # 18 pairs: the last batch of a pass is a short one.
        results = {}
        for name, batch_size, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
            _, results[name] = train(
                tiny_model_path,
                tmp_path / name,
                pairs[:18],
                pairs[18:],
                batch_size=batch_size,
                accumulation=accumulation,
                steps=7,
            )
        assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-5
        # AdamW and clipping hide a gradient that is too large by a factor.
        for whole, parts in zip(results["whole"].history, results["parts"].history, strict=True):
            assert whole == pytest.approx(parts, rel=1e-3)

    def test_activation_checkpointing_changes_no_result(self, tiny_model_path, pairs, tmp_path):
        for name, checkpointing in (("with", True), ("without", False)):
            train(tiny_model_path, tmp_path / name, pairs, pairs[:3], gradient_checkpointing=checkpointing)
        assert furthest(weights(tmp_path / "with"), weights(tmp_path / "without")) < 1e-6

    def test_activation_checkpointing_is_switched_on_where_asked_for(self, tiny_model_path, pairs, tmp_path):
        model, _ = train(tiny_model_path, tmp_path, pairs, [], steps=1, gradient_checkpointing=True)
        assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)

    def test_seed_decides_data_order_and_dropout(self, tiny_model_path, pairs, tmp_path):
        lora = LoraSettings(r=4, alpha=8, dropout=0.2)
        for name, seed in (("one", 1), ("again", 1), ("two", 2)):
            set_seed(len(name))  # whatever came before in the process
            train(tiny_model_path, tmp_path / name, pairs, [], lora=lora, seed=seed, steps=3)
        assert furthest(weights(tmp_path / "one"), weights(tmp_path / "again")) == 0
        assert furthest(weights(tmp_path / "one"), weights(tmp_path / "two")) > 1e-3

    def test_history_has_loss_gradient_norm_accuracy_and_held_out_loss(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs[:16], pairs[16:], steps=10, evaluate_every=4)
        assert [row["step"] for row in result.history] == list(range(1, 11))
        assert all({"loss", "grad_norm", "accuracy", "learning_rate"} <= row.keys() for row in result.history)
        assert all(0 <= row["accuracy"] <= 1 and row["grad_norm"] > 0 for row in result.history)
        # The last step is evaluated too, though it is no multiple of 4.
        assert [row["step"] for row in result.history if "eval_loss" in row] == [4, 8, 10]
        assert all("eval_accuracy" in row for row in result.history if "eval_loss" in row)

    def test_the_last_step_is_logged_where_it_falls_between_two_logs(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs, [], steps=13, evaluate_every=12)
        assert [row["step"] for row in result.history] == [3, 6, 9, 12, 13]
        assert all("accuracy" in row for row in result.history)

    def test_progress_reports_step_loss_accuracy_gradient_norm_and_tokens_per_second(
        self, tiny_model_path, pairs, tmp_path
    ):
        seen: list[tuple[int, int, dict[str, float]]] = []
        train(tiny_model_path, tmp_path, pairs, [], progress=lambda done, total, **n: seen.append((done, total, n)))
        assert [(done, total) for done, total, _ in seen] == [(step, 6) for step in range(1, 7)]
        assert all(n.keys() == {"loss", "accuracy", "grad_norm", "tokens_per_second"} for _, _, n in seen)

    def test_a_single_step_trains(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs, pairs[:2], steps=1, evaluate_every=None)
        assert result.history[0]["learning_rate"] > 0
        assert weights(tmp_path)[next(name for name in weights(tmp_path) if "lora_B" in name)].abs().max() > 0

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

    def test_early_stopping_stops_after_so_many_evaluations_without_a_better_loss(
        self, tiny_model_path, pairs, tmp_path
    ):
        _, result = train(
            tiny_model_path,
            tmp_path,
            pairs,
            self.opposite(pairs),
            learning_rate=1e-2,
            steps=40,
            early_stopping=2,
            w=1.0,
        )
        assert (result.steps, result.best_step) == (6, 2)

    def test_early_stopping_lets_a_training_that_gets_better_go_on(self, tiny_model_path, pairs, tmp_path):
        _, result = train(tiny_model_path, tmp_path, pairs, pairs, early_stopping=1)
        assert result.steps == result.best_step == 6

    def test_of_the_checkpoints_only_the_best_and_the_last_stay_on_disk(self, tiny_model_path, pairs, tmp_path):
        train(tiny_model_path, tmp_path, pairs, self.opposite(pairs), learning_rate=1e-2, steps=8, w=1.0)
        found = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
        assert found == ["checkpoint-2", "checkpoint-8"]


class TestNotFinite:
    def test_a_nan_reference_stops_the_run_and_says_where_and_why(self, tiny_model_path, pairs, tmp_path):
        broken = [*pairs[:16], replace(pairs[16], reference_chosen=math.nan)]
        with pytest.raises(HelpsteerError) as raised:
            train(tiny_model_path, tmp_path, broken, [], w=0.1, steps=10)
        message = str(raised.value)
        assert "training w=0.1: loss is nan by step" in message
        assert "of 10" in message
        assert "1/w = 10 multiplies the gradients" in message
        assert "margin_beta" in message

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


def test_the_adapter_loads_with_plain_peft_and_says_the_same(tiny_model_path, pairs, tmp_path):
    model, _ = train(tiny_model_path, tmp_path, pairs, pairs[:4], learning_rate=1e-2)
    sequences = [pair.chosen for pair in pairs]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "adapter")
    expected = score_sequences(model, sequences, pad_id=0, adapters=("default", BASE))
    found = score_sequences(plain, sequences, pad_id=0, adapters=("default", BASE))
    assert found["default"] == pytest.approx(expected["default"], abs=1e-5)
    assert abs(found["default"][0] - found[BASE][0]) > 1e-2


QUIET_TRAINING = """
import sys
from pathlib import Path
from helpsteer_assets.experiment import LoraSettings, ModpoSettings, SftSettings
from helpsteer_assets.modpo.models import attach_lora, load_adapters, load_model, load_tokenizer
from helpsteer_assets.modpo.preference_trainer import PreferencePair, train_preference
from helpsteer_assets.modpo.sft import train_sft
from helpsteer_assets.modpo.tokenization import Sequence

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
sequences = [Sequence([5, 6 + i], [9 + i, 2]) for i in range(4)]
how = dict(steps=2, batch_size=2, learning_rate=1e-3, evaluate_every=1, early_stopping=5, gradient_checkpointing=True)
common = dict(seed=0, report_to=[])
for attempt in range(2):
    model = attach_lora(load_model(base, precision="fp32"), LoraSettings(r=2), 0)
    train_sft(model, load_tokenizer(base), train_sequences=sequences, selection_sequences=sequences, max_length=64,
              settings=SftSettings(**how), checkpoints=folder / "sft", **common)
    model = attach_lora(load_model(base, precision="fp32"), LoraSettings(r=2), 0)
    pairs = [PreferencePair(a, b, -9.0, -9.0) for a, b in zip(sequences, sequences[1:])]
    train_preference(model, train_pairs=pairs, selection_pairs=pairs, w=0.5, beta=0.1, settings=ModpoSettings(**how),
                     pad_id=0, what="w=0.5", checkpoints=folder / "modpo", **common)
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

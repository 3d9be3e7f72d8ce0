"""Stock TRL's DPOTrainer, where it does the same work: w = 1, reference log-probabilities computed before.

(For other weights TRL can be made to do it: MODPO(w, beta, m) is sigmoid DPO at beta / w with the reference moved by
((1 - w) / beta) m.) TRL reads text only, so that each token here is a word of its own. Micro-batches are of one pair:
on a CPU its padded larger ones are slower. Its gradient checkpointing, on by default, is off.
"""

import copy
import statistics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from benchmarks import ours
from benchmarks.models import Contenders, contenders
from benchmarks.optimizer import Optimizer, take_gradient, weights_put_back
from benchmarks.pairs import END_OF_TEXT, MIXES, Pair, RandomText
from benchmarks.setting import Setting
from benchmarks.timing import interleave, ratio

BETA = 0.1


def run(setting: Setting) -> dict[str, Any]:
    """Every model, on pairs of middle length."""
    rows = []
    for name in setting.models:
        with contenders(name, setting.device, setting.precision) as models:
            text = RandomText(models.vocabulary, MIXES["mid prompts"], setting.max_tokens)
            rounds = 3 if setting.long else 2
            micro_batch = 1 if setting.device.type == "cpu" else setting.pairs_per_step
            pairs = text.pairs(setting.pairs_per_step)
            rows.append({"model": name} | compare(models, pairs, rounds, micro_batch, setting.device))
    return {"rows": rows}


def compare(
    models: Contenders, pairs: list[Pair], rounds: int, micro_batch: int, device: torch.device
) -> dict[str, Any]:
    """Time optimizer steps of both on the same pairs, and compare the first step's numbers."""
    with TemporaryDirectory() as folder, weights_put_back(models.policy):
        trainer = make_trainer(models, pairs, micro_batch, device, folder)
        batches = [
            [trainer.train_dataset[place] for place in range(start, min(start + micro_batch, len(pairs)))]
            for start in range(0, len(pairs), micro_batch)
        ]
        table = ours.make_table(models.scorer, pairs)
        # TRL's own metrics are left to it: they belong to what a step of it costs.
        losses: dict[str, list[float]] = {"trl": [], "ours": []}

        def trl_gradient() -> None:
            trainer.model.train()
            losses["trl"].append(0.0)
            for batch in batches:
                inputs = {key: value.to(device) for key, value in trainer.data_collator(batch).items()}
                loss = trainer.compute_loss(trainer.model, inputs) * len(batch) / len(pairs)
                loss.backward()
                losses["trl"][-1] += loss.item()

        def our_gradient() -> None:
            losses["ours"].append(ours.training_step(models.policy, table, w=1.0, beta=BETA).mean().item())

        trl_gradient()
        our_gradient()
        of_trl, of_ours = take_gradient(trainer.model), take_gradient(models.policy)
        optimizers = {"trl": Optimizer(trainer.model), "ours": Optimizer(models.policy)}
        timed = interleave(
            {
                "trl": lambda: (trl_gradient(), optimizers["trl"].step()),
                "ours": lambda: (our_gradient(), optimizers["ours"].step()),
            },
            rounds,
            device,
        )
    return {
        "pairs_in_micro_batch_of_trl": micro_batch,
        "trl_seconds_per_pair": statistics.median(timed["trl"]) / len(pairs),
        "our_seconds_per_pair": statistics.median(timed["ours"]) / len(pairs),
        "ratio": ratio(timed["trl"], timed["ours"]),
        "loss_difference": max(abs(a - b) for a, b in zip(losses["trl"], losses["ours"], strict=True)),
        "gradient_difference": ((of_trl - of_ours).norm() / of_ours.norm()).item(),
    }


def make_trainer(
    models: Contenders, pairs: list[Pair], micro_batch: int, device: torch.device, folder: str
) -> DPOTrainer:
    """TRL's trainer of a copy of our policy, with `pairs` as its train data and its own reference computed before."""
    disable_progress_bars()
    trainer = DPOTrainer(
        # A base model with a fresh LoRA: of a PeftModel TRL would take the adapter itself as the reference.
        model=copy.deepcopy(models.policy).unload(),
        peft_config=models.policy.peft_config["default"],
        args=DPOConfig(
            output_dir=folder,
            beta=BETA,
            per_device_train_batch_size=micro_batch,
            precompute_ref_log_probs=True,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,  # the weights already are in the stated precision
            use_cpu=device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([_as_text(pair) for pair in pairs]),
        processing_class=_word_tokenizer(models.vocabulary),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(models.policy))
    return trainer


def _as_text(pair: Pair) -> dict[str, str]:
    prompt, chosen, rejected = (
        "".join(f" <{token}>" for token in ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({f"<{token}>": token for token in range(vocabulary)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    end_of_text = f"<{END_OF_TEXT}>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end_of_text, pad_token=end_of_text)

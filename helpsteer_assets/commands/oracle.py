"""`verify --deep`: a random sample of stored results, recomputed by plain transformers and peft.

An oracle must not share the code that it judges: here each response is a forward pass of its own, without batches,
trees, fused layers or merged adapters. Shared are only the tokenization (modpo/models/tokenization.py), the margin's
formula, a reward model's class, and how repetition and emptiness are defined (modpo/comparison/text.py). Weights are
not trained again: they are judged by the log-probabilities and tokens that they give.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpsteer_assets.assets.graph import Fingerprint
from helpsteer_assets.assets.loaded import release_memory
from helpsteer_assets.assets.sources import fetch
from helpsteer_assets.assets.status import label
from helpsteer_assets.embedded.rater import rate
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings
from helpsteer_assets.modpo.comparison.text import is_empty, repetition
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.models.loading import choose_device
from helpsteer_assets.modpo.models.tokenization import encode_prompt, encode_response
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.modpo.scoring.raters import RewardModelRater
from helpsteer_assets.modpo.settings import Compute, RewardModel
from helpsteer_assets.store.artifacts import ALL, Artifact, Artifacts

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NATS = {"fp32": (1e-4, 1e-5), "bf16": (5e-2, 5e-2)}
"""Rounding of a log-probability or log-ratio in nats: so much, and so much more per token of the response."""
RATINGS = {"cpu": 1e-3, "cuda": 5e-2}
"""Rounding of a reward model's rating, relative to 1 + its size. On a CPU the model runs in fp32."""
STATISTICS = 1e-6
"""Rounding of a mean, relative to 1 + its size."""
CHOICE = 1e-3
"""In fp32: greedy tokens are tied if their logits differ by less, and the nucleus of top_p is so much wider."""
_SHOWN = 3
"""Differences of one artifact that are told one by one."""

Row = dict[str, Any]
Inputs = dict[str, Any]
"""The inputs of the asset: an artifact by asset, or (under score_summary) artifacts by weight."""


@dataclass(frozen=True)
class Recomputed:
    """A sample of an asset's rows, recomputed."""

    subject: str
    rows: int
    """Rows that were compared."""
    largest: float | None
    """Largest difference of a log-probability or log-ratio, in nats; None where the asset has none."""
    differences: list[str]
    note: str = ""
    """Why something was not compared."""


class _Near(NamedTuple):
    """A recomputed number, and by how much the stored one may differ."""

    value: float
    allowed: float
    nats: bool = False


def recompute(
    experiment: Experiment,
    present: dict[tuple[str, str], Fingerprint],
    whole: Artifacts,
    samples: int,
    seed: int,
    log: Callable[[str], None],
    terminal: TextIO | None,
) -> Iterator[Recomputed]:
    """Recompute `samples` rows (chosen by `seed`) of each finished artifact; the arguments are those of `verify`.

    Raises HelpsteerError where the experiment's device or rater is not there.
    """
    if isinstance(experiment.evaluation.rater, RewardModelSettings):
        fetch(experiment, "rater")
    sft_model = whole.get(("sft_model", ALL, present["sft_model", ALL].value))
    oracle = _Oracle(experiment, None if sft_model is None else sft_model.path / "model")
    todo = [f for f in present.values() if f.asset in _RESULTS and (f.asset, f.partition, f.value) in whole]
    with ProgressReporter("verify --deep", log, terminal) as progress:
        for done, fingerprint in enumerate(todo, start=1):
            yield _compare(oracle, fingerprint, whole, samples, seed)
            progress(done, len(todo))


def _compare(oracle: "_Oracle", fingerprint: Fingerprint, whole: Artifacts, samples: int, seed: int) -> Recomputed:
    asset, partition = fingerprint.asset, fingerprint.partition
    file, key, computations = _RESULTS[asset]
    subject, inputs, lost = label(asset, partition), Inputs(), set()
    for name, values in fingerprint.inputs.items():
        artifacts = {p: whole.get((name, p, value)) for p, value in values.items()}
        inputs[name] = artifacts.get(partition) or artifacts.get(ALL) or artifacts
        lost |= {name} if None in artifacts.values() else set()
    if lost:
        return Recomputed(subject, 0, None, [], f"not possible: {', '.join(sorted(lost))} is missing or damaged")
    table = whole[asset, partition, fingerprint.value].table(file)
    differences, largest = [], None
    for field in table.schema:
        if pa.types.is_floating(field.type) and (count := pc.sum(pc.invert(pc.is_finite(table[field.name]))).as_py()):
            differences.append(f"{count} values of {field.name} are not finite")
    if asset != "score_summary" and samples < len(table):
        table = table.take(random.Random(seed).sample(range(len(table)), samples))
    rows = table.to_pylist()
    for compute, row in product(computations, rows):
        where = " ".join(f"{name} {row.get(name)}" for name in key)
        try:
            expected = compute(oracle, inputs, row)
        except Exception as error:  # changed files can lead to any
            oracle.__dict__.pop("model", None)  # an adapter may be half on it
            differences.append(f"{where} cannot be recomputed: {type(error).__name__}: {error}")
            break
        for column, value in expected.items():
            stored, near = row.get(column), value if isinstance(value, _Near) else _Near(value, 0.0)
            numbers = isinstance(stored, float) and isinstance(near.value, float)
            difference = abs(stored - near.value) if numbers else 0.0 if stored == near.value else float("inf")
            if near.nats:
                largest = max(largest or 0.0, difference)
            if not difference <= near.allowed:
                rounding = f" (up to {near.allowed:.2g} may be rounding)" if near.allowed else ""
                recomputed = f"{_shown(near.value)} when recomputed{rounding}"
                differences.append(f"{column} of {where} is {_shown(stored)}, and {recomputed}")
    if len(differences) > _SHOWN:
        differences = [*differences[:_SHOWN], f"{len(differences) - _SHOWN} more values differ"]
    note = "" if oracle.exact or _generations not in computations else "not its tokens: in bf16 rounding decides"
    return Recomputed(subject, len(rows), largest, differences, note)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Oracle:
    """The models of an experiment, as transformers and peft load them."""

    def __init__(self, experiment: Experiment, folder: Path | None) -> None:
        self.experiment = experiment
        self.folder = folder
        """The SFT model's; None where it is lost, and nothing that needs it is recomputed."""
        self.exact = experiment.model.precision == "fp32"
        self.device = choose_device(experiment.run.plain(Compute), experiment.model.precision)
        self.trust = {"trust_remote_code": experiment.model.trust_remote_code}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, **self.trust)

    @cached_property
    def model(self) -> "PreTrainedModel | PeftModel":
        """The SFT model, with the adapters that were asked for so far."""
        import torch
        from transformers import AutoModelForCausalLM

        self._release("rater")
        dtype = torch.float32 if self.exact else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **self.trust)
        return model.to(self.device).eval()

    @cached_property
    def rater(self) -> RewardModelRater:
        self._release("model")
        settings = self.experiment.evaluation.rater
        assert isinstance(settings, RewardModelSettings)  # no other rater is asked for
        return RewardModelRater(fetch(self.experiment, "rater"), settings.plain(RewardModel), str(self.device))

    def _release(self, name: str) -> None:
        """Let go of a model: memory may not be enough for both."""
        self.__dict__.pop(name, None)
        release_memory()

    def logits(self, adapter: Artifact | None, prompt: list[int], response: list[int]) -> "torch.Tensor":
        """The fp32 logits [tokens, vocabulary] that the response's tokens are chosen from; None: the SFT model's."""
        import torch
        from peft import PeftModel

        model = self.model
        if adapter is not None:
            folder, name = adapter.path / "adapter", adapter.fingerprint
            if not isinstance(model, PeftModel):
                with warnings.catch_warnings(action="ignore"):  # peft uses a name that transformers is giving up
                    self.model = model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            elif name not in model.peft_config:
                model.load_adapter(folder, name)
            model.set_adapter(name)
        plain = adapter is None and isinstance(model, PeftModel)
        with torch.inference_mode(), model.disable_adapter() if plain else nullcontext():
            read = torch.tensor([prompt + response], device=self.device)
            return model(input_ids=read).logits[0, len(prompt) - 1 : -1].float()

    def log_ratio(self, adapter: Artifact | None, prompt: list[int], response: list[int]) -> _Near | None:
        """log p_adapter(response | prompt) - log p_sft(response | prompt) in nats."""
        if adapter is None:
            return None
        own, sft = self.log_prob(adapter, prompt, response), self.log_prob(None, prompt, response)
        return own._replace(value=own.value - sft.value)

    def log_prob(self, adapter: Artifact | None, prompt: list[int], response: list[int]) -> _Near:
        """log p(response | prompt) in nats."""
        base, per_token = NATS[self.experiment.model.precision]
        log_probs = self.logits(adapter, prompt, response).double().log_softmax(-1)[range(len(response)), response]
        return _Near(log_probs.sum().item(), base + per_token * len(response), nats=True)

    def possible(self, prompt: list[int], response: list[int], logits: "torch.Tensor") -> list[int]:
        """The response, with the most likely token in place of each that its settings could not have chosen."""
        import torch
        import transformers as hf

        settings, process = self.experiment.generation, hf.LogitsProcessorList()
        if settings.repetition_penalty != 1:
            process.append(hf.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if settings.no_repeat_ngram_size:
            process.append(hf.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
        if settings.do_sample:
            process.append(hf.TemperatureLogitsWarper(settings.temperature))
            process.append(hf.TopPLogitsWarper(min(1.0, settings.top_p + CHOICE)))
        tokens = []
        for step, token in enumerate(response):
            before = torch.tensor([prompt + response[:step]], device=self.device)
            scores = process(before, logits[step : step + 1])[0]
            least = torch.finfo(scores.dtype).min if settings.do_sample else scores.max() - CHOICE
            tokens.append(token if scores[token] >= least else int(scores.argmax()))
        return tokens

    def encode_prompt(self, prompt: str) -> tuple[list[int], bool]:
        """Tokens of an evaluation prompt, cut to the experiment's length, and whether it was cut."""
        ids, cut = encode_prompt(self.tokenizer, prompt, self.experiment.generation.max_prompt_length)
        return ids.tolist(), cut

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int], bool]:
        """Tokens of a prompt and a response of the data, cut to the experiment's lengths, and whether they were cut."""
        settings = self.experiment.model
        prompt_ids, prompt_cut = encode_prompt(self.tokenizer, prompt, settings.max_prompt_length)
        ids, cut = encode_response(self.tokenizer, response, settings.max_length - len(prompt_ids))
        return prompt_ids.tolist(), ids.tolist(), prompt_cut or cut

    def decode(self, token_ids: list[int]) -> Row:
        """The columns that follow from a generated response's tokens."""
        full = len(token_ids) == self.experiment.generation.max_new_tokens
        return {
            "response": self.tokenizer.decode(token_ids, skip_special_tokens=True),
            "response_tokens": len(token_ids),
            "finish_reason": "eos" if token_ids[-1] == self.tokenizer.eos_token_id else "length" if full else None,
        }


def _reference_log_probs(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    prompt, response, cut = oracle.encode(*_text(inputs, row))
    log_prob = oracle.log_prob(None, prompt, response)
    return {"log_prob": log_prob, "response_tokens": len(response), "truncated": cut}


def _margin_rewards(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    prompt, response = _text(inputs, row)
    ratio = oracle.log_ratio(inputs.get("margin_adapter"), *oracle.encode(prompt, response)[:2])
    tokens = oracle.tokenizer.encode(response, add_special_tokens=False)
    return {"log_ratio": ratio, "response_tokens": len(tokens) + 1}  # uncut, with its end-of-text token


def _margin_adapter_quality(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    pair = _find(inputs["margin_pairs"], "pairs.parquet", "pair_id", row["pair_id"])
    rated = oracle.experiment.data.margin_attribute
    expected = {"prompt_id": pair["prompt_id"], "rating_gap": pair[f"chosen_{rated}"] - pair[f"rejected_{rated}"]}
    for side in ("chosen", "rejected"):
        prompt, response, _ = oracle.encode(pair["prompt"], pair[side])
        expected[f"{side}_tokens"] = len(response)
        expected[f"{side}_log_ratio"] = oracle.log_ratio(inputs["margin_adapter"], prompt, response)
    return expected


def _generations(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    prompt = _prompt(inputs, row)
    tokens, (ids, cut) = row["token_ids"], oracle.encode_prompt(prompt)
    expected = {"prompt": prompt, "prompt_truncated": cut, **oracle.decode(tokens)}
    if oracle.exact:
        expected["token_ids"] = oracle.possible(ids, tokens, oracle.logits(inputs.get("modpo_models"), ids, tokens))
    return expected


def _kl_to_sft(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    tokens, (ids, _) = row["token_ids"], oracle.encode_prompt(_prompt(inputs, row))
    return {"log_ratio": oracle.log_ratio(inputs["modpo_models"], ids, tokens), **oracle.decode(tokens)}


def _scores(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    answer = _answer(inputs, row)
    (prompt, _), tokens = oracle.encode_prompt(answer["prompt"]), answer["token_ids"]
    return {
        "margin_log_ratio": oracle.log_ratio(inputs.get("margin_adapter"), prompt, tokens),
        "margin_reward": oracle.experiment.margin.reward(row["margin_log_ratio"] or 0.0, len(tokens)),
        "log_ratio_to_sft": oracle.log_ratio(inputs.get("modpo_models"), prompt, tokens) or 0.0,
        "response_tokens": len(tokens),
        "response_words": len(answer["response"].split()),
        "finish_reason": answer["finish_reason"],
    }


def _ratings(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    answer, rater = _answer(inputs, row), oracle.experiment.evaluation.rater
    rated: Row = dict.fromkeys(ATTRIBUTES)
    if rater == "embedded":
        rated |= rate(answer["prompt"], answer["response"])
    elif rater != "none":
        for name, (value,) in oracle.rater([answer["prompt"]], [answer["response"]]).items():
            rated[name] = _Near(value, RATINGS[oracle.device.type] * (1 + abs(value)))
    return rated


def _score_summary(oracle: _Oracle, inputs: Inputs, row: Row) -> Row:
    """Means and their differences, without the intervals of the bootstrap."""
    own, sft = (_mean(oracle, inputs, w, row["measure"]) for w in (row["w"], None))
    allowed = STATISTICS * (1 + abs(own) + abs(sft))
    prompts = inputs["sft_scores"].table("scores.parquet").num_rows
    return {"n": prompts, "mean": _Near(own, allowed), "delta": None if row["w"] is None else _Near(own - sft, allowed)}


def _mean(oracle: _Oracle, inputs: Inputs, w: str | None, measure: str) -> float:
    scores = (inputs["sft_scores"] if w is None else inputs["scores"][w]).table("scores.parquet")
    answers = (inputs["sft_generations"] if w is None else inputs["generations"][w]).table("generations.parquet")
    match measure:
        case "overall":
            values = sum(scores[name].to_numpy() for name in ATTRIBUTES)
        case "margin":
            values = oracle.experiment.margin.sign * scores["margin_reward"].to_numpy()
        case "kl_to_sft":
            values = [0.0] if w is None else inputs["kl_to_sft"][w].table("kl.parquet")["log_ratio"].to_numpy()
        case "capped":
            values = [reason == "length" for reason in scores["finish_reason"].to_pylist()]
        case "repetition" | "empty":
            values = list(map(repetition if measure == "repetition" else is_empty, answers["response"].to_pylist()))
        case "prompt_truncated":
            values = answers[measure].to_pylist()
        case _:
            values = scores[measure].to_numpy()
    return float(np.mean(values))


_RESULTS: dict[str, tuple[str, tuple[str, ...], tuple[Callable[[_Oracle, Inputs, Row], Row], ...]]] = {
    "reference_log_probs": ("log_probs.parquet", ("prompt_id", "response_id"), (_reference_log_probs,)),
    "margin_rewards": ("margin_rewards.parquet", ("prompt_id", "response_id"), (_margin_rewards,)),
    "margin_adapter_quality": ("margin_validation.parquet", ("pair_id",), (_margin_adapter_quality,)),
    "sft_generations": ("generations.parquet", ("prompt_id",), (_generations,)),
    "generations": ("generations.parquet", ("prompt_id",), (_generations,)),
    "sft_scores": ("scores.parquet", ("prompt_id",), (_scores, _ratings)),
    "scores": ("scores.parquet", ("prompt_id",), (_scores, _ratings)),
    "kl_to_sft": ("kl.parquet", ("sample", "prompt_id"), (_kl_to_sft,)),
    "score_summary": ("score_summary.parquet", ("policy", "w", "measure"), (_score_summary,)),
}
"""Each asset's file, the columns that tell its rows apart, and what gives the expected values of a row."""


def _find(artifact: Artifact, file: str, key: str, value: str) -> Row:
    """The row of an input that has this value."""
    rows = pq.read_table(artifact.file(file), filters=[(key, "==", value)]).to_pylist()
    if not rows:
        raise HelpsteerError(f"{artifact.asset} has no {key} {value}")
    return rows[0]


def _prompt(inputs: Inputs, row: Row) -> str:
    return _find(inputs["evaluation_prompts"], "prompts.parquet", "prompt_id", row["prompt_id"])["prompt"]


def _answer(inputs: Inputs, row: Row) -> Row:
    """The generated response that a row of scores is about."""
    generations = inputs.get("generations") or inputs["sft_generations"]
    return _find(generations, "generations.parquet", "prompt_id", row["prompt_id"])


def _text(inputs: Inputs, row: Row) -> tuple[str, str]:
    """Prompt and response of the data, from the pairs."""
    wanted = row["response_id"]
    for asset, side in product({"preference_pairs", "margin_pairs"} & inputs.keys(), ("chosen", "rejected")):
        pairs = inputs[asset].file("pairs.parquet")
        for pair in pq.read_table(pairs, filters=[(f"{side}_id", "==", wanted)]).to_pylist():
            return pair["prompt"], pair[side]
    raise HelpsteerError(f"no pair has a response_id {wanted}")

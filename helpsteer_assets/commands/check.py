"""What `helpsteer check` reports: does this experiment make sense with this source, this model and this machine?

The source is read and paired as the assets would; of the model only its configuration and tokenizer are loaded, and
its size is counted without memory for its weights. Nothing is trained, and nothing is left behind but in the hub's
cache.
A section that cannot be looked at becomes a problem, and the others are reported all the same.
"""

import importlib.util
import json
import os
import tempfile
import textwrap
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpsteer_assets.assets.graph import partitions_of, stages
from helpsteer_assets.assets.model_card import role_in_words
from helpsteer_assets.assets.sources import described_model, fetch
from helpsteer_assets.assets.status import finished_folders, status, unfinished
from helpsteer_assets.commands.cost import Work, measure_machine, training_memory
from helpsteer_assets.commands.disk import BYTES, NEARLY_ALL, disk_need, in_words, shortage
from helpsteer_assets.commands.estimate import ASSUMED_GPU, estimate, measure_texts, total
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.ray_cluster import ask_nodes, judge, on_ray
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings, TrainingSettings, is_hub_id
from helpsteer_assets.files.durable import free_space, size_in_words
from helpsteer_assets.modpo.comparison.margin_adapter import judge_margin_adapter
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL
from helpsteer_assets.modpo.data.pairs import RATED, SPLITS, build_pairs, describe_pairs, select_evaluation_prompts
from helpsteer_assets.modpo.data.ratings import hash_share, read_ratings, rows_to_ratings
from helpsteer_assets.modpo.data.tables import Source, query
from helpsteer_assets.modpo.training.schedule import count_steps
from helpsteer_assets.store.artifacts import ALL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpsteer_assets.modpo.models.loading import ModelSize

_MEASURED_RESPONSES = 5000
"""Token lengths are measured on so many responses, chosen by their hash: enough for shares, and seconds to count."""
_WIDTH = 110
_MUCH_TRUNCATED = 0.2
_LITTLE_CONFLICT = 0.05
_MANY_BAD_ROWS = 0.05
_FEW_VALIDATION_PAIRS = 30
_SMALL_WEIGHT = 0.02
_TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
"""Package that each tracker of `run.report_to` needs."""


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    """What will make a run fail."""
    warnings: list[str] = field(default_factory=list)
    """What will make a result worse, slower or smaller than meant."""


@dataclass(frozen=True)
class _Pairs:
    """A file of pairs, and how many there are of each split."""

    file: Path
    counts: dict[str, int]


@dataclass(frozen=True)
class _Data:
    """What the source gives; None for what could not be made."""

    ratings: Path
    preference_pairs: _Pairs | None
    margin_pairs: _Pairs | None


@dataclass(frozen=True)
class _Lengths:
    """Tokens of texts, uncut."""

    responses: pa.Table
    """response_id, prompt_tokens, response_tokens of those that were measured."""
    asked: list[int]
    """Of each evaluation prompt."""


@dataclass(frozen=True)
class _Model:
    """What is known of the base model."""

    tokenizer: "PreTrainedTokenizerBase"
    size: "ModelSize"
    to_download: int
    """Bytes of weights that are not in the hub's cache yet."""


def report(experiment: Experiment, home: Path) -> Iterator[str]:
    """The lines of the report, as soon as each is known.

    Raises HelpsteerError after the last line where there are problems. Reads or downloads the source; of models on the
    hub only what describes them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield from _report(experiment, home, Path(scratch))


def _report(experiment: Experiment, home: Path, scratch: Path) -> Iterator[str]:
    findings = _Findings()
    yield f"experiment {experiment.name}" + (f": {experiment.description}" if experiment.description else "")
    yield f"home {home}"
    data = yield from _data(experiment, scratch, findings)
    if data is not None and (data.preference_pairs is not None or data.margin_pairs is not None):
        yield from _pairs(experiment, data, findings)
    yield from _weights(experiment, findings)
    model = yield from _model(experiment, findings)
    lengths = None
    if data is not None and model is not None:
        lengths = yield from _lengths(experiment, data, model.tokenizer, findings)
    yield from _training(experiment, data, findings)
    yield from _evaluation(experiment, data, findings)
    if on_ray():
        yield from _cluster(experiment, home, findings)
        yield from _disk(experiment, home, model, findings)
    else:
        yield from _machine(experiment, home, model, findings)
    if data is not None and model is not None and lengths is not None:
        yield from _estimate(experiment, data, model.size, lengths)
    for title, found in (("Warnings", findings.warnings), ("Problems", findings.problems)):
        if found:
            yield from ("", f"{title} ({len(found)})")
            for text in found:
                yield from _prose(text, "- ")
    yield ""
    if findings.problems:
        count = len(findings.problems)
        raise HelpsteerError(
            f"experiment {experiment.name} cannot run as it is: {count} problem{'' if count == 1 else 's'}"
        )
    yield f"No problems: {'the cluster can run it' if on_ray() else '`helpsteer run` can start'}."


def _data(experiment: Experiment, scratch: Path, findings: _Findings) -> Generator[str, None, _Data | None]:
    settings = experiment.data
    yield from _heading(f"Data: {settings.source}", settings.revision)
    options = settings.model_dump(
        include={"on_bad_rows", "validation_share", "max_train_prompts", "max_validation_prompts"}
    )
    ratings = scratch / "ratings.parquet"
    try:
        if settings.source == "embedded":
            read = rows_to_ratings(build_rows(), ratings, **options)
        else:
            read = read_ratings(fetch(experiment, "data"), ratings, **options)
    except HelpsteerError as error:
        findings.problems.append(str(error))
        yield "  cannot be used, see Problems"
        return None
    left_out = {split: read["limits"][split]["prompts"] for split in read["splits"]}
    yield from _columns(
        [
            ("split", "rows", "prompts", "prompts left out by the limit"),
            *((s, _number(n["rows"]), _number(n["prompts"]), _number(left_out[s])) for s, n in read["splits"].items()),
        ]
    )
    if read["validation_by_hash"]:
        yield f"  validation: chosen by a hash of the prompt (data.validation_share {settings.validation_share:g})"
    if removed := read["removed_from_validation"]["prompts"]:
        yield f"  {_number(removed)} prompts that stand in train too were removed from validation"
    if bad := read["bad_rows"]["count"]:
        yield f"  {_number(bad)} bad rows are dropped (data.on_bad_rows: drop), the first:"
        yield from (f"    {reason}" for reason in read["bad_rows"]["first"][:3])
        share = bad / sum(file["rows"] for file in read["files"])
        if share > _MANY_BAD_ROWS:
            findings.warnings.append(f"{share:.0%} of the source's rows are bad and dropped: is data.source meant?")
    made: dict[str, _Pairs] = {}
    wanted = {"preference_pairs": settings.preference_attribute}
    if experiment.has_margin_adapter:
        wanted["margin_pairs"] = settings.margin_attribute
    for name, attribute in wanted.items():
        try:
            file = scratch / f"{name}.parquet"
            made[name] = _Pairs(file, build_pairs(ratings, attribute, settings.selection_share, file))
        except HelpsteerError as error:
            findings.problems.append(str(error))
    return _Data(ratings, made.get("preference_pairs"), made.get("margin_pairs"))


def _pairs(experiment: Experiment, data: _Data, findings: _Findings) -> Iterator[str]:
    settings = experiment.data
    chosen = {settings.preference_attribute: "preference"}
    if experiment.has_margin_adapter:
        chosen[settings.margin_attribute] = "margin"
    yield from _heading("Pairs by attribute")
    counts = count_pairs(data.ratings, settings.selection_share)
    rows = [("", "", *SPLITS, "tied")]
    for attribute in RATED:
        role = chosen.get(attribute)
        name = f"{attribute} ({role})" if role else attribute
        rows.append(("*" if role else "", name, *map(_number, counts[attribute].values())))
    yield from _columns(rows, left=2)
    yield "  selection: train prompts held out to choose checkpoints; tied: rated equally, so no pair"
    if data.preference_pairs is not None:
        yield from _conflict(experiment, data, findings)
        if not data.preference_pairs.counts["selection"]:
            findings.warnings.append(
                "no preference pairs are held out to choose a checkpoint by, so the last one is kept; raise "
                "data.selection_share or give more prompts"
            )
    if data.margin_pairs is not None:
        validation = data.margin_pairs.counts["validation"]
        if not validation:
            findings.problems += judge_margin_adapter({"n": 0}, experiment.checks.margin_adapter_min_accuracy)
        elif validation < _FEW_VALIDATION_PAIRS:
            findings.warnings.append(
                f"only {validation} validation pairs judge the margin adapter, so a good one may fail its check by "
                "chance; raise data.max_validation_prompts or data.validation_share, or give more validation rows"
            )


def count_pairs(ratings: Source, selection_share: float) -> dict[str, dict[str, int]]:
    """By attribute: the pairs that `build_pairs` would make in each of SPLITS, and the `tied` ones that make none.

    One query for all attributes: making all those pairs only to count them would take most of the report's time.
    """
    counted = ", ".join(
        f"count(DISTINCT one_id || two_id) FILTER (one_{name} > two_{name}) AS {name}, "
        f"coalesce(sum(rows) FILTER (one_{name} = two_{name} AND one_id < two_id), 0)::BIGINT AS {name}_tied"
        for name in RATED
    )
    rated = ", ".join(f"{side}.{name} AS {side}_{name}" for side in ("one", "two") for name in RATED)
    rows = query(
        f"""
        WITH responses AS (
            SELECT prompt_id, response_id, {", ".join(ATTRIBUTES)}, {" + ".join(ATTRIBUTES)} AS {OVERALL}, CASE
                WHEN split = 'train' AND {hash_share("selection", "prompt_id")} < $selection_share THEN 'selection'
                ELSE split END AS part, count(*) AS rows
            FROM ratings GROUP BY ALL
        ), twos AS (
            SELECT part, one.response_id AS one_id, two.response_id AS two_id, one.rows * two.rows AS rows, {rated}
            FROM responses AS one JOIN responses AS two USING (part, prompt_id)
            WHERE one.response_id <> two.response_id
        )
        SELECT part, {counted} FROM twos GROUP BY part
        """,
        {"selection_share": selection_share},
        ratings=ratings,
    ).to_pylist()
    by_part = {row["part"]: row for row in rows}
    return {
        name: {part: by_part.get(part, {}).get(name, 0) for part in SPLITS}
        | {"tied": sum(row[f"{name}_tied"] for row in rows)}
        for name in RATED
    }


def _conflict(experiment: Experiment, data: _Data, findings: _Findings) -> Iterator[str]:
    """In how many preference pairs the two objectives pull apart."""
    preference, margin = experiment.data.preference_attribute, experiment.data.margin_attribute
    described = describe_pairs(data.preference_pairs.file, data.ratings, preference, margin)
    if experiment.has_margin_adapter:
        shares = described["other"]
        yield from _prose(
            f"In the {preference} pairs, {margin} agrees (the chosen response is rated higher on it too) in "
            f"{shares['agrees']:.1%}, opposes in {shares['opposes']:.1%} and ties in {shares['ties']:.1%}."
        )
        cost = experiment.objective.margin_role == "cost"
        conflict = shares["agrees" if cost else "opposes"]
        yield from _prose(
            f"The role `{experiment.objective.margin_role}` {'penalizes' if cost else 'encourages'} {margin}: the "
            f"{'agreeing' if cost else 'opposing'} pairs ({conflict:.1%}) are the conflict that w decides."
        )
    else:
        conflict = described["chosen_longer"]
        yield from _prose(
            f"In {conflict:.1%} of the {preference} pairs the chosen response has more words: under the length "
            "penalty these are the conflict that w decides."
        )
    if conflict < _LITTLE_CONFLICT:
        findings.warnings.append(
            f"the two objectives conflict in {conflict:.1%} of the pairs only: expect w to change little"
        )


def _weights(experiment: Experiment, findings: _Findings) -> Iterator[str]:
    objective = experiment.objective
    yield from _heading("Weights")
    yield from (f"  {role_in_words(experiment, w)}" for w in objective.weights)
    scale = f"margin_beta {objective.margin_beta}" if experiment.has_margin_adapter else f"penalty {objective.penalty}"
    yield f"  beta {objective.beta}, {scale}"
    if small := [w for w in objective.weights if float(w) < _SMALL_WEIGHT]:
        factor = 1 / min(map(float, small))
        findings.warnings.append(
            f"objective.weights: at w={', '.join(small)} the loss and its gradients are multiplied by 1/w, up to "
            f"{factor:g}: every step is cut to max_grad_norm, and a training breaks more easily; 0.1 already puts nine "
            "tenths on the margin. If it breaks, lower modpo.learning_rate or leave these weights out"
        )
    if objective.margin_role == "cost" and experiment.data.margin_attribute == "verbosity":
        yield from _prose(
            "Note: HelpSteer's verbosity is the amount of detail relative to what is asked, and higher is better; as a "
            "cost it pushes away from what HelpSteer calls better. If you only want shorter answers, take "
            "`objective.margin: length_penalty`, which needs no margin adapter."
        )


def _model(experiment: Experiment, findings: _Findings) -> Generator[str, None, _Model | None]:
    settings = experiment.model
    yield from _heading(f"Model: {settings.base}", settings.revision)
    try:
        model, context = _look_at_model(experiment, described_model(experiment, "model"), findings)
    except HelpsteerError as error:
        findings.problems.append(str(error))
        yield "  cannot be used, see Problems"
        return None
    yield (
        f"  {_number(model.size.parameters)} parameters, "
        f"{size_in_words(model.size.parameters * BYTES[settings.precision])} in {settings.precision}; context "
        f"{'not stated' if context is None else f'{_number(context)} tokens'}"
    )
    share = model.size.adapter_parameters / model.size.parameters
    yield f"  LoRA r={experiment.lora.r}: {_number(model.size.adapter_parameters)} trained parameters ({share:.2%})"
    from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE

    own = model.tokenizer.chat_template
    yield f"  prompts are written in {'its own chat template' if own else repr(FALLBACK_TEMPLATE)}"
    return model


def _look_at_model(experiment: Experiment, folder: Path, findings: _Findings) -> tuple[_Model, int | None]:
    """What is known of the model, and the length of its context."""
    from helpsteer_assets.modpo.models.loading import (
        check_lengths,
        check_vocabulary,
        context_length,
        load_tokenizer,
        model_size,
        require_safetensors,
    )

    settings = experiment.model
    trust = settings.trust_remote_code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between transformers and PEFT
        size = model_size(folder, experiment.lora, trust_remote_code=trust)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    context = context_length(folder, trust_remote_code=trust)
    downloaded = not is_hub_id(settings.base) or any(folder.glob("*.safetensors"))
    checks = [
        *(partial(check_lengths, settings, folder, needed, key) for key, needed in needed_lengths(experiment).items()),
        partial(check_vocabulary, tokenizer, size.embeddings),
        *([partial(require_safetensors, folder)] if downloaded else []),
    ]
    for check in checks:
        try:
            check()
        except HelpsteerError as error:
            findings.problems.append(str(error))
    to_download = 0 if downloaded else size.parameters * BYTES[settings.precision]
    return _Model(tokenizer, size, to_download), context


def needed_lengths(experiment: Experiment) -> dict[str, int]:
    """Tokens of context that the settings ask of the model, by key."""
    generation = experiment.generation
    return {
        "model.max_length": experiment.model.max_length,
        "generation.max_prompt_length + max_new_tokens": generation.max_prompt_length + generation.max_new_tokens,
    }


def _lengths(
    experiment: Experiment, data: _Data, tokenizer: "PreTrainedTokenizerBase", findings: _Findings
) -> Generator[str, None, _Lengths]:
    from transformers.utils import logging as transformers_logging

    from helpsteer_assets.modpo.models.tokenization import count_response_tokens, encode_prompts

    transformers_logging.set_verbosity_error()  # it warns of texts longer than the context, which are cut
    model, generation = experiment.model, experiment.generation
    responses = query(
        f"""
        WITH measured AS (SELECT DISTINCT response_id FROM ratings ORDER BY response_id LIMIT {_MEASURED_RESPONSES})
        SELECT prompt_id, response_id, any_value(prompt) AS prompt, any_value(response) AS response
        FROM ratings JOIN measured USING (response_id) GROUP BY prompt_id, response_id ORDER BY response_id
        """,
        ratings=data.ratings,
    )
    total = query("SELECT count(DISTINCT response_id) AS total FROM ratings", ratings=data.ratings)["total"][0].as_py()
    asked = _evaluation_prompts(experiment, data)
    texts = dict(zip(responses["prompt_id"].to_pylist(), responses["prompt"].to_pylist(), strict=True))
    unlimited = 2**31

    def prompt_tokens(prompts: list[str]) -> list[int]:
        return [len(ids) for ids, _ in encode_prompts(tokenizer, prompts, unlimited)]

    of_prompt = dict(zip(texts, prompt_tokens(list(texts.values())), strict=True))
    counted = count_response_tokens(tokenizer, responses)
    ids = zip(responses["prompt_id"].to_pylist(), responses["response_id"].to_pylist(), strict=True)
    prompts = np.array(list(of_prompt.values()))
    lengths = np.array([(of_prompt[prompt_id], counted[response_id]) for prompt_id, response_id in ids])
    cut_prompt = float(np.mean(prompts > model.max_prompt_length))
    room = model.max_length - np.minimum(lengths[:, 0], model.max_prompt_length)
    cut_response = float(np.mean(lengths[:, 1] > room))
    of = f", measured on {_number(len(responses))} of {_number(total)} responses" if len(responses) < total else ""
    yield from _heading(f"Lengths in tokens{of}")
    rows = [("", "median", "95%", "longest", "limit", "over it")]
    rows.append(("prompts", *_quantiles(prompts), f"max_prompt_length {model.max_prompt_length}", f"{cut_prompt:.1%}"))
    rows.append(("responses", *_quantiles(lengths[:, 1]), "what is left", f"{cut_response:.1%}"))
    both = float(np.mean(lengths.sum(axis=1) > model.max_length))
    rows.append(("together", *_quantiles(lengths.sum(axis=1)), f"max_length {model.max_length}", f"{both:.1%}"))
    evaluated = np.array([] if asked is None else prompt_tokens(asked["prompt"].to_pylist()))
    if asked is not None:
        cut = float(np.mean(evaluated > generation.max_prompt_length))
        limit = f"generation.max_prompt_length {generation.max_prompt_length}"
        rows.append(("evaluation prompts", *_quantiles(evaluated), limit, f"{cut:.1%}"))
        if cut > _MUCH_TRUNCATED:
            findings.warnings.append(
                f"{cut:.0%} of the evaluation prompts lose their beginning; raise generation.max_prompt_length"
            )
    yield from _columns(rows)
    yield "  What is over it is cut: a prompt keeps its last tokens, a response its first."
    if cut_prompt > _MUCH_TRUNCATED:
        findings.warnings.append(f"{cut_prompt:.0%} of the prompts lose their beginning; raise model.max_prompt_length")
    if cut_response > _MUCH_TRUNCATED:
        findings.warnings.append(
            f"{cut_response:.0%} of the responses are cut, the longest ones: raise model.max_length, or lower "
            "model.max_prompt_length"
        )
    measured = {"prompt_tokens": lengths[:, 0], "response_tokens": lengths[:, 1]}
    return _Lengths(pa.table({"response_id": responses["response_id"], **measured}), evaluated.tolist())


def _training(experiment: Experiment, data: _Data | None, findings: _Findings) -> Iterator[str]:
    preference = None if data is None else _train_rows(data.preference_pairs)
    margin = None if data is None else _train_rows(data.margin_pairs)
    stages: list[tuple[str, TrainingSettings, str, int | None, int]] = []
    if experiment.sft.enabled:
        responses = None if preference is None else len(pc.unique(preference["chosen_id"]))
        stages.append(("sft_model", experiment.sft, "responses", responses, 1))
    if experiment.has_margin_adapter and experiment.margin_adapter is not None:
        pairs = None if margin is None else margin.num_rows
        stages.append(("margin_adapter", experiment.margin_adapter, "pairs", pairs, 1))
    pairs = None if preference is None else preference.num_rows
    stages.append(("modpo_models", experiment.modpo, "pairs", pairs, len(experiment.objective.weights)))
    yield from _heading("Training")
    rows = [("", "optimizer steps", "each on", "of", "passes")]
    total: int | None = 0
    for name, settings, unit, items, times in stages:
        per_step = settings.batch_size * settings.accumulation
        steps = count_steps(settings, items) if items is not None or settings.steps is not None else None
        total = None if steps is None or total is None else total + times * steps
        shown = "unknown" if steps is None else _number(steps)
        rows.append(
            (
                name,
                shown if times == 1 else f"{times} x {shown}",
                f"{per_step} {unit}",
                "" if items is None else _number(items),
                "" if items is None or steps is None else f"{steps * per_step / items:.2f}",
            )
        )
    yield from _columns(rows)
    if not experiment.sft.enabled:
        yield "  sft.enabled is false: the base model itself is the reference policy"
    if total is not None:
        yield f"  {_number(total)} optimizer steps in all"
    for tracker in experiment.run.report_to:
        if tracker not in _TRACKERS:
            findings.problems.append(f"run.report_to: {tracker!r} is not known; known are {', '.join(_TRACKERS)}")
        elif importlib.util.find_spec(_TRACKERS[tracker]) is None:
            findings.problems.append(
                f"run.report_to: {tracker} is not installed: pip install {_TRACKERS[tracker]}, or remove it"
            )


def _train_rows(pairs: _Pairs | None) -> pa.Table | None:
    """`chosen_id` of the train pairs."""
    return None if pairs is None else query("SELECT chosen_id FROM pairs WHERE split = 'train'", pairs=pairs.file)


def _evaluation(experiment: Experiment, data: _Data | None, findings: _Findings) -> Iterator[str]:
    settings, policies = experiment.evaluation, len(experiment.objective.weights) + 1
    yield from _heading("Evaluation")
    if data is not None:
        prompts = _evaluation_prompts(experiment, data)
        if prompts is None:
            findings.problems.append(
                "there are no validation prompts to evaluate on: add a validation file to data.source, give more "
                "prompts, or raise data.validation_share"
            )
        else:
            count = prompts.num_rows
            yield (
                f"  {_number(count)} held-out prompts ({_number(settings.prompts)} asked for), {policies} policies: "
                f"{_number(count * policies)} responses of up to {_number(experiment.generation.max_new_tokens)} tokens"
            )
            if samples := settings.kl_samples:
                drawn = count * samples * (policies - 1)
                yield f"  KL divergence to SFT: {samples} per prompt and weight, {_number(drawn)} responses more"
            if count < settings.prompts:
                findings.warnings.append(
                    f"evaluation.prompts asks for {settings.prompts} and {count} held-out prompts are there: intervals "
                    "will be wider"
                )
    if not isinstance(settings.rater, RewardModelSettings):
        yield f"  rater: {settings.rater}"
        if settings.rater == "none":
            yield "  preference quality stays unmeasured: the trade-off is the margin against the distance from SFT"
        return
    heads = ", ".join(settings.rater.heads)
    yield f"  rater: {settings.rater.model} rates {heads}"
    try:
        _look_at_rater(settings.rater, described_model(experiment, "rater"))
    except HelpsteerError as error:
        findings.problems.append(str(error))


def _look_at_rater(settings: RewardModelSettings, folder: Path) -> None:
    from helpsteer_assets.modpo.models.loading import require_safetensors, require_whole_model

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own_code = "auto_map" in config
        context = (config.get("text_config") or config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise HelpsteerError(
            f"evaluation.rater.model: {settings.model} has no readable config.json: {error}"
        ) from error
    if own_code and not settings.trust_remote_code:
        raise HelpsteerError(
            f"evaluation.rater.model: {settings.model} comes with modelling code of its own, which this machine would "
            "run; read it, then set evaluation.rater.trust_remote_code: true"
        )
    if isinstance(context, int) and settings.max_length > context:
        raise HelpsteerError(
            f"evaluation.rater.max_length is {settings.max_length}, and {settings.model} reads {context} tokens; set "
            f"it to {context} or less"
        )
    require_whole_model(folder)
    if not is_hub_id(settings.model):
        require_safetensors(folder)


def _evaluation_prompts(experiment: Experiment, data: _Data) -> pa.Table | None:
    try:
        return select_evaluation_prompts(data.ratings, experiment.evaluation.prompts)
    except HelpsteerError:
        return None


def _machine(experiment: Experiment, home: Path, model: _Model | None, findings: _Findings) -> Iterator[str]:
    import torch

    from helpsteer_assets.modpo.models.loading import choose_device
    from helpsteer_assets.modpo.training.launch import require_devices

    precision = experiment.model.precision
    yield from _heading("Machine")
    try:
        device = choose_device(experiment.run, precision)
        require_devices(experiment.run, device)
    except HelpsteerError as error:
        findings.problems.append(str(error))
        yield "  device: see Problems"
    else:
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
            yield f"  device: cuda, {torch.cuda.get_device_name()} with {size_in_words(memory)}; precision {precision}"
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            yield (
                f"  device: cpu, {os.cpu_count()} cores with {size_in_words(memory)}, torch threads "
                f"{torch.get_num_threads()}; precision {precision}"
            )
            if precision == "bf16":
                findings.warnings.append(
                    "model.precision is bf16 and there is no CUDA device here: it runs on the CPU, no faster than fp32"
                )
        if experiment.run.train_processes > 1:
            yield f"  training: in {experiment.run.train_processes} processes"
        weights = 0 if model is None else model.size.parameters * BYTES[precision]
        if weights > memory * NEARLY_ALL:
            findings.warnings.append(
                f"the model takes {size_in_words(weights)} in {precision}, and {device.type} has "
                f"{size_in_words(memory)}: it will hardly fit; choose a smaller base model or a larger machine"
            )
    if experiment.generation.engine == "vllm":
        from helpsteer_assets.modpo.generation.vllm import require_vllm

        try:
            require_vllm(precision, experiment.lora.r)
        except HelpsteerError as error:
            findings.problems.append(str(error))
    yield from _disk(experiment, home, model, findings)


def _cluster(experiment: Experiment, home: Path, findings: _Findings) -> Iterator[str]:
    yield from _heading("Cluster")
    try:
        address, nodes = ask_nodes(home)
    except HelpsteerError as error:
        findings.problems.append(str(error))
        yield "  cannot be asked, see Problems"
        return
    yield f"  Ray at {address}"
    rows = [(node.name, f"{node.cpus:g}", f"{node.gpus:g}") for node in nodes]
    yield from _columns([("node", "CPUs", "GPUs"), *rows])
    dagster_home = Path(os.environ.get("DAGSTER_HOME") or home / "dagster" / experiment.name)
    problems, warnings = judge(nodes, experiment.run, home, dagster_home)
    findings.problems += problems
    findings.warnings += warnings


def _disk(experiment: Experiment, home: Path, model: _Model | None, findings: _Findings) -> Iterator[str]:
    existing, free = free_space(home)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        findings.problems.append(f"home {home} cannot be written to; set HELPSTEER_HOME to a folder that can")
        return
    to_make = [(stage.name, p) for stage in stages(experiment).values() for p in partitions_of(stage, experiment)]
    made: dict[str, Path] = {}
    if home.exists():
        try:
            found = status(experiment, home)
        except HelpsteerError:
            return  # a source is not there, which is among the problems already
        to_make, made = unfinished(found), finished_folders(found)
    need = disk_need(experiment, to_make, made, home, None if model is None else model.size)
    yield from _prose(in_words(need, home))
    if model is not None and model.to_download and ("sft_model", ALL) in to_make:
        yield from _hub_cache(model.to_download, findings)
    if problem := shortage(need, home):
        findings.problems.append(problem)
    elif need.bytes > free * NEARLY_ALL:
        findings.warnings.append(
            f"about {size_in_words(need.bytes)} of the {size_in_words(free)} free in {existing} will be written"
        )


def _estimate(experiment: Experiment, data: _Data, size: "ModelSize", lengths: _Lengths) -> Iterator[str]:
    """What the stages that compute with the model will cost, on this machine and on a GPU."""
    from helpsteer_assets.modpo.models.loading import batch_tokens, choose_device

    margin = data.margin_pairs if experiment.has_margin_adapter else None
    if data.preference_pairs is None or (experiment.has_margin_adapter and margin is None):
        return
    precision = experiment.model.precision
    try:
        device = choose_device(experiment.run, precision)
    except HelpsteerError:
        return  # among the problems already
    texts = measure_texts(
        experiment, data.preference_pairs.file, margin and margin.file, lengths.responses, lengths.asked
    )
    tokens = batch_tokens(experiment.run, device)
    works = estimate(experiment, size, texts, tokens)
    machine = measure_machine(device.type, precision)
    clock = "GPU time" if device.type == "cuda" else "CPU time"
    yield from _heading("Estimate")
    rows = [("", "TFLOP", clock)]

    def row(name: str, work: Work) -> tuple[str, ...]:
        return (name, f"{work.flops / 1e12:,.3g}", _duration(work.seconds(machine)))

    graph = stages(experiment)
    rows += [row(name, work) for name, work in works.items() if not graph[name].partitioned]
    rows += [row(f"each w: {name}", work) for name, work in works.items() if graph[name].partitioned]
    everything, shared, one = (total(experiment, works, weights=n) for n in (None, 0, 1))
    weights = len(experiment.objective.weights)
    rows.append(row("once for all weights", shared))
    rows.append(row("each w", one + shared * -1))
    rows.append(row(f"all of {weights} weight{'' if weights == 1 else 's'}", everything))
    yield from _columns(rows)
    memory = training_memory(
        size, tokens=tokens, bytes_each=BYTES[precision], checkpointing=experiment.modpo.gradient_checkpointing
    )
    yield f"  memory of a policy's training, at its peak: about {size_in_words(round(memory))}"
    where = "here, just now" if device.type == "cuda" else "here, just now, on one thread"
    yield from _prose(
        f"At {machine.rate:.2g} FLOP/s in large {precision} products and {machine.bandwidth:.2g} bytes/s of memory, as "
        f"measured {where}. On one GPU of {ASSUMED_GPU.rate:.2g} FLOP/s and {ASSUMED_GPU.bandwidth:.2g} bytes/s, which "
        f"is assumed and not measured, all of it would take {_duration(everything.seconds(ASSUMED_GPU))}."
    )
    yield from _prose(
        f"Answers are taken to be as long as the source's responses, {np.mean(texts.answers):.0f} tokens on average. "
        "Left out are reading the data, the rater, statistics, report, and early stopping. Runs of three models took "
        "1.25 to 1.4 times as long in all, and answers up to 2.7 times (docs/scaling.md)."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _hub_cache(size: int, findings: _Findings) -> Iterator[str]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    _, free = free_space(cache)
    yield from _prose(
        f"download: weights of about {size_in_words(size)} to the hub cache {cache}; {size_in_words(free)} free there"
    )
    if size > free:
        findings.problems.append(
            f"the model's weights (about {size_in_words(size)}) do not fit into the hub cache {cache}, which has "
            f"{size_in_words(free)} free; point HF_HOME at a larger disk"
        )


def _heading(title: str, revision: str | None = None) -> Iterator[str]:
    yield from ("", title if revision is None else f"{title} at {revision[:12]}")


def _columns(rows: list[tuple[str, ...]], left: int = 1) -> Iterator[str]:
    """Rows as text in columns, the first `left` of them aligned to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _quantiles(lengths: np.ndarray) -> list[str]:
    """Median, 95% quantile and maximum."""
    return [_number(int(value)) for value in np.quantile(lengths, (0.5, 0.95, 1.0), method="higher")]


def _prose(text: str, bullet: str = "") -> Iterator[str]:
    """Text folded to a terminal's width; its own line breaks stay."""
    first, rest = f"  {bullet}", f"  {' ' * len(bullet)}"
    for line in text.split("\n"):
        yield from textwrap.wrap(
            line, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )
        first = rest


def _number(value: int) -> str:
    return f"{value:,}"

"""The report of `helpsteer check`: does this experiment fit its source, its model and this machine?

The source is read and paired as the assets do it. Only the configuration and the tokenizer of the model are loaded, and
its size is counted without memory for its weights. Nothing is trained, and only the hub's cache keeps what was fetched.
A section that fails becomes a problem, and the others are reported all the same.
"""

import importlib.util
import json
import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpsteer_assets.assets.graph import partitions_of, stages
from helpsteer_assets.assets.model_card import role_in_words
from helpsteer_assets.assets.sources import described_model, fetch
from helpsteer_assets.assets.status import finished_folders, status, unfinished
from helpsteer_assets.commands.console import table_lines
from helpsteer_assets.commands.disk import BYTES, NEARLY_ALL, disk_need, in_words, shortage
from helpsteer_assets.commands.estimate import Pairs, estimate, measured_rates, product_rate
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.ray_cluster import ask_nodes, judge, on_ray
from helpsteer_assets.experiment.settings import Experiment, RewardModelSettings, TrainingSettings, is_hub_id
from helpsteer_assets.files.durable import free_space, size_in_words
from helpsteer_assets.modpo.comparison.margin_adapter import judge_margin_adapter
from helpsteer_assets.modpo.data.pairs import (
    RATED,
    SPLITS,
    build_pairs,
    count_pairs,
    count_texts,
    describe_pairs,
    select_evaluation_prompts,
)
from helpsteer_assets.modpo.data.ratings import read_ratings, rows_to_ratings
from helpsteer_assets.modpo.data.tables import query
from helpsteer_assets.modpo.settings import Compute, Lora, Training
from helpsteer_assets.modpo.training.schedule import count_steps
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.home import Home

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from helpsteer_assets.modpo.models.loading import ModelSize

_MEASURED_RESPONSES = 5000
"""Token lengths are measured on so many responses, chosen by their hash."""
_WIDTH = 110
_MUCH_TRUNCATED = 0.2
_LITTLE_CONFLICT = 0.05
_MANY_BAD_ROWS = 0.05
_FEW_VALIDATION_PAIRS = 30
_SMALL_WEIGHT = 0.02
_TRACKERS = ("wandb", "tensorboard", "trackio")
"""Trackers of `run.report_to`; each needs the package of its name."""


def report(experiment: Experiment, home: Home) -> Iterator[str]:
    """The lines of the report, each as soon as it is known.

    Reads or downloads the source; from the hub's models it fetches configuration and tokenizer only. Raises
    HelpsteerError after the last line where there are problems.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = _Check(experiment, home, Path(scratch))
        yield f"experiment {experiment.name}" + (f": {experiment.description}" if experiment.description else "")
        yield f"home {home}"
        for section in (
            found.data,
            found.pairs,
            found.weights,
            found.model,
            found.lengths,
            found.training,
            found.evaluation,
            found.cluster if on_ray() else found.machine,
            found.disk,
            found.estimate,
        ):
            yield from section()
    for title, texts in (("Warnings", found.warnings), ("Problems", found.problems)):
        if texts:
            yield from _heading(f"{title} ({len(texts)})")
            for text in texts:
                yield from _prose(text, "- ")
    yield ""
    if count := len(found.problems):
        raise HelpsteerError(
            f"experiment {experiment.name} cannot run as it is: {count} problem{'' if count == 1 else 's'}"
        )
    yield f"No problems: {'the cluster can run it' if on_ray() else '`helpsteer run` can start'}."


def needed_lengths(experiment: Experiment) -> dict[str, int]:
    """Tokens of context that the settings ask of the model, by key."""
    generation = experiment.generation
    return {
        "model.max_length": experiment.model.max_length,
        "generation.max_prompt_length + max_new_tokens": generation.max_prompt_length + generation.max_new_tokens,
    }


class _Check:
    """The sections of the report, in their order: each yields lines, and leaves what it learnt to those below it."""

    def __init__(self, experiment: Experiment, home: Home, scratch: Path) -> None:
        self.experiment = experiment
        self.home = home
        self.scratch = scratch
        self.problems: list[str] = []
        """These make a run fail."""
        self.warnings: list[str] = []
        """These make a result worse, slower or smaller than intended."""
        # None stands for what the source or the model does not give.
        self.ratings: Path | None = None
        self.preference: Pairs | None = None
        self.margin: Pairs | None = None
        self.prompts: list[str] | None = None
        """Texts of the evaluation prompts."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.size: ModelSize | None = None
        self.to_download = 0
        """Bytes of the model's weights that are not in the hub's cache yet."""
        self.read: tuple[np.ndarray, np.ndarray] | None = None
        """Tokens, uncut: (prompt, response) of the measured responses, [responses, 2]; each evaluation prompt."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Make a HelpsteerError a problem, and go on after the block."""
        try:
            yield
        except HelpsteerError as error:
            self.problems.append(str(error))

    def data(self) -> Iterator[str]:
        settings = self.experiment.data
        yield from _heading(f"Data: {settings.source}", settings.revision)
        options = settings.model_dump(
            include={"on_bad_rows", "validation_share", "max_train_prompts", "max_validation_prompts"}
        )
        ratings, read = self.scratch / "ratings.parquet", None
        with self.collecting():
            if settings.source == "embedded":
                read = rows_to_ratings(build_rows(), ratings, **options)
            else:
                read = read_ratings(fetch(self.experiment, "data"), ratings, **options)
        if read is None:
            yield "  cannot be used, see Problems"
            return
        self.ratings = ratings
        yield from _table(
            ("split", "rows", "prompts", "prompts left out by the limit"),
            ((s, n["rows"], n["prompts"], read["limits"][s]["prompts"]) for s, n in read["splits"].items()),
        )
        if read["validation_by_hash"]:
            yield f"  validation: chosen by a hash of the prompt (data.validation_share {settings.validation_share:g})"
        if removed := read["removed_from_validation"]["prompts"]:
            yield f"  {removed:,} prompts that stand in train too were removed from validation"
        if bad := read["bad_rows"]["count"]:
            yield f"  {bad:,} bad rows are dropped (data.on_bad_rows: drop), the first:"
            yield from (f"    {reason}" for reason in read["bad_rows"]["first"][:3])
            share = bad / sum(file["rows"] for file in read["files"])
            if share > _MANY_BAD_ROWS:
                self.warnings.append(f"{share:.0%} of the source's rows are bad and dropped: is data.source meant?")
        with self.collecting():
            self.preference = self._build(settings.preference_attribute, "preference", ratings)
        with self.collecting():
            if self.experiment.has_margin_adapter:
                self.margin = self._build(settings.margin_attribute, "margin", ratings)
        with self.collecting():
            prompts = select_evaluation_prompts(ratings, self.experiment.evaluation.prompts)
            self.prompts = prompts["prompt"].to_pylist()

    def _build(self, attribute: str, name: str, ratings: Path) -> Pairs:
        file = self.scratch / f"{name}.parquet"
        return Pairs(file, build_pairs(ratings, attribute, self.experiment.data.selection_share, file))

    def pairs(self) -> Iterator[str]:
        settings = self.experiment.data
        if self.ratings is None or (self.preference is None and self.margin is None):
            return
        chosen = {settings.preference_attribute: "preference"}
        if self.experiment.has_margin_adapter:
            chosen[settings.margin_attribute] = "margin"
        yield from _heading("Pairs by attribute")
        counts = count_pairs(self.ratings, settings.selection_share)
        roles = {name: f" ({chosen[name]})" if name in chosen else "" for name in RATED}
        yield from _table(
            ("", "attribute", *SPLITS, "tied"),
            (("*" if roles[name] else "", name + roles[name], *counts[name].values()) for name in RATED),
            left=2,
        )
        yield "  selection: train prompts held out to choose checkpoints; tied: equal ratings, so no pair"
        if self.preference is not None:
            preference, margin = settings.preference_attribute, settings.margin_attribute
            described = describe_pairs(self.preference.file, self.ratings, preference, margin)
            conflict, sentences = self.experiment.margin.conflict(preference, described)
            for sentence in sentences:
                yield from _prose(sentence)
            if conflict < _LITTLE_CONFLICT:
                self.warnings.append(
                    f"the two objectives conflict in {conflict:.1%} of the pairs only: expect w to change little"
                )
            if not self.preference.counts["selection"]:
                self.warnings.append(
                    "no preference pairs are held out to choose a checkpoint by, so the last one is kept; raise "
                    "data.selection_share or give more prompts"
                )
        if self.margin is not None:
            validation = self.margin.counts["validation"]
            if not validation:
                self.problems += judge_margin_adapter({"n": 0}, self.experiment.checks.margin_adapter_min_accuracy)
            elif validation < _FEW_VALIDATION_PAIRS:
                self.warnings.append(
                    f"only {validation} validation pairs judge the margin adapter, so a good one may fail its check "
                    "by chance; raise data.max_validation_prompts or data.validation_share, or give more validation "
                    "rows"
                )

    def weights(self) -> Iterator[str]:
        objective = self.experiment.objective
        yield from _heading("Weights")
        yield from (f"  {role_in_words(self.experiment, w)}" for w in objective.weights)
        yield f"  beta {objective.beta}, {self.experiment.margin.scale}"
        if small := [w for w in objective.weights if float(w) < _SMALL_WEIGHT]:
            factor = 1 / min(map(float, small))
            self.warnings.append(
                f"objective.weights: at w={', '.join(small)} the loss and its gradients are multiplied by 1/w, up to "
                f"{factor:g}: every step is cut to max_grad_norm, and a training breaks more easily; 0.1 already puts "
                "nine tenths on the margin. If it breaks, lower modpo.learning_rate or leave these weights out"
            )
        if objective.margin_role == "cost" and self.experiment.data.margin_attribute == "verbosity":
            yield from _prose(
                "Note: HelpSteer's verbosity is the amount of detail relative to what is asked, and higher is better; "
                "as a cost it pushes away from what HelpSteer calls better. If you only want shorter answers, take "
                "`objective.margin: length_penalty`, which needs no margin adapter."
            )

    def model(self) -> Iterator[str]:
        from helpsteer_assets.modpo.models import loading
        from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE

        settings, lora = self.experiment.model, self.experiment.lora
        trust = settings.trust_remote_code
        yield from _heading(f"Model: {settings.base}", settings.revision)
        with self.collecting():
            folder = described_model(self.experiment, "model")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # between transformers and PEFT
                size = loading.model_size(folder, lora.plain(Lora), trust_remote_code=trust)
            self.tokenizer = loading.load_tokenizer(folder, trust_remote_code=trust)
            context = loading.context_length(folder, trust_remote_code=trust)
            self.size = size
        if self.size is None or self.tokenizer is None:
            yield "  cannot be used, see Problems"
            return
        for key, needed in needed_lengths(self.experiment).items():
            with self.collecting():
                loading.check_lengths(folder, needed, key, base=settings.base, trust_remote_code=trust)
        with self.collecting():
            loading.check_vocabulary(self.tokenizer, size.embeddings)
        bytes_in_all = size.parameters * BYTES[settings.precision]
        if is_hub_id(settings.base) and not any(folder.glob("*.safetensors")):
            self.to_download = bytes_in_all
        else:
            with self.collecting():
                loading.require_safetensors(folder)
        yield (
            f"  {size.parameters:,} parameters, {size_in_words(bytes_in_all)} in {settings.precision}; context "
            f"{'not stated' if context is None else f'{context:,} tokens'}"
        )
        share = size.adapter_parameters / size.parameters
        yield f"  LoRA r={lora.r}: {size.adapter_parameters:,} trained parameters ({share:.2%})"
        own = self.tokenizer.chat_template
        yield f"  prompts are written in {'its own chat template' if own else repr(FALLBACK_TEMPLATE)}"

    def lengths(self) -> Iterator[str]:
        if self.ratings is None or self.tokenizer is None:
            return
        from transformers.utils import logging as transformers_logging

        from helpsteer_assets.modpo.models.tokenization import count_response_tokens, encode_prompts

        transformers_logging.set_verbosity_error()  # it warns of texts longer than the context, which are cut
        tokenizer, model, generation = self.tokenizer, self.experiment.model, self.experiment.generation
        responses = query(
            f"""
            WITH measured AS (
                SELECT DISTINCT response_id FROM ratings ORDER BY response_id LIMIT {_MEASURED_RESPONSES}
            )
            SELECT prompt_id, response_id, any_value(prompt) AS prompt, any_value(response) AS response
            FROM ratings JOIN measured USING (response_id) GROUP BY prompt_id, response_id ORDER BY response_id
            """,
            ratings=self.ratings,
        )
        counting = "SELECT count(DISTINCT response_id) AS total FROM ratings"
        total = query(counting, ratings=self.ratings)["total"][0].as_py()

        def prompt_tokens(prompts: Iterable[str]) -> list[int]:
            return [len(ids) for ids, _ in encode_prompts(tokenizer, list(prompts), 2**31)]

        prompt_ids = responses["prompt_id"].to_pylist()
        texts = dict(zip(prompt_ids, responses["prompt"].to_pylist(), strict=True))
        tokens_of = dict(zip(texts, prompt_tokens(texts.values()), strict=True))
        counted = count_response_tokens(tokenizer, responses)
        ids = zip(prompt_ids, responses["response_id"].to_pylist(), strict=True)
        prompts = np.array(list(tokens_of.values()))
        lengths = np.array([(tokens_of[prompt_id], counted[response_id]) for prompt_id, response_id in ids])
        asked = np.array(prompt_tokens(self.prompts or []))
        self.read = lengths, asked
        room = model.max_length - np.minimum(lengths[:, 0], model.max_prompt_length)
        asked_limit = generation.max_prompt_length
        measured = (
            ("prompts", prompts, f"max_prompt_length {model.max_prompt_length}", prompts > model.max_prompt_length),
            ("responses", lengths[:, 1], "what is left", lengths[:, 1] > room),
            ("together", lengths.sum(1), f"max_length {model.max_length}", lengths.sum(1) > model.max_length),
            ("evaluation prompts", asked, f"generation.max_prompt_length {asked_limit}", asked > asked_limit),
        )
        shares = {name: float(np.mean(over)) for name, _, _, over in measured if len(over)}
        sample = f", measured on {len(responses):,} of {total:,} responses" if len(responses) < total else ""
        yield from _heading(f"Lengths in tokens{sample}")
        yield from _table(
            ("", "median", "95%", "longest", "limit", "over it"),
            (
                (name, *map(int, np.quantile(tokens, (0.5, 0.95, 1.0), method="higher")), limit, f"{shares[name]:.1%}")
                for name, tokens, limit, _ in measured
                if name in shares
            ),
        )
        yield "  Texts over the limit are cut: a prompt keeps its last tokens, a response its first."
        remedies = {
            "evaluation prompts": "lose their beginning; raise generation.max_prompt_length",
            "prompts": "lose their beginning; raise model.max_prompt_length",
            "responses": "are cut, the longest ones: raise model.max_length, or lower model.max_prompt_length",
        }
        for name, remedy in remedies.items():
            if shares.get(name, 0) > _MUCH_TRUNCATED:
                self.warnings.append(f"{shares[name]:.0%} of the {name} {remedy}")

    def training(self) -> Iterator[str]:
        experiment, preference, margin = self.experiment, self.preference, self.margin
        pairs = None if preference is None else preference.counts["train"]
        trainings: list[tuple[str, TrainingSettings, str, int | None, int]] = []
        if experiment.sft.enabled:
            chosen = None
            if preference is not None:
                _, chosen = count_texts(preference.file, splits=("train",), sides=("chosen",))
            trainings.append(("sft_model", experiment.sft, "responses", chosen, 1))
        if experiment.has_margin_adapter and experiment.margin_adapter is not None:
            judged = None if margin is None else margin.counts["train"]
            trainings.append(("margin_adapter", experiment.margin_adapter, "pairs", judged, 1))
        trainings.append(("modpo_models", experiment.modpo, "pairs", pairs, len(experiment.objective.weights)))
        yield from _heading("Training")
        rows = []
        total: int | None = 0
        for name, settings, unit, items, times in trainings:
            per_step = settings.batch_size * settings.accumulation
            known = settings.steps is not None or items is not None
            steps = count_steps(settings.plain(Training), items or 0) if known else None
            total = None if steps is None or total is None else total + times * steps
            shown = "unknown" if steps is None else f"{steps:,}"
            passes = "" if items is None or steps is None else f"{steps * per_step / items:.2f}"
            rows.append((name, shown if times == 1 else f"{times} x {shown}", f"{per_step} {unit}", items, passes))
        yield from _table(("", "optimizer steps", "each on", "of", "passes"), rows)
        if not experiment.sft.enabled:
            yield "  sft.enabled is false: the base model itself is the reference policy"
        if total is not None:
            yield f"  {total:,} optimizer steps in all"
        for tracker in experiment.run.report_to:
            if tracker not in _TRACKERS:
                self.problems.append(f"run.report_to: {tracker!r} is not known; known are {', '.join(_TRACKERS)}")
            elif importlib.util.find_spec(tracker) is None:
                self.problems.append(f"run.report_to: {tracker} is not installed: pip install {tracker}, or remove it")

    def evaluation(self) -> Iterator[str]:
        settings, policies = self.experiment.evaluation, len(self.experiment.objective.weights) + 1
        yield from _heading("Evaluation")
        if self.prompts is not None:
            count = len(self.prompts)
            yield (
                f"  {count:,} held-out prompts ({settings.prompts:,} asked for), {policies} policies: "
                f"{count * policies:,} responses of up to {self.experiment.generation.max_new_tokens:,} tokens"
            )
            if samples := settings.kl_samples:
                drawn = count * samples * (policies - 1)
                yield f"  KL divergence to SFT: {samples} per prompt and weight, {drawn:,} responses more"
            if count < settings.prompts:
                self.warnings.append(
                    f"evaluation.prompts asks for {settings.prompts} and {count} held-out prompts are there: "
                    "intervals will be wider"
                )
        if isinstance(settings.rater, RewardModelSettings):
            yield f"  rater: {settings.rater.model} rates {', '.join(settings.rater.heads)}"
            with self.collecting():
                _look_at_rater(settings.rater, described_model(self.experiment, "rater"))
        else:
            yield f"  rater: {settings.rater}"
            if settings.rater == "none":
                yield (
                    "  preference quality stays unmeasured: the trade-off is the margin against the distance from SFT"
                )

    def _device(self) -> "torch.device":
        """The device that stages compute on. Raises HelpsteerError where this machine lacks it."""
        from helpsteer_assets.modpo.models.loading import choose_device
        from helpsteer_assets.modpo.training.launch import require_devices

        settings = self.experiment.run.plain(Compute)
        device = choose_device(settings, self.experiment.model.precision)
        require_devices(settings, device)
        return device

    def machine(self) -> Iterator[str]:
        import torch

        precision = self.experiment.model.precision
        yield from _heading("Machine")
        device = None
        with self.collecting():
            device = self._device()
        if device is None:
            yield "  device: see Problems"
        else:
            if device.type == "cuda":
                memory = torch.cuda.get_device_properties(0).total_memory
                named = f"cuda, {torch.cuda.get_device_name()} with {size_in_words(memory)}"
            else:
                memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
                named = f"cpu, {os.cpu_count()} cores with {size_in_words(memory)}, torch threads "
                named += str(torch.get_num_threads())
                if precision == "bf16":
                    self.warnings.append(
                        "model.precision is bf16 and there is no CUDA device here: it runs on the CPU, no faster than "
                        "fp32"
                    )
            yield f"  device: {named}; precision {precision}"
            if self.experiment.run.train_processes > 1:
                yield f"  training: in {self.experiment.run.train_processes} processes"
            weights = 0 if self.size is None else self.size.parameters * BYTES[precision]
            if weights > memory * NEARLY_ALL:
                self.warnings.append(
                    f"the model takes {size_in_words(weights)} in {precision}, and {device.type} has "
                    f"{size_in_words(memory)}: it will hardly fit; choose a smaller base model or a larger machine"
                )
        if self.experiment.generation.engine == "vllm":
            from helpsteer_assets.modpo.generation.vllm import require_vllm

            with self.collecting():
                require_vllm(precision, self.experiment.lora.r)

    def cluster(self) -> Iterator[str]:
        yield from _heading("Cluster")
        nodes = None
        with self.collecting():
            address, nodes = ask_nodes(self.home)
        if nodes is None:
            yield "  cannot be asked, see Problems"
            return
        yield f"  Ray at {address}"
        yield from _table(("node", "CPUs", "GPUs"), ((node.name, f"{node.cpus:g}", f"{node.gpus:g}") for node in nodes))
        dagster_home = Path(os.environ.get("DAGSTER_HOME") or self.home / "dagster" / self.experiment.name)
        problems, warned = judge(nodes, self.experiment.run, self.home, dagster_home)
        self.problems += problems
        self.warnings += warned

    def disk(self) -> Iterator[str]:
        experiment, home = self.experiment, self.home
        existing, free = free_space(home.path)
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            self.problems.append(f"home {home} cannot be written to; set HELPSTEER_HOME to a folder that can")
            return
        to_make = [(stage.name, p) for stage in stages(experiment).values() for p in partitions_of(stage, experiment)]
        made: dict[str, Path] = {}
        if home.path.exists():
            try:
                states = status(experiment, home)
            except HelpsteerError:
                return  # a source is not there, which is among the problems already
            to_make, made = unfinished(states), finished_folders(states)
        need = disk_need(experiment, to_make, made, home, self.size)
        yield from _prose(in_words(need, home))
        if self.to_download and ("sft_model", ALL) in to_make:
            yield from self._hub_cache()
        if problem := shortage(need, home):
            self.problems.append(problem)
        elif need.bytes > free * NEARLY_ALL:
            self.warnings.append(
                f"about {size_in_words(need.bytes)} of the {size_in_words(free)} free in {existing} will be written"
            )

    def _hub_cache(self) -> Iterator[str]:
        from huggingface_hub import constants

        cache, size = Path(constants.HF_HUB_CACHE), size_in_words(self.to_download)
        _, free = free_space(cache)
        room = size_in_words(free)
        yield from _prose(f"download: weights of about {size} to the hub cache {cache}; {room} free there")
        if self.to_download > free:
            self.problems.append(
                f"the model's weights (about {size}) do not fit into the hub cache {cache}, which has {room} free; "
                "point HF_HOME at a larger disk"
            )

    def estimate(self) -> Iterator[str]:
        """Tokens, FLOPs and time of the stages that compute with the model."""
        import torch

        experiment, size, preference = self.experiment, self.size, self.preference
        lacks_margin = experiment.has_margin_adapter and self.margin is None
        if size is None or self.read is None or preference is None or lacks_margin:
            return
        try:
            device = self._device()
        except HelpsteerError:
            return  # the machine's section has said so
        lengths, asked = self.read
        works = estimate(experiment, size.weights_per_token, preference, self.margin, lengths, asked)
        precision = experiment.model.precision
        measured: dict[str, float] = {}
        with self.collecting():
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            measured = measured_rates(self.home, works, size.parameters * BYTES[precision], name)
        product = product_rate(device, precision)

        def row(title: str, times: dict[str, int], *rate: str) -> tuple[str | int, ...]:
            """Stages added up, each as many times."""
            tokens = sum(n * works[stage].tokens for stage, n in times.items())
            flops = sum(n * works[stage].flops for stage, n in times.items())
            seconds = sum(n * works[stage].flops / measured.get(stage, product) for stage, n in times.items())
            return title, round(tokens), f"{flops / 1e12:,.3g}", _duration(seconds), *(rate or ("", ""))

        once = {stage: 1 for stage, work in works.items() if not work.each_weight}
        each = {stage: 1 for stage, work in works.items() if work.each_weight}
        weights = len(experiment.objective.weights)
        rows = [
            row(
                stage if stage in once else f"each w: {stage}",
                {stage: 1},
                f"{measured.get(stage, product) / 1e12:.3g}",
                "in this home" if stage in measured else "by a matrix product",
            )
            for stage in (*once, *each)
        ]
        rows.append(row("once for all weights", once))
        rows.append(row("each w", each))
        rows.append(row(f"all of {weights} weight{'' if weights == 1 else 's'}", once | dict.fromkeys(each, weights)))
        yield from _heading("Estimate")
        yield from _table(("", "tokens", "TFLOP", "time", "TFLOP/s", "measured"), rows)
        yield from _prose(
            f"FLOPs are 2 N T, in training 4 N T, for N = {size.weights_per_token:,} weights and T tokens; the time "
            "is FLOPs over the rate. A rate measured in this home is that of the same stage, finished with a model of "
            f"this size. The rate of a matrix product was measured just now on {device.type}: a model is slower, and a "
            "small one or its answers many times."
        )
        answer = np.minimum(lengths[:, 1], experiment.generation.max_new_tokens).mean()
        yield from _prose(
            "Answers (generations, kl_to_sft) are the least sure: nobody knows how long they will be. They count as "
            f"long as the source's responses, {answer:.0f} tokens on average. Not counted are reading the data, the "
            "rater, statistics, report and early stopping."
        )


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


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def _heading(title: str, revision: str | None = None) -> Iterator[str]:
    yield from ("", title if revision is None else f"{title} at {revision[:12]}")


def _table(names: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> list[str]:
    """A table whose first `left` columns are aligned to the left; whole numbers get separators, None stays empty."""
    cells = [[f"{c:,}" if isinstance(c, int) else "" if c is None else str(c) for c in row] for row in rows]
    return table_lines(names, cells, right_from=left)


def _prose(text: str, bullet: str = "") -> Iterator[str]:
    """Text folded to a terminal's width; its own line breaks stay."""
    first, rest = f"  {bullet}", f"  {' ' * len(bullet)}"
    for line in text.split("\n"):
        yield from textwrap.wrap(
            line, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )
        first = rest

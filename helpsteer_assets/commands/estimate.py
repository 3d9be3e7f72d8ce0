"""The work of an experiment, stage by stage, before anything is computed: what `helpsteer check` says it will cost.

The formulas are those of `modpo/cost.py`; here they meet the graph: which stage reads which texts, how often and with
which adapters. Nothing is read but pairs and the lengths of texts. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from helpsteer_assets.assets.graph import stages
from helpsteer_assets.commands.cost import (
    STAGE_OPERATIONS,
    Machine,
    Tokens,
    Work,
    decoding,
    forward,
    longest_of,
    optimizer,
    training,
    tree,
)
from helpsteer_assets.commands.disk import BYTES
from helpsteer_assets.experiment.settings import Experiment, TrainingSettings
from helpsteer_assets.modpo.data.tables import Source, query
from helpsteer_assets.modpo.training.schedule import count_steps, evaluation_interval

if TYPE_CHECKING:
    from helpsteer_assets.modpo.models.loading import ModelSize

ASSUMED_GPU = Machine(rate=4.5e14, bandwidth=2e12, operation=5e-6)
"""A GPU that nobody measured: about half of what the makers of an H100 state for products in bf16, two thirds for its
memory, and what starting a kernel is commonly said to take."""
_DECODED_TOGETHER = 256
"""`generation.SHARE_OF_PROMPTS`, whose module imports torch."""


@dataclass(frozen=True)
class PairTexts:
    """The texts of one attribute's pairs, in tokens as training and scoring cut them."""

    train_pairs: int
    pair: Tokens
    """Of a train pair, on average: its prompt once, and both responses."""
    selection: Tokens
    """Of all held-out train pairs: every prompt and response once."""
    validation: Tokens
    """The same of the validation pairs."""
    all: Tokens
    """The same of all pairs."""


@dataclass(frozen=True)
class Texts:
    """What the stages read."""

    preference: PairTexts
    margin: PairTexts | None
    """None under a length penalty."""
    both: Tokens
    """Every prompt and response of either attribute's pairs once."""
    chosen: Sequence[tuple[int, int]]
    """Tokens of (prompt, response) of chosen train responses: a sample of what SFT learns."""
    chosen_train: int
    """How many there are in all."""
    chosen_selection: int
    """How many there are of held-out train prompts."""
    asked: Sequence[int]
    """Tokens of each evaluation prompt, cut."""
    answers: Sequence[int]
    """Tokens of answers, as far as one can tell: those of the source's responses, cut as generation cuts them."""


def measure_texts(
    experiment: Experiment, preference: Source, margin: Source | None, lengths: pa.Table, asked: Sequence[int]
) -> Texts:
    """Count the texts of pairs; lengths that were not measured count as the mean of those that were.

    Args:
        experiment: its limits cut the texts.
        preference, margin: PAIRS_SCHEMA; no margin under a length penalty.
        lengths: response_id, prompt_tokens and response_tokens (uncut) of some responses.
        asked: tokens of each evaluation prompt, uncut.
    """
    model, generation = experiment.model, experiment.generation
    limits = {"most": model.max_length, "of_prompt": model.max_prompt_length}
    cut = query(
        """
        SELECT response_id, prompt, least(response_tokens, $most - prompt) AS response, response_tokens AS uncut
        FROM (SELECT *, least(prompt_tokens, $of_prompt) AS prompt FROM lengths) ORDER BY response_id
        """,
        limits,
        lengths=lengths,
    )
    pairs = {"preference": preference} if margin is None else {"preference": preference, "margin": margin}

    def once(names: Sequence[str], splits: Sequence[str] = ("train", "selection", "validation")) -> Tokens:
        """Every prompt and response of these pairs once."""
        sides = " UNION ".join(
            f"SELECT prompt_id, {side}_id AS response_id FROM {name} WHERE split IN {tuple((*splits, ''))}"
            for name in names
            for side in ("chosen", "rejected")
        )
        return _count(f"SELECT *, prompt_id AS tree FROM ({sides})", cut, pairs)

    def of(name: str) -> PairTexts:
        sides = " UNION ALL ".join(
            f"SELECT pair_id AS tree, {side}_id AS response_id FROM {name} WHERE split = 'train'"
            for side in ("chosen", "rejected")
        )
        train, count = _count(sides, cut, pairs), _rows(pairs[name], "train")
        held_out, validation = once([name], ["selection"]), once([name], ["validation"])
        return PairTexts(count, train * (1 / max(count, 1)), held_out, validation, once([name]))

    learnt = query(
        """
        SELECT prompt, response, count(*) OVER () AS total FROM (
            SELECT DISTINCT chosen_id AS response_id FROM pairs WHERE split = 'train'
        ) LEFT JOIN cut USING (response_id) ORDER BY response_id
        """,
        pairs=preference,
        cut=cut,
    )
    selected = query("SELECT count(DISTINCT chosen_id) AS n FROM pairs WHERE split = 'selection'", pairs=preference)
    known = [(row["prompt"], row["response"]) for row in learnt.to_pylist() if row["prompt"] is not None]
    return Texts(
        preference=of("preference"),
        margin=None if margin is None else of("margin"),
        both=once(list(pairs)),
        chosen=known or [(row["prompt"], row["response"]) for row in cut.to_pylist()],
        chosen_train=learnt.num_rows,
        chosen_selection=selected["n"][0].as_py(),
        asked=[min(tokens, generation.max_prompt_length) for tokens in asked],
        answers=[min(tokens, generation.max_new_tokens) for tokens in cut["uncut"].to_pylist()],
    )


def _rows(pairs: Source, split: str) -> int:
    return query("SELECT count(*) AS n FROM pairs WHERE split = $split", {"split": split}, pairs=pairs)["n"][0].as_py()


def _count(sides: str, cut: pa.Table, pairs: dict[str, Source]) -> Tokens:
    """Tokens of prompt trees: `sides` selects `tree` and `response_id`."""
    found = query(
        f"""
        WITH mean AS (SELECT avg(prompt) AS prompt, avg(response) AS response FROM cut), sides AS ({sides}), known AS (
            SELECT tree, coalesce(cut.prompt, mean.prompt) AS p, coalesce(cut.response, mean.response) AS r
            FROM sides LEFT JOIN cut USING (response_id) CROSS JOIN mean
        ), trees AS (
            SELECT max(p) AS p, sum(r) AS r, sum(p * r + r * (r + 1) / 2) AS seen, count(*) AS n
            FROM known GROUP BY tree
        )
        SELECT coalesce(sum(p + r), 0)::DOUBLE AS read, coalesce(sum(r), 0)::DOUBLE AS predicted,
            coalesce(sum(p * (p + 1) / 2 + seen), 0)::DOUBLE AS attended, coalesce(sum(n), 0)::DOUBLE AS responses
        FROM trees
        """,
        cut=cut,
        **pairs,
    )
    return Tokens(*(found[name][0].as_py() for name in ("read", "predicted", "attended", "responses")))


def estimate(experiment: Experiment, size: "ModelSize", texts: Texts, batch_tokens: int) -> dict[str, Work]:
    """Work of each stage that computes with the model, in the order of the graph; of a stage with weights, of one w.

    Args:
        experiment: the experiment; early stopping is not foreseen.
        size: its model's.
        texts: what its stages read.
        batch_tokens: tokens of a micro-batch; scoring takes four times as many.
    """
    count = _Counter(experiment, size, texts, batch_tokens)
    fixed = Work(operations=STAGE_OPERATIONS)
    found: dict[str, Work] = {}
    for name in stages(experiment):
        work = getattr(count, name, None)
        if work is not None:
            found[name] = work() + fixed
    return found


def total(experiment: Experiment, works: dict[str, Work], *, weights: int | None = None) -> Work:
    """What is shared once, and what each weight takes so many times (None: as the experiment has them)."""
    times = len(experiment.objective.weights) if weights is None else weights
    graph = stages(experiment)
    return sum((work * (times if graph[name].partitioned else 1) for name, work in works.items()), Work())


class _Counter:
    """Each method is named after a stage and counts its work."""

    def __init__(self, experiment: Experiment, size: "ModelSize", texts: Texts, batch_tokens: int) -> None:
        self._experiment = experiment
        self._size = size
        self._texts = texts
        self._batch_tokens = batch_tokens
        self._bytes = BYTES[experiment.model.precision]

    def sft_model(self) -> Work:
        """TRL pads each batch to its longest sequence, and computes logits where they are learnt."""
        settings = self._experiment.sft
        if not settings.enabled:
            return Work()
        steps = count_steps(settings, self._texts.chosen_train)
        width = longest_of([prompt + response for prompt, response in self._texts.chosen], settings.batch_size)
        learnt = sum(response for _, response in self._texts.chosen) / max(len(self._texts.chosen), 1)
        # Under a mask, attention computes the whole square.
        one = Tokens(width, learnt, width**2)
        batches = steps * settings.accumulation
        trained = training(
            self._size,
            one * (batches * settings.batch_size),
            bytes_each=self._bytes,
            passes=batches,
            checkpointing=settings.gradient_checkpointing,
        )
        evaluated = steps // evaluation_interval(settings, steps) * self._texts.chosen_selection
        held_out = self._forward(one * evaluated, adapter=True, passes=evaluated / settings.batch_size)
        return trained + optimizer(self._size, steps) + held_out

    def reference_log_probs(self) -> Work:
        """The SFT model on every response of both attributes' pairs, once."""
        return self._score(self._texts.both, adapter=False)

    def margin_adapter(self) -> Work:
        """A training, and its judgement on the validation pairs."""
        assert self._experiment.margin_adapter is not None and self._texts.margin is not None
        judged = self._score(self._texts.margin.validation, adapter=True)
        return self._train(self._experiment.margin_adapter, self._texts.margin) + judged

    def margin_adapter_quality(self) -> Work:
        """The margin adapter on the validation pairs again."""
        assert self._texts.margin is not None
        return self._score(self._texts.margin.validation, adapter=True)

    def margin_rewards(self) -> Work:
        """The margin adapter on every response of the preference pairs; a length penalty only counts tokens."""
        return self._score(self._texts.preference.all, adapter=True) if self._experiment.has_margin_adapter else Work()

    def modpo_models(self) -> Work:
        """One weight's training: the reference and the margin are there already."""
        return self._train(self._experiment.modpo, self._texts.preference)

    def sft_generations(self) -> Work:
        """The SFT model's answers."""
        return self._answer(sampled=self._experiment.generation.do_sample)

    def generations(self) -> Work:
        """One policy's answers."""
        return self._answer(sampled=self._experiment.generation.do_sample)

    def sft_scores(self) -> Work:
        """The SFT model and the margin adapter on its answers."""
        if not self._experiment.has_margin_adapter:
            return Work()
        return self._score(self._answered(1), adapter=False) + self._score(self._answered(1), adapter=True)

    def scores(self) -> Work:
        """The SFT model, the policy and the margin adapter on the policy's answers."""
        adapters = 1 + self._experiment.has_margin_adapter
        return self._score(self._answered(1), adapter=False) + self._score(self._answered(1), adapter=True) * adapters

    def kl_to_sft(self) -> Work:
        """Samples of a policy, and the SFT model and the policy on them, those of a prompt in one tree."""
        samples = self._experiment.evaluation.kl_samples
        drawn = self._answer(sampled=True) * samples
        trees = self._answered(samples)
        return drawn + self._score(trees, adapter=False) + self._score(trees, adapter=True)

    def _forward(self, tokens: Tokens, *, adapter: bool, passes: float) -> Work:
        return forward(self._size, tokens, bytes_each=self._bytes, passes=passes, adapter=adapter)

    def _score(self, tokens: Tokens, *, adapter: bool) -> Work:
        passes = math.ceil(tokens.read / (4 * self._batch_tokens))
        return self._forward(tokens, adapter=adapter, passes=passes)

    def _train(self, settings: TrainingSettings, texts: PairTexts) -> Work:
        steps = count_steps(settings, texts.train_pairs)
        batches = steps * settings.accumulation
        per_batch = max(1.0, settings.batch_size * texts.pair.read / self._batch_tokens)
        trained = training(
            self._size,
            texts.pair * (batches * settings.batch_size),
            bytes_each=self._bytes,
            passes=batches * per_batch,
            checkpointing=settings.gradient_checkpointing,
        )
        evaluations = steps // evaluation_interval(settings, steps)
        passes = evaluations * math.ceil(texts.selection.read / self._batch_tokens)
        held_out = self._forward(texts.selection * evaluations, adapter=True, passes=passes)
        return trained + optimizer(self._size, steps) + held_out

    def _answer(self, *, sampled: bool) -> Work:
        settings, asked, answers = self._experiment.generation, self._texts.asked, self._texts.answers
        if not asked or not answers:
            return Work()
        rows = max(1, settings.max_batch_tokens // (max(asked) + settings.max_new_tokens))
        shares = math.ceil(len(asked) / _DECODED_TOGETHER)
        together = len(asked) / shares
        mean, longest = sum(answers) / len(answers), longest_of(answers, round(together))
        return decoding(
            self._size,
            prompts=len(asked),
            prompt_tokens=sum(asked) / len(asked),
            response_tokens=mean,
            steps=shares * max(longest, together * mean / rows),
            bytes_each=self._bytes,
            prefills=shares * max(1.0, together / rows),
            sampled=sampled,
        )

    def _answered(self, samples: int) -> Tokens:
        """The evaluation prompts, each with so many answers."""
        asked, answers = self._texts.asked, self._texts.answers
        if not asked or not answers:
            return Tokens()
        mean = sum(answers) / len(answers)
        return tree(sum(asked) / len(asked), *[mean] * samples) * len(asked)

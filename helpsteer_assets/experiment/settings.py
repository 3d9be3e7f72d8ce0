"""The experiment: one declarative description of everything that determines a result.

An experiment is a YAML file. Three are shipped (`demo`, `smollm2`, `helpsteer`); another is named by its path, and may
say `extends: <name or path>` to change only a few keys. `HELPSTEER_EXPERIMENT` chooses it. Two sections determine no
result and enter no fingerprint: `run` (how things run) and `checks` (thresholds).
"""

import re
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from helpsteer_assets.modpo.margins import Margin

Attribute = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity", "overall"]
Plain = TypeVar("Plain", bound="DataclassInstance")

_INHERITED = "in a file that extends another, set it to null"


def canonical_weight(value: object) -> str:
    """The one spelling of a weight, which is also its partition key: `0.50` and `.5` are `0.5`.

    Raises ValueError for anything but a number in (0, 1] of at most ten decimals. 0 is excluded: the loss divides by w.
    """
    text = ""
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        number = Decimal("nan")
    if number.is_finite() and 0 < number <= 1:
        text = format(number.normalize(), "f")
    if not text or len(text) > 12 or Decimal(text) != number:
        raise ValueError(f"a weight is a number in (0, 1] of at most ten decimals, got {shown(value)}")
    return text


class Section(BaseModel):
    """Strict and closed: a wrong type or an unknown key is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def plain(self, kind: type[Plain]) -> Plain:
        """The same settings for the library, which knows no experiment: a dataclass of modpo/settings.py."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


class DataSettings(Section):
    """Which ratings, and what is learnt from them. A stable hash of the prompt draws every share and selection."""

    source: str = Field(
        min_length=1,
        description="`embedded`, a data set id on the hub, or a path that starts with `.`, `/` or `~`: one file, or a "
        "folder with train and validation files. Relative to the experiment file (shipped: to the working directory).",
    )
    revision: str | None = Field(None, description="Commit hash of a data set on the hub; required there.")
    preference_attribute: Attribute = Field(
        "helpfulness", description="What policies learn; `overall` is the sum of the five."
    )
    margin_attribute: Attribute = Field("verbosity", description="What the margin adapter learns, if there is one.")
    on_bad_rows: Literal["error", "drop"] = Field(
        "error", description="error: list bad rows and stop; drop: count them."
    )
    selection_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of the train prompts to choose checkpoints by."
    )
    validation_share: float = Field(0.05, gt=0, lt=1, description="Share of one file's prompts for validation.")
    max_train_prompts: int | None = Field(None, ge=2, description="Most train prompts; null: all.")
    max_validation_prompts: int | None = Field(None, ge=1, description="Most validation prompts; null: all.")


class ModelSettings(Section):
    """The base model, its precision, and how long its texts may be in training and scoring."""

    base: str = Field(min_length=1, description="`embedded`, a model id on the hub, or a path as of `data.source`.")
    revision: str | None = Field(None, description="Commit hash of a model on the hub; required there.")
    precision: Literal["fp32", "bf16"] = Field(description="Precision of the weights and of training.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the base model.")
    max_length: int = Field(512, ge=8, description="Most tokens of prompt and response together.")
    max_prompt_length: int = Field(256, ge=4, description="Most tokens of a prompt; a longer one loses its beginning.")

    @model_validator(mode="after")
    def _response_has_room(self) -> "ModelSettings":
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "so that a response has room"
            )
        return self


def _target_modules(value: object) -> object:
    if value == "all-linear" or (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"expected `all-linear` or a list of module names such as [q_proj, v_proj], got {shown(value)}")


class LoraSettings(Section):
    """The adapters that the SFT model, the margin adapter and the policies are trained as."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_target_modules)] = Field(
        "all-linear", description="`all-linear` (all linear layers but the head), or a list of module names."
    )


class TrainingSettings(Section):
    """How one stage trains. An optimizer step sees batch_size times accumulation."""

    epochs: float | None = Field(None, gt=0, description="Passes over the train pairs; give this or `steps`.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or `epochs`.")
    batch_size: int = Field(8, ge=1, description="Sequences (SFT) or pairs (DPO, MODPO) per micro-batch.")
    accumulation: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Learning rate after the warm-up.")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps until the learning rate's peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between evaluations, each of which leaves a checkpoint; null: ten in a training."
    )
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row without a lower loss; null: never."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSettings":
        given = [key for key in ("steps", "epochs") if getattr(self, key) is not None]
        if len(given) > 1 or (not given and getattr(self, "enabled", True)):
            raise ValueError(f"give either `steps` or `epochs`; to remove one {_INHERITED}")
        return self


class SftSettings(TrainingSettings):
    """How the SFT model trains: on chosen responses, the loss on the response only."""

    enabled: bool = Field(True, description="false: the base model itself is the reference policy.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")


class MarginAdapterSettings(TrainingSettings):
    """How the margin adapter trains: by DPO on the margin pairs."""

    beta: float = Field(0.1, gt=0, description="DPO beta that trains the margin adapter.")


class ModpoSettings(TrainingSettings):
    """How the policy of each weight trains."""


class ObjectiveSettings(Section):
    """MODPO's objective: beta, the weights, and the margin with its direction."""

    beta: float = Field(0.1, gt=0, description="MODPO's beta: how strongly the policy is held to the SFT model.")
    weights: list[Annotated[str, BeforeValidator(canonical_weight)]] = Field(
        min_length=1,
        max_length=99,
        description="The weights w, one policy each: w for the preference, 1 - w for the margin. At 1 it is DPO.",
    )
    margin: Literal["implicit_reward", "length_penalty"] = Field(
        "implicit_reward",
        description="`implicit_reward`: r_m = margin_beta (log p_adapter - log p_sft). "
        "`length_penalty`: r_m = -penalty * response tokens, without an adapter.",
    )
    margin_role: Literal["cost", "reward"] | None = Field(
        None,
        description="`cost` discourages what the margin adapter prefers (m = -r_m), `reward` encourages it (m = +r_m). "
        "Only with an implicit reward.",
    )
    margin_beta: float | None = Field(
        None,
        description="Scales the margin adapter's log-ratio; margin_role gives the sign. Only with an implicit reward.",
    )
    penalty: float | None = Field(None, gt=0, description="Reward lost per response token of a length penalty.")

    @field_validator("weights")
    @classmethod
    def _each_once(cls, weights: list[str]) -> list[str]:
        twice = [weight for weight in dict.fromkeys(weights) if weights.count(weight) > 1]
        if twice:
            raise ValueError(f"weight {', '.join(twice)} stands there more than once; leave one")
        return weights

    @model_validator(mode="before")
    @classmethod
    def _margin_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("margin", "implicit_reward") == "implicit_reward":
            return data if data.get("margin_beta") is not None else {**data, "margin_beta": 0.1}
        return data

    @model_validator(mode="after")
    def _margin_is_complete(self) -> "ObjectiveSettings":
        mine, others = ["penalty"], ["margin_role", "margin_beta"]
        if self.margin == "implicit_reward":
            mine, others = others, mine
        for key in mine:
            if getattr(self, key) is None:
                meaning = type(self).model_fields[key].description
                raise ValueError(f"`margin: {self.margin}` needs `{key}`. {meaning}")
        for key in others:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` does not go with `margin: {self.margin}`; remove it ({_INHERITED})")
        if self.margin_beta is not None and self.margin_beta <= 0:
            raise ValueError(
                f"margin_beta is a magnitude and must be positive, got {self.margin_beta}. In the described pipeline a "
                "negative MARGIN_BETA was documented as reward and acted as cost; choose `margin_role: cost` (penalize "
                "what the margin adapter prefers) or `margin_role: reward` (encourage it) by what you want"
            )
        return self


class GenerationSettings(Section):
    """How the policies answer the evaluation prompts."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="vllm: on a GPU, with the extra `vllm`."
    )
    max_prompt_length: int = Field(1536, ge=4, description="Most tokens of a prompt; a longer one loses its beginning.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens of a response, its end-of-text token included.")
    do_sample: bool = Field(False, description="true: sample with temperature and top_p; false: greedy.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; used with do_sample.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus share; used with do_sample.")
    repetition_penalty: float = Field(1.0, gt=0, description="1.0: none.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="0: none.")
    max_batch_tokens: int = Field(
        16384,
        ge=1,
        description="Tokens (prompts and longest responses) that are decoded together; limits the memory. Changes no "
        "response in fp32. Not used by vllm.",
    )

    @model_validator(mode="after")
    def _within_the_engine(self) -> "GenerationSettings":
        if self.engine == "vllm" and self.no_repeat_ngram_size > 0:
            raise ValueError(
                f"no_repeat_ngram_size: {self.no_repeat_ngram_size} with `engine: vllm`, which has no such rule"
            )
        return self


class RewardModelSettings(Section):
    """A sequence-classification reward model that rates the answers."""

    model: str = Field(min_length=1, description="A path or a model id on the hub.")
    revision: str | None = Field(None, description="Commit hash of a model on the hub; required there.")
    heads: dict[Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"], int] = Field(
        min_length=1, description="Number of the output that rates each attribute."
    )
    scale: float = Field(1.0, description="rating = scale * output + shift.")
    shift: float = Field(0.0, description="rating = scale * output + shift.")
    output: Literal["logits", "rewards"] = Field("logits", description="Output that has the heads; ArmoRM: rewards.")
    max_length: int = Field(4096, ge=8, description="Most tokens of a text; a longer one loses its beginning.")
    batch_size: int = Field(8, ge=1, description="Responses per forward pass.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the reward model.")


def _rater_kind(value: object) -> str | None:
    if isinstance(value, dict | RewardModelSettings):
        return "RewardModelSettings"
    return "name" if value in ("none", "embedded") else None


class EvaluationSettings(Section):
    """How many prompts are answered, and who rates the answers."""

    prompts: int = Field(300, ge=2, description="Unique held-out prompts that every policy answers.")
    rater: Annotated[
        Annotated[Literal["none", "embedded"], Tag("name")]
        | Annotated[RewardModelSettings, Tag("RewardModelSettings")],
        Discriminator(
            _rater_kind,
            custom_error_type="rater",
            custom_error_message="expected `none`, `embedded`, or a section that describes a reward model",
        ),
    ] = Field("none", description="`none`, `embedded` (the rules of the demo's generator), or a reward model.")
    kl_samples: int = Field(
        1,
        ge=0,
        description="Responses per prompt, sampled at temperature 1, that estimate each policy's KL divergence to SFT. "
        "0: no estimate.",
    )
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples of the prompts, for the intervals.")


class CheckSettings(Section):
    """Thresholds. They judge results and determine none."""

    margin_adapter_min_accuracy: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The margin adapter must prefer chosen in more than this share of the validation pairs, and the "
        "95% interval of its mean margin must lie above 0.",
    )


class RunSettings(Section):
    """How things run. Results do not depend on it, but for rounding."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one, else cpu.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of torch; 1 gives the same bytes in every run. null: torch's choice."
    )
    train_processes: int = Field(
        1,
        ge=1,
        description="Processes that train one model together, each on a GPU of its own (else on the CPU). batch_size * "
        "accumulation of each training must be a multiple.",
    )
    fsdp: bool = Field(False, description="train_processes share the frozen weights: less memory, more time.")
    batch_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens in one forward and backward pass of a preference training; scoring takes four times as "
        "many. null: 1024 on a CPU, 4096 on a GPU.",
    )
    gpus: float = Field(
        1.0, ge=0, description="GPUs of a Ray cluster for a step with a model: whole, a share below 1, or 0 for CPUs."
    )
    report_to: list[str] = Field(default_factory=list, description="Trackers: wandb, tensorboard, trackio.")
    automation: bool = Field(False, description="While the UI runs, evaluate each trained policy without a click.")

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"must be a whole number, or below 1 for a share of a GPU, got {gpus:g}")
        return gpus


class Experiment(Section):
    """Everything that determines a result."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$",
        description="Unique in a home: names Dagster's folder, and stands in every row of the tables.",
    )
    description: str = Field("", description="Free text, shown in the report.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of initialisation, data order and sampling.")
    data: DataSettings = Field(description="The ratings and what is learnt from them.")
    model: ModelSettings = Field(description="The base model, its precision and its limits.")
    objective: ObjectiveSettings = Field(description="What MODPO optimizes, and the weights.")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="The adapters of all three trainings.")
    sft: SftSettings = Field(description="How the SFT model trains.")
    margin_adapter: MarginAdapterSettings | None = Field(
        None, description="How the margin adapter trains, if there is one."
    )
    modpo: ModpoSettings = Field(description="How each weight's policy trains.")
    generation: GenerationSettings = Field(default_factory=GenerationSettings, description="How policies answer.")
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="Which prompts are answered and who rates the answers."
    )
    checks: CheckSettings = Field(default_factory=CheckSettings, description="Thresholds; they determine no result.")
    run: RunSettings = Field(default_factory=RunSettings, description="How things run; it determines no result.")

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.has_margin_adapter and self.margin_adapter is None:
            raise ValueError("margin_adapter: missing; `margin: implicit_reward` needs this section")
        if self.has_margin_adapter and self.data.margin_attribute == self.data.preference_attribute:
            raise ValueError(
                f"data.margin_attribute: the same as data.preference_attribute ({self.data.margin_attribute}); "
                "choose two attributes to trade against each other"
            )
        for key, source, revision in self.hub_references().values():
            _check_revision(key, source, revision)
        if self.run.fsdp and self.run.train_processes == 1:
            raise ValueError("run.fsdp: one process has nobody to share with; raise run.train_processes")
        for name, settings in self.trainings().items():
            if settings.batch_size * settings.accumulation % self.run.train_processes:
                raise ValueError(
                    f"run.train_processes: {self.run.train_processes} processes cannot share a step of {name} evenly, "
                    f"batch_size {settings.batch_size} x accumulation {settings.accumulation}"
                )
        if self.generation.engine == "vllm" and self.model.precision != "bf16":
            raise ValueError("generation.engine: vllm needs model.precision: bf16")
        if self.data.source != "embedded" and self.evaluation.rater == "embedded":
            raise ValueError(
                "evaluation.rater: `embedded` rates answers to the embedded data's prompts only; use `none`, or "
                "describe a reward model"
            )
        return self

    def hub_references(self) -> dict[str, tuple[str, str, str | None]]:
        """(key, value, revision) of what may come from the hub: `data`, `model` and, where it is a model, `rater`."""
        references = {
            "data": ("data.source", self.data.source, self.data.revision),
            "model": ("model.base", self.model.base, self.model.revision),
        }
        if isinstance(self.evaluation.rater, RewardModelSettings):
            rater = self.evaluation.rater
            references["rater"] = ("evaluation.rater.model", rater.model, rater.revision)
        return references

    def trainings(self) -> dict[str, TrainingSettings]:
        """The sections of the trainings that this experiment has."""
        trainings: dict[str, TrainingSettings] = {"sft": self.sft} if self.sft.enabled else {}
        if self.has_margin_adapter and self.margin_adapter is not None:
            trainings["margin_adapter"] = self.margin_adapter
        return {**trainings, "modpo": self.modpo}

    @property
    def margin(self) -> "Margin":
        """The margin, by its kind."""
        from helpsteer_assets.modpo.margins import implicit_reward, length_penalty  # numpy and pyarrow

        objective = self.objective
        if objective.penalty is not None:
            return length_penalty(objective.penalty)
        assert objective.margin_beta is not None and objective.margin_role is not None  # validated
        return implicit_reward(objective.margin_beta, objective.margin_role, self.data.margin_attribute)

    @property
    def has_margin_adapter(self) -> bool:
        """Whether the graph has `margin_pairs` and `margin_adapter`: a length penalty needs neither."""
        return self.objective.margin == "implicit_reward"


def _check_revision(key: str, source: str, revision: str | None) -> None:
    """Raise ValueError unless a source of the hub, and nothing else, has a commit hash."""
    section = key.rpartition(".")[0]
    if "://" in source:
        raise ValueError(f"{key}: {source} is a URL; copy it to a folder, and give the path of that")
    if not is_hub_id(source):
        if revision is not None:
            raise ValueError(
                f"{section}.revision: goes with an id on the hub only, and {source} is none; remove it ({_INHERITED})"
            )
    elif revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{section}.revision: {source} comes from the hub and needs its full commit hash (40 lower-case hex "
            f"digits), got {shown(revision)}; a path would be ./{source}"
        )


def is_path(source: str) -> bool:
    """Whether a source or model is a local path: it starts with `.`, `/` or `~`."""
    return source.startswith((".", "/", "~"))


def is_hub_id(source: str) -> bool:
    """Whether a source or model is an id on the hub, such as `nvidia/HelpSteer`."""
    return source != "embedded" and not is_path(source)


def shown(value: object) -> str:
    """A value as YAML spells it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return clipped(repr(value))


def clipped(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= 120 else text[:117] + "..."

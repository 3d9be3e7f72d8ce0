"""The settings of the library's functions, as small dataclasses that know no experiment.

The experiment's sections of the same name have these fields too, with their ranges and what they mean to a user
(docs/settings.md). Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compute:
    """Device, threads and processes of a computation."""

    device: str = "auto"
    """`auto`: CUDA where there is a device, else the CPU."""
    threads: int | None = None
    """CPU threads of torch; None: torch's choice."""
    batch_tokens: int | None = None
    """Tokens in one forward and backward pass of a preference training; None: by device."""
    train_processes: int = 1
    """Processes that train one model together."""
    fsdp: bool = False
    """Each of them holds a part of the frozen weights."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of transformers' Trainer."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al., "LoRA", 2021)."""

    r: int = 16
    alpha: int = 32
    """The update is multiplied by alpha / r."""
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Training:
    """One training by AdamW. An optimizer step sees batch_size * accumulation items."""

    learning_rate: float
    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` say."""
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    schedule: str = "linear"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    """Steps between evaluations, each with a checkpoint; None: ten in a training."""
    early_stopping: int | None = None
    """Evaluations in a row without a better loss after which it stops; None: never."""


@dataclass(frozen=True)
class Sampling:
    """How responses are generated."""

    max_prompt_length: int = 1536
    """A longer prompt keeps its last so many tokens."""
    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_batch_tokens: int = 16384
    """Tokens (prompts and longest responses) that are decoded together."""


@dataclass(frozen=True)
class RewardModel:
    """How the outputs of a sequence-classification model become ratings: scale * output + shift."""

    heads: Mapping[str, int]
    """The output that rates each attribute."""
    scale: float = 1.0
    shift: float = 0.0
    output: str = "logits"
    """The field of the model's output that holds the heads."""
    max_length: int = 4096
    """A longer text keeps its last so many tokens."""
    batch_size: int = 8
    trust_remote_code: bool = False

"""The models that are measured on, and the copies of one that the contenders work with."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import ours
from benchmarks.reference_procedure import MARGIN, POLICY
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.models.loading import load_model

SMOLLM2 = "smollm2"
SMOLLM2_VARIABLE = "HELPSTEER_BENCH_SMOLLM2"
"""Environment variable: folder of SmolLM2-135M-Instruct."""
SMOLLM2_FOLDER = Path("models/smollm2-135m-instruct")
"""Where `python -m tools.prepare_smollm2` puts it."""

_SHAPES = {
    "tiny": (300, 32, 64, 2, 4, 2),
    "body8": (32000, 512, 1536, 8, 8, 4),
    "llama7b": (32000, 4096, 11008, 32, 32, 32),
    "llama1b": (128256, 2048, 8192, 16, 32, 8),
}
"""Vocabulary, hidden size, intermediate size, layers, heads, key-value heads."""
MODELS = (*_SHAPES, SMOLLM2)
"""`tiny` is for tests, `body8` for CPUs, `llama1b` and `llama7b` for GPUs, with random weights; `smollm2` is real."""


def smollm2_folder() -> Path | None:
    """Where SmolLM2-135M-Instruct is, None where it is not."""
    folder = Path(os.environ.get(SMOLLM2_VARIABLE, SMOLLM2_FOLDER))
    return folder if (folder / "config.json").is_file() else None


def load_base(name: str, device: torch.device, precision: str) -> PreTrainedModel:
    """A base model by its name in `MODELS`; raises HelpsteerError where it is not on this machine."""
    if name == SMOLLM2:
        folder = smollm2_folder()
        if folder is None:
            raise HelpsteerError(
                f"no model in {os.environ.get(SMOLLM2_VARIABLE, SMOLLM2_FOLDER)}; `make smollm2` puts it there, or "
                f"name its folder in {SMOLLM2_VARIABLE}"
            )
        return load_model(folder, precision=precision, device=device)
    torch.manual_seed(0)
    vocabulary, hidden, intermediate, layers, heads, key_value_heads = _SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with device:
        model = LlamaForCausalLM(config)
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval()


ATTENTION = ("q_proj", "v_proj")
"""Where the described pipeline has its LoRA: it names no modules, and peft's choice for a Llama is these."""
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The library's default."""


@dataclass(frozen=True)
class Contenders:
    """Copies of one model with the same adapters: what one contender does to its copy the others don't see."""

    reference: PeftModel
    """The reference procedure's, with the adapters `POLICY` and `MARGIN`."""
    policy: PeftModel
    """Ours, with the LoRA to train."""
    scorer: PeftModel
    """Ours, with the adapter `MARGIN`."""

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary."""
        return self.reference.config.vocab_size


@contextmanager
def contenders(
    name: str, device: torch.device, precision: str, target_modules: tuple[str, ...] = ATTENTION
) -> Iterator[Contenders]:
    """Load the model once for each contender, with adapters that differ from the base as trained ones do."""
    with TemporaryDirectory() as folder:
        paths = _make_adapters(load_base(name, device, precision), Path(folder), target_modules)
        reference = PeftModel.from_pretrained(
            load_base(name, device, precision), paths[POLICY], adapter_name=POLICY, is_trainable=True
        )
        reference.load_adapter(paths[MARGIN], adapter_name=MARGIN)
        yield Contenders(
            reference=reference,
            policy=ours.load_policy(load_base(name, device, precision), paths[POLICY]),
            scorer=ours.load_scorer(load_base(name, device, precision), paths[MARGIN]),
        )


def in_fp64(model: PeftModel) -> PeftModel:
    """A copy that computes in fp64, without checkpointing."""
    doubled = copy.deepcopy(model).double()
    doubled.get_base_model().gradient_checkpointing_disable()
    for module in doubled.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # transformers' own norm rounds to fp32 on the way.
            module.forward = _Fp64Norm(module.weight, module.variance_epsilon)
    return doubled


@dataclass(frozen=True)
class _Fp64Norm:
    weight: torch.Tensor
    epsilon: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def draw_lora(model: PeftModel) -> None:
    """Give every LoRA layer random weights: it then differs from the base as a trained one does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _make_adapters(base: PreTrainedModel, folder: Path, target_modules: tuple[str, ...]) -> dict[str, Path]:
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config, adapter_name=POLICY)
    model.add_adapter(MARGIN, config)
    draw_lora(model)
    model.save_pretrained(folder, selected_adapters=[POLICY, MARGIN])
    return {POLICY: folder, MARGIN: folder / MARGIN}

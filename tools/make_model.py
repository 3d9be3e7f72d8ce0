"""Make the embedded base model: `python -m tools.make_model [--out DIR]`.

Writes a tokenizer, the weights of a Llama of half a million parameters, pre-trained on the generator's training text,
and `provenance.json`, which says from what they were made. The package ships the result in `model/`. One thread makes
the weights a function of the text and the settings on one machine; another processor or torch may round otherwise.
"""

import argparse
import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_assets.embedded.generator import build_rows

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_PATH = Path(__file__).parents[1] / "helpsteer_assets" / "embedded" / "model"
"""Where the shipped model lies."""

PAD_TOKEN, START_TOKEN, END_TOKEN = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines the model besides the generator's text; recorded in `provenance.json`."""

    text_seeds: tuple[int, ...] = (101, 102, 103, 104)
    text_prompts: int = 896
    vocabulary: int = 960
    """At most: enough for every word of the text to become one token."""
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    positions: int = 512
    initializer_range: float = 0.08
    """At transformers' own 0.02 so small a model never learns to look at the prompt."""
    seed: int = 0
    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 6e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1


def training_text(settings: Settings) -> list[tuple[str, str]]:
    """Every (prompt, response) of the generator's training rows for the text seeds, in order.

    An answer occurs as often as the generator gave it, so that the model learns how common each kind is.
    """
    rows = (row for seed in settings.text_seeds for row in build_rows(settings.text_prompts, 0, seed)["train"])
    return [(str(row["prompt"]), str(row["response"])) for row in rows]


def text_digest(text: list[tuple[str, str]]) -> str:
    """The sha256 of the text, which changes whenever the generator writes something else."""
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def build_tokenizer(text: list[tuple[str, str]], settings: Settings) -> "PreTrainedTokenizerFast":
    """A byte-level BPE trained on the text, with a chat template; it can encode any text at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = (turn for prompt, response in text for turn in (f"user\n{prompt}", f"assistant\n{response}"))
    tokenizer.train_from_iterator(chats, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: "PreTrainedTokenizerFast", settings: Settings) -> "LlamaConfig":
    """The architecture: a small Llama whose input and output embeddings are one."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: "PreTrainedTokenizerFast", prompt: str, response: str) -> tuple[list[int], int]:
    """The token ids of a chat with its end-of-text token, and how many of them are the prompt's."""
    chat = [{"role": "user", "content": prompt}]
    prompt_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return [*prompt_ids, *response_ids, tokenizer.eos_token_id], len(prompt_ids)


def response_loss(model: "LlamaForCausalLM", examples: list[tuple[list[int], int]], padding: int) -> "torch.Tensor":
    """The mean cross-entropy (nats a token) of the responses in a batch of `encode`'s results."""
    import torch

    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.tensor([ids + [padding] * (longest - len(ids)) for ids, _ in examples])
    labels = torch.full_like(input_ids, -100)
    for index, (ids, prompt_length) in enumerate(examples):
        labels[index, prompt_length : len(ids)] = input_ids[index, prompt_length : len(ids)]
    logits = model(input_ids=input_ids).logits  # padding is on the right: causal attention never sees it
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train_model(
    tokenizer: "PreTrainedTokenizerFast", text: list[tuple[str, str]], settings: Settings
) -> "LlamaForCausalLM":
    """Pre-train the model on the text's responses, on one thread so that the result is repeatable."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(build_config(tokenizer, settings)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, settings))
    examples = [encode(tokenizer, prompt, response) for prompt, response in text]
    rng = random.Random(settings.seed)
    for step in range(settings.steps):
        loss = response_loss(model, rng.sample(examples, settings.batch_size), tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {settings.steps}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def _learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_model(out: Path, settings: Settings) -> None:
    """Write tokenizer, weights and provenance to `out`."""
    from transformers import GenerationConfig

    text = training_text(settings)
    tokenizer = build_tokenizer(text, settings)
    model = train_model(tokenizer, text, settings)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    provenance = {
        "script": "tools.make_model",
        "settings": asdict(settings),
        "text_sha256": text_digest(text),
        "tokenizer_sha256": file_digest(out / "tokenizer.json"),
        "weights_sha256": file_digest(out / "model.safetensors"),
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description="Make the embedded base model from the generator's text.")
    parser.add_argument("--out", type=Path, default=MODEL_PATH, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_model(arguments.out, Settings())


if __name__ == "__main__":
    main()

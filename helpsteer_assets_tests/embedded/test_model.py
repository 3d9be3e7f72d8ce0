"""The shipped model: that it is what its script makes of today's generator, that it loads anywhere, that it learnt."""

import json
from dataclasses import asdict

import pytest

from helpsteer_assets.embedded.generator import build_rows
from tools.make_model import (
    MODEL_PATH,
    Settings,
    build_config,
    build_tokenizer,
    file_digest,
    text_digest,
    training_text,
)

SETTINGS = Settings()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_PATH)


def test_shipped_files_are_what_the_script_makes_of_todays_text_and_settings():
    made_from = {
        "settings": json.loads(json.dumps(asdict(SETTINGS))),
        "text_sha256": text_digest(training_text(SETTINGS)),
        "tokenizer_sha256": file_digest(MODEL_PATH / "tokenizer.json"),
        "weights_sha256": file_digest(MODEL_PATH / "model.safetensors"),
    }
    assert json.loads((MODEL_PATH / "provenance.json").read_text()).items() >= made_from.items()
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) < 3_000_000


def test_tokenizer_and_config_of_the_script_are_the_shipped_ones(tmp_path):
    from transformers import AutoConfig

    rebuilt = build_tokenizer(training_text(SETTINGS), SETTINGS)
    rebuilt.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL_PATH / name).read_bytes()
    build_config(rebuilt, SETTINGS).save_pretrained(tmp_path)
    fields = AutoConfig.from_pretrained(tmp_path).to_dict()
    shipped = AutoConfig.from_pretrained(MODEL_PATH).to_dict()
    written_with_weights = {"architectures", "dtype", "_name_or_path"}
    assert {k: v for k, v in fields.items() if k not in written_with_weights} == {
        k: v for k, v in shipped.items() if k not in written_with_weights
    }


def test_shipped_model_answers_a_held_out_prompt_and_stops(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from helpsteer_assets.embedded.rater import rate

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    prompts = list(dict.fromkeys(row["prompt"] for row in build_rows(0, 16, seed=11)["validation"]))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    outputs = model.generate(**inputs, max_new_tokens=96)[:, inputs["input_ids"].shape[1] :]
    assert (outputs == tokenizer.eos_token_id).any(dim=1).all()
    answers = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    whole = [rate(prompt, answer)["coherence"] >= 2.5 for prompt, answer in zip(prompts, answers, strict=True)]
    assert sum(whole) >= 0.75 * len(whole)

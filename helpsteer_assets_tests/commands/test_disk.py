"""The disk that a run needs, by what is not finished."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.assets.status import status, unfinished
from helpsteer_assets.commands.disk import disk_need, in_words, shortage
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.models.loading import ModelSize
from helpsteer_assets.store.artifacts import ALL
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.assets.test_graph_fingerprints import LENGTH_PENALTY, experiment

MODEL = ModelSize(parameters=1000, adapter_parameters=10, embeddings=50, weights_per_token=1000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = 300 * 512 * 6
"""Bytes of one policy's answers: prompts, tokens of each, bytes of a token."""


def parts(found: Experiment, to_make: list[tuple[str, str]] | None, home: Path, **options: Any) -> dict[str, int]:
    everything = unfinished(status(found, Home(home))) if to_make is None else to_make
    return disk_need(found, everything, options.get("made", {}), Home(home), options.get("model", MODEL)).parts


def test_a_new_home_needs_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpsteer_assets.commands.disk.pool_limit", lambda: 2)
    found = parts(experiment(), None, tmp_path / "home")
    assert found.pop("data") > 0
    assert found == {
        "SFT model": 1000 * 4,
        "3 adapters": 3 * 10 * 4,
        "checkpoints while training": 2 * 5 * 10 * 12,  # two policies at once, five checkpoints of each
        "answers": (3 + 2) * ANSWERS,  # three policies' answers, two policies' samples
    }
    assert list(tmp_path.iterdir()) == [], "looking makes no home"


def test_the_parts_follow_the_settings_and_what_is_left_to_make(tmp_path: Path) -> None:
    policy = [("modpo_models", "0.9"), ("generations", "0.9")]
    assert parts(experiment(), policy, tmp_path) == {
        "1 adapter": 40,
        "checkpoints while training": 600,
        "answers": ANSWERS,
    }
    samples = experiment({"evaluation.kl_samples": 4})
    assert parts(samples, [("kl_to_sft", "0.1"), ("kl_to_sft", "0.9")], tmp_path) == {"answers": 2 * 4 * ANSWERS}
    sft = [("sft_model", ALL)]
    assert parts(experiment({"model.precision": "bf16"}), sft, tmp_path)["SFT model"] == 2000
    assert parts(experiment({"sft.enabled": False}), sft, tmp_path) == {"SFT model": 4000}
    assert "2 adapters" in parts(experiment(**LENGTH_PENALTY), None, tmp_path)


def test_a_shortage_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = disk_need(experiment(), [("sft_model", ALL)], {}, Home(tmp_path), MODEL)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4600))
    home = tmp_path / "not" / "there"
    assert shortage(need, Home(home)) is None
    assert in_words(need, Home(home)) == (
        "disk: about 4.6 kB will be written (SFT model 4 kB, checkpoints while training 600 bytes); "
        f"4.6 kB free in {tmp_path}"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4599))
    message = shortage(need, Home(home))
    assert message is not None and message.startswith(f"about 4.6 kB will be written and {tmp_path} has 4.6 kB free; ")
    assert "HELPSTEER_HOME" in message

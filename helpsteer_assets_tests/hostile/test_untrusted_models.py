"""Models from strangers: no pickle is read, and no code that comes with one runs unless the experiment says so."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM

from helpsteer_assets.assets import hub
from helpsteer_assets.commands.check import report
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import RewardModelSettings
from helpsteer_assets.modpo.models.loading import load_model, load_tokenizer
from helpsteer_assets.modpo.models.tokenization import encode_prompt
from helpsteer_assets.modpo.scoring.raters import RewardModelRater
from helpsteer_assets_tests.assets.conftest import quick_experiment
from helpsteer_assets_tests.hostile.planted import EMBEDDED, Planted


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


def rater_settings(path: Path, **changes: Any) -> RewardModelSettings:
    return RewardModelSettings(**{"model": str(path), "heads": {"helpfulness": 0}, "max_length": 64} | changes)


def test_the_planted_code_and_pickle_would_run(planted: Planted) -> None:
    with open(planted.pickled(planted.model("a")) / "pytorch_model.bin", "rb") as file:  # noqa: PTH123
        pickle.load(file).close()
    assert planted.trace.exists()
    planted.trace.unlink()
    with pytest.raises(Exception, match="Own"):
        load_model(planted.with_code(planted.model("b")), precision="fp32", trust_remote_code=True)
    assert planted.trace.exists()


def test_pickled_weights_are_refused_and_not_read(planted: Planted) -> None:
    base, rater = planted.pickled(planted.model("base")), planted.pickled(planted.rater("rater"))
    for loading in (
        lambda: load_model(base, precision="fp32"),
        lambda: RewardModelRater(rater, rater_settings(rater)),
    ):
        with pytest.raises(HelpsteerError, match=r"pytorch_model.bin.*safetensors") as caught:
            loading()
        assert "save_pretrained" in str(caught.value), "says how to convert them"
    # What torch itself would accept is refused alike.
    torch.save(LlamaForCausalLM.from_pretrained(EMBEDDED).state_dict(), base / "pytorch_model.bin")
    with pytest.raises(HelpsteerError, match=r"pytorch_model.bin"):
        load_model(base, precision="fp32")
    assert not planted.trace.exists()


def test_check_names_pickled_weights(planted: Planted) -> None:
    experiment = quick_experiment(planted.folder, model={"base": str(planted.pickled(planted.model("base")))})
    lines: list[str] = []
    with pytest.raises(HelpsteerError, match="cannot run as it is"):
        lines += report(experiment, planted.folder / "home")
    assert not planted.trace.exists()


def test_of_a_model_on_the_hub_no_pickle_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client's own filter, on the names of a repository."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a/optimizer.pt", "x.ckpt"]
    fetched: list[str] = []

    def fetch(repo: str, *, allow_patterns: Any, ignore_patterns: Any, **options: Any) -> str:
        fetched.extend(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub.download("owner/name", "0" * 40, "model")
    assert fetched == ["model.safetensors"]
    assert constants.HF_HUB_CACHE  # the client is the real one


def test_code_of_a_rater_is_refused_and_does_not_run(planted: Planted) -> None:
    path = planted.with_code(planted.rater("rater"))
    with pytest.raises(HelpsteerError, match=r"code of its own .*trust_remote_code: true"):
        RewardModelRater(path, rater_settings(path))
    rater = {"model": str(path), "heads": {"helpfulness": 0}, "max_length": 64}
    experiment = quick_experiment(planted.folder, evaluation={"rater": rater})
    with pytest.raises(HelpsteerError, match="cannot run as it is"):
        list(report(experiment, planted.folder / "home"))
    assert not planted.trace.exists()


def test_code_of_a_base_model_does_not_run_in_check(planted: Planted) -> None:
    """Its architecture is known here too, so that the library's own class is taken. Stages: test_graph.py."""
    base = planted.with_code(planted.model("base"))
    load_tokenizer(base)
    load_model(base, precision="fp32")
    list(report(quick_experiment(planted.folder, model={"base": str(base)}), planted.folder / "home"))
    assert not planted.trace.exists()


TEMPLATES = {
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "loops": "{% for i in range(10**9) %}x{% endfor %}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "is broken": "{% for",
    "lacks a name": "{{ messages[7]['content'] }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_chat_template_ends_in_words(planted: Planted, template: str) -> None:
    base, rater = planted.model("base"), planted.rater("rater")
    for model in (base, rater):
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(HelpsteerError, match=f"chat template of .*{base.name} fails"):
        encode_prompt(load_tokenizer(base), "a", 8)
    with pytest.raises(HelpsteerError, match=f"chat template of .*{rater.name} fails"):
        RewardModelRater(rater, rater_settings(rater))(["a"], ["b"])

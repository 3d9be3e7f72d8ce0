"""Models from strangers: no pickle is read, and no code that comes with one runs unless the experiment says so.

That no stage runs it is tested in test_graph.py.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpsteer_assets.assets import hub
from helpsteer_assets.commands.check import report
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import RewardModelSettings
from helpsteer_assets.modpo.models.loading import load_model, load_tokenizer
from helpsteer_assets.modpo.models.tokenization import encode_prompt
from helpsteer_assets.modpo.scoring.raters import RewardModelRater
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import quick_experiment
from helpsteer_assets_tests.hostile.planted import EMBEDDED, Planted

RATER = {"heads": {"helpfulness": 0}, "max_length": 64}


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


def rater_of(path: Path) -> RewardModelRater:
    return RewardModelRater(path, RewardModelSettings(model=str(path), **RATER))


def test_the_planted_code_and_pickle_would_run(planted: Planted) -> None:
    with (planted.pickled(planted.model("a")) / "pytorch_model.bin").open("rb") as file:
        pickle.load(file).close()
    assert planted.trace.exists()
    planted.trace.unlink()
    with pytest.raises(Exception, match="Own"):
        load_model(planted.with_code(planted.model("b")), precision="fp32", trust_remote_code=True)
    assert planted.trace.exists()


def test_pickled_weights_are_refused_and_not_read(planted: Planted) -> None:
    base, rater = planted.pickled(planted.model("base")), planted.pickled(planted.rater("rater"))
    with pytest.raises(HelpsteerError, match=r"pytorch_model.bin.*safetensors.* save_pretrained"):
        rater_of(rater)
    with pytest.raises(HelpsteerError, match="cannot run as it is"):
        list(report(quick_experiment(planted.folder, model={"base": str(base)}), Home(planted.folder / "home")))
    # So are those that torch itself would accept.
    torch.save(LlamaForCausalLM.from_pretrained(EMBEDDED).state_dict(), base / "pytorch_model.bin")
    with pytest.raises(HelpsteerError, match=r"pytorch_model.bin"):
        load_model(base, precision="fp32")
    assert not planted.trace.exists()


def test_no_pickle_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_code_of_a_rater_is_refused_and_does_not_run(planted: Planted) -> None:
    path = planted.with_code(planted.rater("rater"))
    with pytest.raises(HelpsteerError, match=r"code of its own .*trust_remote_code: true"):
        rater_of(path)
    experiment = quick_experiment(planted.folder, evaluation={"rater": {"model": str(path), **RATER}})
    with pytest.raises(HelpsteerError, match="cannot run as it is"):
        list(report(experiment, Home(planted.folder / "home")))
    assert not planted.trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for",
        "{{ messages[7]['content'] }}",
    ],
)
def test_a_hostile_chat_template_ends_in_words(planted: Planted, template: str) -> None:
    base = planted.model("base")
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(HelpsteerError, match=f"chat template of .*{base.name} fails"):
        encode_prompt(load_tokenizer(base), "a", 8)

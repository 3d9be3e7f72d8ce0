"""Models from strangers: no pickle is read, and no code that comes with one runs unless the experiment says so.

That no stage runs it is tested in test_graph.py, a rater's code in modpo/scoring/test_raters.py.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from helpsteer_assets.assets import hub
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import RewardModelSettings
from helpsteer_assets.modpo.models.loading import load_model
from helpsteer_assets.modpo.scoring.raters import RewardModelRater
from helpsteer_assets_tests.hostile.planted import Planted


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


def test_the_planted_code_and_pickle_would_run(planted: Planted) -> None:
    with (planted.pickled(planted.model("a")) / "pytorch_model.bin").open("rb") as file:
        pickle.load(file).close()
    assert planted.trace.exists()
    planted.trace.unlink()
    with pytest.raises(Exception, match="Own"):
        load_model(planted.with_code(planted.model("b")), precision="fp32", trust_remote_code=True)
    assert planted.trace.exists()


def test_pickled_weights_are_refused_and_not_read(planted: Planted) -> None:
    model = planted.pickled(planted.model("model"))
    with pytest.raises(HelpsteerError, match=r"pytorch_model.bin.*safetensors.* save_pretrained"):
        load_model(model, precision="fp32")
    with pytest.raises(HelpsteerError, match=r"pytorch_model.bin.*safetensors.* save_pretrained"):
        RewardModelRater(model, RewardModelSettings(model=str(model), heads={"helpfulness": 0}))
    assert not planted.trace.exists()


def test_no_pickle_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the client's own filter."""
    names = ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a/optimizer.pt", "x.ckpt"]
    fetched: list[str] = []

    def fetch(repo: str, *, allow_patterns: Any, ignore_patterns: Any, **options: Any) -> str:
        fetched.extend(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub.download("owner/name", "0" * 40, "model")
    assert fetched == ["model.safetensors"]

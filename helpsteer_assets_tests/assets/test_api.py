"""Results in Python, as a notebook takes them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import helpsteer_assets as hs
from helpsteer_assets.commands.export import require_finished
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.tables import TABLES
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.conftest import Finished


@pytest.fixture
def here(quick: Finished, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The finished experiment and its home, named by the two variables."""
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", str(quick.home.parent / "quick.yaml"))
    monkeypatch.setenv("HELPSTEER_HOME", str(quick.home))
    return quick


def responses(finished: Finished, asset: str, partition: str) -> pa.Table:
    ((*_, fingerprint),) = require_finished(finished.experiment, finished.home, [(asset, partition)])
    artifact = ArtifactStore(finished.home).find(asset, partition, fingerprint)
    assert artifact is not None
    return pq.read_table(artifact.file("generations.parquet"))


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, helpsteer_assets as hs\n"
        "assert {'load_policy', 'load_table'} <= set(dir(hs))\n"
        "print([name for name in sys.modules if name.startswith('helpsteer_assets.') or name in ('torch', 'pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_table_is_loaded_as_arrow_and_makes_a_data_frame(here: Finished) -> None:
    scores = hs.load_table("scores")
    assert isinstance(scores, pa.Table)
    assert scores.column_names == [column.name for column in TABLES["scores"].columns]
    _, rows = Warehouse(here.home).query(
        "SELECT * FROM scores WHERE experiment = 'quick' ORDER BY policy, w, prompt_id"
    )
    assert [tuple(row.values()) for row in scores.to_pylist()] == rows
    frame = scores.to_pandas()
    assert len(frame) == 3 * 8 and frame.groupby("w")["helpfulness"].mean().between(0, 4).all()


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_can_be_loaded(here: Finished, name: str) -> None:
    assert hs.load_table(name).column_names == [column.name for column in TABLES[name].columns]


def test_a_table_holds_one_experiment_or_all(copied: Callable[..., Finished], tmp_path: Path) -> None:
    other = copied(name="other")
    assert other.run(weights=["0.1"]), other.announced
    path = tmp_path / "other.yaml"
    counts = [
        set(hs.load_table("scores", experiment=path, home=other.home)["experiment"].to_pylist()),
        set(
            hs.load_table("scores", experiment=path, home=str(other.home), all_experiments=True)[
                "experiment"
            ].to_pylist()
        ),
        hs.load_table("scores", experiment="demo", home=other.home).num_rows,
    ]
    assert counts == [{"other"}, {"quick", "other"}, 0]


@pytest.mark.parametrize(
    ("w", "asset", "partition"), [("0.1", "generations", "0.1"), ("sft", "sft_generations", "all")]
)
def test_a_policy_answers_as_in_the_evaluation(here: Finished, w: str, asset: str, partition: str) -> None:
    policy = hs.load_policy(w)
    table = responses(here, asset, partition)
    assert policy.generate(table["prompt"].to_pylist()) == table["response"].to_pylist()
    assert policy.w == (None if w == "sft" else w) and policy.generate([]) == []
    assert not any(
        isinstance(module, torch.nn.Module) and hasattr(module, "lora_A") for module in policy.model.modules()
    )


def test_a_weight_is_named_as_a_number_too(here: Finished) -> None:
    assert hs.load_policy(0.9).fingerprint == hs.load_policy("w=0.90").fingerprint


def test_mistakes_are_said_in_words(here: Finished, tmp_path: Path) -> None:
    with pytest.raises(HelpsteerError, match=r"there is no table 'score'; there are .*scores"):
        hs.load_table("score")
    with pytest.raises(HelpsteerError, match="nothing materialized yet; run `helpsteer run`"):
        hs.load_table("scores", home=tmp_path / "nowhere")
    with pytest.raises(HelpsteerError, match="did you mean `demo`"):
        hs.load_table("scores", experiment="dmo")
    with pytest.raises(HelpsteerError, match=r"w=0.4 is not in the grid of experiment quick \(there are sft, w=0.1"):
        hs.load_policy(0.4)
    with pytest.raises(HelpsteerError, match=r"sft_model of experiment quick is not there.*`helpsteer run`"):
        hs.load_policy("0.1", home=tmp_path / "nowhere")
    with pytest.raises(HelpsteerError, match="a list of prompts"):
        hs.load_policy("sft").generate("How do I fold a shirt?")
    assert not (tmp_path / "nowhere").exists(), "looking makes no home"
    with pytest.raises(AttributeError, match="no attribute 'load_tabel'"):
        hs.load_tabel  # noqa: B018

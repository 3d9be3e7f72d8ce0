"""Results in Python, as a notebook takes them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import helpsteer_assets as hs
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.tables import TABLES
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished


@pytest.fixture
def here(finished_home: Finished, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The finished experiment and its home, named by the two variables."""
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", str(finished_home.file))
    monkeypatch.setenv("HELPSTEER_HOME", str(finished_home.home))
    return finished_home


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
    for name, table in TABLES.items():
        assert hs.load_table(name).column_names == [column.name for column in table.columns]
    _, rows = Warehouse(here.home).query(
        "SELECT * FROM scores WHERE experiment = 'quick' ORDER BY policy, w, prompt_id"
    )
    assert [tuple(row.values()) for row in scores.to_pylist()] == rows
    frame = scores.to_pandas()
    assert len(frame) == 3 * 8 and frame.groupby("w")["helpfulness"].mean().between(0, 4).all()


def test_a_table_holds_one_experiment_or_all(copied: Callable[..., Finished], tmp_path: Path) -> None:
    other = copied(name="other")
    assert other.run(weights=["0.1"]), other.announced
    path = tmp_path / "other.yaml"
    one = hs.load_table("scores", experiment=path, home=other.home)
    both = hs.load_table("scores", experiment=path, home=str(other.home), all_experiments=True)
    assert set(one["experiment"].to_pylist()) == {"other"}
    assert set(both["experiment"].to_pylist()) == {"quick", "other"}
    assert hs.load_table("scores", experiment="demo", home=other.home).num_rows == 0


@pytest.mark.parametrize("w", ["0.1", "sft"])
def test_a_policy_answers_as_in_the_evaluation(here: Finished, w: str) -> None:
    policy = hs.load_policy(w if w == "sft" else float(w))
    rows = [row for row in hs.load_table("generations").to_pylist() if row["w"] == policy.w]
    assert policy.w == (None if w == "sft" else w)
    in_order = here.artifact("evaluation_prompts").table("prompts.parquet")["prompt_id"].to_pylist()
    rows.sort(key=lambda row: in_order.index(row["prompt_id"]))
    assert policy.generate([row["prompt"] for row in rows]) == [row["response"] for row in rows]
    assert policy.generate([]) == []
    assert not any(hasattr(module, "lora_A") for module in policy.model.modules())


def test_mistakes_are_said_in_words(here: Finished, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for mistake, message in (
        (lambda: hs.load_table("score"), r"there is no table 'score'; there are .*scores"),
        (lambda: hs.load_table("scores", home=nowhere), "nothing materialized yet; run `helpsteer run`"),
        (lambda: hs.load_table("scores", experiment="dmo"), "did you mean `demo`"),
        (lambda: hs.load_policy(0.4), "0.4 is not in the grid of experiment quick"),
        (lambda: hs.load_policy("0.1", home=nowhere), r"sft_model of experiment quick is missing .*`helpsteer run`"),
        (lambda: hs.load_policy("sft").generate("How do I fold a shirt?"), "a list of prompts"),
    ):
        with pytest.raises(HelpsteerError, match=message):
            mistake()
    assert not nowhere.exists(), "looking makes no home"
    with pytest.raises(AttributeError, match="no attribute 'load_tabel'"):
        hs.load_tabel  # noqa: B018

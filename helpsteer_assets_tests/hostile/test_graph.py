"""The whole graph on hostile texts, a model with code of its own, and paths with odd names."""

from pathlib import Path

import pytest

from helpsteer_assets.assets.status import status
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished, quick_experiment
from helpsteer_assets_tests.hostile.inputs import TEXTS, jsonl, row
from helpsteer_assets_tests.hostile.planted import Planted

PROMPTS = [f"{text} {number}" for text in TEXTS for number in range(3)] + ["long " * 200_000 + TEXTS[0]]
ROWS = [
    row(prompt, f"{rating} {TEXTS[number % len(TEXTS)] * rating}", rating, 2, 2, 2, rating)
    for number, prompt in enumerate(PROMPTS)
    for rating in (1, 2, 3)
]


class Hostile(Finished):
    """A finished run on them, whose base model has code of its own."""

    def __init__(self, folder: Path) -> None:
        self.planted = Planted(folder)
        (folder / "da[t]a").mkdir()
        (folder / "da[t]a" / "train.jsonl").write_bytes(jsonl(ROWS))
        (folder / "source").symlink_to(folder / "da[t]a")
        data = {"source": str(folder / "source"), "max_train_prompts": None, "max_validation_prompts": None}
        experiment = quick_experiment(
            folder,
            description=TEXTS[7],
            data=data | {"validation_share": 0.3},
            model={"base": str(self.planted.with_code(self.planted.model("base")))},
            objective={"weights": [0.5]},
            sft={"steps": 2},
            margin_adapter={"steps": 2},
            modpo={"steps": 2},
            generation={"max_new_tokens": 16},
            evaluation={"rater": "none", "prompts": 12},
        )
        super().__init__(experiment, folder / "ho[m]e *")
        before = self.outside(folder)
        assert self.run(), self.announced
        self.unchanged = self.outside(folder) == before

    def outside(self, folder: Path) -> dict[Path, int]:
        """When each file outside the home was changed last."""
        return {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if not p.is_relative_to(self.home)}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    return Hostile(tmp_path_factory.mktemp("hostile"))


def test_every_stage_finishes_runs_no_code_of_the_model_and_writes_nothing_beside_the_home(hostile: Hostile) -> None:
    assert {state.state for state in status(hostile.experiment, Home(hostile.home))} == {"complete"}
    assert hostile.unchanged and not hostile.planted.trace.exists()


def test_published_texts_are_those_that_were_given(hostile: Hostile) -> None:
    query = Warehouse(hostile.home).query
    published = set()
    for rank in ("chosen", "rejected"):
        published |= {*query(f"SELECT prompt, {rank}, {rank}_helpfulness FROM preference_pairs")[1]}
    assert published == {(r["prompt"], r["response"], r["helpfulness"]) for r in ROWS}
    asked = {prompt for (prompt,) in query("SELECT DISTINCT prompt FROM generations")[1]}
    assert len(asked) == 12 and asked <= set(PROMPTS)

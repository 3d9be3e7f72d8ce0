"""The whole graph on hostile texts, a model with code of its own, and paths with odd names."""

import json
from pathlib import Path

import pytest

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import Finished, quick_experiment
from helpsteer_assets_tests.hostile.inputs import TEXTS, row
from helpsteer_assets_tests.hostile.planted import Planted

PROMPTS = [f"{text} {number}" for text in TEXTS for number in range(3)] + ["long " * 200_000 + TEXTS[0]]
ROWS = [
    row(prompt, f"{rating} {TEXTS[number % len(TEXTS)] * rating}", rating, 2, 2, 2, rating)
    for number, prompt in enumerate(PROMPTS)
    for rating in (1, 2, 3)
]


def everything_but(folder: Path, home: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that lies in a folder, the home left out."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_relative_to(home)
    }


class Hostile(Finished):
    """A finished run, and whether it changed anything outside its home."""

    def __init__(self, folder: Path) -> None:
        self.planted = Planted(folder)
        home = folder / "ho[m]e *"
        (folder / "da[t]a").mkdir()
        (folder / "da[t]a" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
        (folder / "source").symlink_to(folder / "da[t]a")
        experiment = quick_experiment(
            folder,
            description=TEXTS[11],
            data={
                "source": str(folder / "source"),
                "validation_share": 0.3,
                "max_train_prompts": None,
                "max_validation_prompts": None,
            },
            model={"base": str(self.planted.with_code(self.planted.model("base")))},
            objective={"weights": [0.5]},
            sft={"steps": 2},
            margin_adapter={"steps": 2},
            modpo={"steps": 2},
            generation={"max_new_tokens": 16},
            evaluation={"rater": "none", "prompts": 12},
        )
        super().__init__(experiment, home)
        before = everything_but(folder, home)
        assert self.run(), self.announced
        self.unchanged = everything_but(folder, home) == before


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    return Hostile(tmp_path_factory.mktemp("hostile"))


def test_every_stage_finishes_runs_no_code_of_the_model_and_writes_nothing_beside_the_home(hostile: Hostile) -> None:
    assert {state.state for state in status(hostile.experiment, Home(hostile.home))} == {"complete"}
    assert hostile.unchanged and not hostile.planted.trace.exists()
    store = ArtifactStore(hostile.home)
    for (asset, partition), fingerprint in fingerprints(hostile.experiment).items():
        artifact = store.find(asset, partition, fingerprint.value)
        assert artifact is not None and store.verify(artifact) == []


def test_published_texts_are_those_that_were_given(hostile: Hostile) -> None:
    query = Warehouse(hostile.home).query
    published = set()
    for rank in ("chosen", "rejected"):
        published |= {*query(f"SELECT prompt, {rank}, {rank}_helpfulness FROM preference_pairs")[1]}
    assert published == {(r["prompt"], r["response"], r["helpfulness"]) for r in ROWS}
    asked = {prompt for (prompt,) in query("SELECT DISTINCT prompt FROM generations")[1]}
    assert len(asked) == 12 and asked <= set(PROMPTS)
    # A text in a query is a value: it finds its own rows and runs nothing.
    for text in TEXTS:
        quoted = text.replace("'", "''")
        if "\x00" not in text:
            assert query(f"SELECT count(*) FROM preference_pairs WHERE prompt = '{quoted} 0'")[1] == [(3,)]

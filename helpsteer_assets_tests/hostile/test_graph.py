"""The whole graph on hostile texts, a model with code of its own, and paths with odd names."""

import json
import os
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.conftest import Finished, quick_experiment
from helpsteer_assets_tests.hostile.inputs import TEXTS, row
from helpsteer_assets_tests.hostile.planted import Planted

PROMPTS = [f"{text} {number}" for text in TEXTS for number in range(6)] + ["long " * 200_000 + TEXTS[0]]
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
        if not path.is_relative_to(home) and path != home
    }


class Hostile(Finished):
    """A finished run, and what it left outside its home."""

    def __init__(self, folder: Path) -> None:
        self.planted = Planted(folder)
        home = folder / "ho[m]e *"
        (folder / "da[t]a").mkdir()
        (folder / "da[t]a" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
        (folder / "source").symlink_to(folder / "da[t]a")
        experiment = quick_experiment(
            folder,
            description=TEXTS[11],
            data={"source": str(folder / "source"), "validation_share": 0.3},
            model={"base": str(self.planted.with_code(self.planted.model("base")))},
            objective={"weights": [0.5]},
            sft={"batch_size": 8},
            margin_adapter={"batch_size": 8},
            modpo={"batch_size": 4},
            evaluation={"rater": "none", "prompts": 30},
        )
        super().__init__(experiment, home)
        before = everything_but(folder, home)
        self.succeeded = self.run()
        self.unchanged = everything_but(folder, home) == before

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return Warehouse(self.home).query(sql)[1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    finished = Hostile(tmp_path_factory.mktemp("hostile"))
    assert finished.succeeded, finished.announced
    return finished


def test_every_stage_finishes_and_nothing_is_written_beside_the_home(hostile: Hostile) -> None:
    assert {state.state for state in status(hostile.experiment, hostile.home)} == {"complete"}
    assert hostile.unchanged


def test_code_that_comes_with_the_model_ran_in_no_stage(hostile: Hostile) -> None:
    assert not hostile.planted.trace.exists()


def test_published_texts_are_those_that_were_given(hostile: Hostile) -> None:
    given = {(r["prompt"], r["response"], r["helpfulness"]) for r in ROWS}
    pairs = hostile.rows(
        "SELECT prompt, chosen, rejected, chosen_helpfulness, rejected_helpfulness FROM preference_pairs"
    )
    published = {(prompt, chosen, rating) for prompt, chosen, _, rating, _ in pairs}
    published |= {(prompt, rejected, rating) for prompt, _, rejected, _, rating in pairs}
    assert published == given
    assert len(pairs) == 3 * len(PROMPTS)
    asked = {prompt for (prompt,) in hostile.rows("SELECT DISTINCT prompt FROM generations")}
    assert len(asked) == 30 and asked <= set(PROMPTS)
    # A text in a query is a value: it finds its own rows and runs nothing.
    for text in TEXTS:
        quoted = text.replace("'", "''")
        if "\x00" not in text:
            assert hostile.rows(f"SELECT count(*) FROM preference_pairs WHERE prompt = '{quoted} 0'") == [(3,)]
    assert hostile.rows("SELECT count(*) FROM materializations")[0][0] == len(fingerprints(hostile.experiment))


def test_the_same_prompts_are_asked_of_every_policy(hostile: Hostile) -> None:
    counted = hostile.rows("SELECT policy, count(*), count(DISTINCT prompt_id) FROM generations GROUP BY policy")
    assert sorted(counted) == [("modpo", 30, 30), ("sft", 30, 30)]


def test_dagster_shows_them(hostile: Hostile) -> None:
    texts = set()
    with dg.DagsterInstance.from_config(str(dagster_home(hostile.home, "quick"))) as instance:
        for asset in ("helpsteer_ratings", "preference_pairs", "evaluation_prompts", "generations", "tradeoff"):
            (record,) = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records
            metadata = record.asset_materialization.metadata
            assert "fingerprint" in metadata
            if "preview" in metadata:
                texts |= {shown.data["prompt"] for shown in metadata["preview"].records}
    assert texts
    assert all(any(prompt.startswith(text.removesuffix(" …")) for prompt in PROMPTS) for text in texts)


def test_running_again_reuses_all_of_it(hostile: Hostile) -> None:
    assert hostile.run()
    assert hostile.rows("SELECT DISTINCT reused FROM materializations") == [(True,)]


def test_artifacts_hold_what_their_manifests_say(hostile: Hostile) -> None:
    store = ArtifactStore(hostile.home)
    for (asset, partition), fingerprint in fingerprints(hostile.experiment).items():
        artifact = store.find(asset, partition, fingerprint.value)
        assert artifact is not None and store.verify(artifact) == []
    pairs = pq.read_table(next(hostile.home.glob("artifacts/preference_pairs/all/*/pairs.parquet")))
    assert max(len(prompt.encode()) for prompt in pairs["prompt"].to_pylist()) > 10**6
    adapters = [*hostile.home.glob("artifacts/*/*/*/adapter/*"), *hostile.home.glob("artifacts/sft_model/*/*/model/*")]
    assert adapters and not [file.name for file in adapters if re.search(r"\.(bin|pt|pkl|py)$", file.name)]
    assert all(os.path.realpath(path).startswith(os.path.realpath(hostile.home)) for path in hostile.home.rglob("*"))

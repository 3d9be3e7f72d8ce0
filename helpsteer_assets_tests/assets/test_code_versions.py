"""Whoever changes code that determines results is asked whether they change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpsteer_assets.assets.graph import STAGES
from helpsteer_assets_tests.assets.code_digests import PACKAGE, REFRESH, STORED, Code

NAMES = {stage.name for stage in STAGES}


def test_the_code_of_every_stage_is_what_its_version_says() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    present = Code().stage_digests()
    changed = [name for name in {**stored, **present} if stored.get(name) != present.get(name)]
    assert not changed, (
        f"the code of {', '.join(changed)} changed: raise `version` in the @stage of those that now compute something "
        f"else, then run `{REFRESH}`"
    )


@pytest.fixture
def after(tmp_path: Path) -> Callable[[str, str, str], set[str]]:
    """The stages whose digest changes where a text in a file of the package is replaced."""
    copy = tmp_path / "helpsteer_assets"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("model", "__pycache__"))
    before = Code().stage_digests()

    def changed(file: str, old: str, new: str) -> set[str]:
        path = copy / file
        original = path.read_text(encoding="utf-8")
        assert old in original
        path.write_text(original.replace(old, new), encoding="utf-8")
        now = Code(copy).stage_digests()
        path.write_text(original, encoding="utf-8")
        return {name for name in before if now[name] != before[name]}

    return changed


def test_code_counts_for_the_stages_that_reach_it_and_for_no_others(
    after: Callable[[str, str, str], set[str]],
) -> None:
    assert after("modpo/training/losses.py", "logsigmoid(", "sigmoid(") == {"margin_adapter", "modpo_models"}
    # `policy_scores` stands in evaluation.py, and `score_summary`, in tradeoff.py, calls it.
    assert after("assets/evaluation.py", "sign * reward", "sign * -reward") == {"score_summary"}
    assert after("report/report.css", "}", "}\n") == {"tradeoff_report"}
    assert after("embedded/generator.py", "def build_rows(", "SEED = 5\n\n\ndef build_rows(") == set()
    assert after("modpo/data/attributes.py", '"verbosity"', '"brevity"') >= {"helpsteer_ratings", "scores"}
    assert after("assets/run.py", 'compression="zstd"', 'compression="gzip"') == NAMES


def test_words_annotations_and_places_count_for_nothing(after: Callable[[str, str, str], set[str]]) -> None:
    assert after("assets/data.py", "Unique held-out prompts", "Prompts") == set()
    assert after("assets/data.py", "attribute: str", "attribute: object") == set()

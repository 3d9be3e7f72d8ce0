"""Whoever changes code that determines results is asked whether they change."""

import json
from pathlib import Path

import pytest

from helpsteer_assets.assets.graph import CODE_VERSIONS, stages
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets_tests.update_code_digests import PACKAGE, STORED, piece_digest

DIGESTS = json.loads(STORED.read_text(encoding="utf-8"))
REFRESH = "run `python -m helpsteer_assets_tests.update_code_digests`"


@pytest.mark.parametrize("piece", CODE_VERSIONS)
def test_code_is_what_its_version_says(piece: str) -> None:
    assert piece_digest(piece) == DIGESTS.get(piece), (
        f"{piece} changed: if it changes what is computed, raise CODE_VERSIONS[{piece!r}] in stages.py; then {REFRESH}"
    )


def test_no_digest_is_left_over() -> None:
    assert set(DIGESTS) == set(CODE_VERSIONS), REFRESH


def test_every_piece_enters_a_stage() -> None:
    demo = load_experiment("demo")
    by_vllm = demo.model_copy(update={"generation": demo.generation.model_copy(update={"engine": "vllm"})})
    used = {piece for experiment in (demo, by_vllm) for stage in stages(experiment).values() for piece in stage.code}
    assert used == set(CODE_VERSIONS)


def test_every_stage_depends_on_the_code_of_its_own_asset() -> None:
    for stage in stages(load_experiment("demo")).values():
        assert any(piece.startswith("assets/") and piece.endswith(f":{stage.name}") for piece in stage.code), stage.name


@pytest.mark.parametrize(
    ("after", "asks"),
    [
        (
            '"""Other words."""\nimport os\n\n\ndef f(x):  # said otherwise\n    """Other."""\n    return _g(x) * C\n',
            False,
        ),
        ("def f(x):\n    return _g(x) * D\n", True),
        ("def f(x):\n    return (\n        _g(x)\n        * C\n    )\n", False),
    ],
)
def test_a_digest_sees_what_code_does_and_nothing_else(tmp_path: Path, after: str, asks: bool) -> None:
    rest = "C = 2\nD = 3\n\n\ndef _g(x):\n    return x + 1\n"
    (tmp_path / "a.py").write_text(f"def f(x):\n    return _g(x) * C\n\n\n{rest}")
    (tmp_path / "b.py").write_text(f"{after}\n\n{rest}")
    for piece in ("{}.py", "{}.py:f"):
        before, now = (piece_digest(piece.format(name), tmp_path) for name in "ab")
        assert (before != now) is asks


@pytest.mark.parametrize(("line", "asks"), [("_H = 4", True), ("_G = 4", True), ("OTHER = 4", False)])
def test_a_function_is_digested_with_all_that_it_uses_of_its_module(tmp_path: Path, line: str, asks: bool) -> None:
    module = "_H = 1\n_G = 2\nOTHER = 3\n\n\ndef _g():\n    return _G + _H\n\n\ndef f():\n    return _g()\n"
    (tmp_path / "a.py").write_text(module)
    (tmp_path / "b.py").write_text("\n".join(line if old[:3] == line[:3] else old for old in module.split("\n")))
    assert (piece_digest("a.py:f", tmp_path) != piece_digest("b.py:f", tmp_path)) is asks
    with pytest.raises(KeyError, match="no function g"):
        piece_digest("a.py:g", tmp_path)


def test_pieces_name_files_of_the_package() -> None:
    assert {piece for piece in CODE_VERSIONS if not (PACKAGE / piece.partition(":")[0]).is_file()} == set()

"""What the README shows works as it stands there."""

import re
from pathlib import Path

import click
import pytest
import yaml

from helpsteer_assets.cli import main
from helpsteer_assets.experiment import load_experiment
from helpsteer_assets.resources.artifacts import ALL, ArtifactStore
from helpsteer_assets.resources.warehouse import Warehouse
from helpsteer_assets.stages import fingerprints
from helpsteer_assets_tests.assets.conftest import Finished

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("sql", blocks("sql"))
def test_each_worked_query_finds_rows(quick: Finished, sql: str) -> None:
    _, rows = Warehouse(quick.home).query(sql.replace("'demo'", "'quick'"))
    assert rows


def test_five_queries_are_worked() -> None:
    assert len(blocks("sql")) == 5


def test_the_experiment_it_shows_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    experiment = load_experiment(str(path))
    assert experiment.name == yaml.safe_load(text)["name"]
    assert experiment.data.source == str(tmp_path / "ratings")


def test_the_python_it_shows_loads_a_policy(quick: Finished) -> None:
    (code,) = blocks("python")
    found = fingerprints(quick.experiment)
    store = ArtifactStore(quick.home)
    sft = store.get("sft_model", ALL, found["sft_model", ALL].value)
    policy = store.get("modpo_models", "0.1", found["modpo_models", "0.1"].value)
    assert sft is not None and policy is not None
    namespace = {"sft_model": sft.path, "modpo_model": policy.path}
    exec(code, namespace)
    assert namespace["policy"].active_adapter == "default"


def test_each_picture_and_page_it_points_to_is_there() -> None:
    targets = re.findall(r"\]\((docs/[^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_each_command_is_one_that_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    for words in filter(None, lines):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == ".venv/bin/helpsteer":
            with main.make_context("helpsteer", list(words[1:])) as context:
                name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
                assert name is not None
                quoted = " ".join(rest).split('"')
                arguments = [part for i, text in enumerate(quoted) for part in ([text] if i % 2 else text.split())]
                with click.Context(command):
                    command.make_context(name, arguments, parent=context)
        else:
            assert words[0] in (".venv/bin/hf", "duckdb"), words

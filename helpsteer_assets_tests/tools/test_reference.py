"""The committed references are what the code says now."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from helpsteer_assets.cli import main
from helpsteer_assets.experiment.reading import _sections
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.tables import TABLES
from tools.reference import write_references

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("settings.md", "tables.md", "commands.md")


@pytest.mark.parametrize("name", NAMES)
def test_committed_reference_is_what_is_written_now(name: str, tmp_path: Path) -> None:
    write_references(tmp_path / "docs")
    expected = (tmp_path / "docs" / name).read_text(encoding="utf-8")
    assert (DOCS / name).read_text(encoding="utf-8") == expected, "run `python -m tools.reference`"


def test_every_setting_column_and_option_is_there() -> None:
    settings, tables, commands = ((DOCS / name).read_text(encoding="utf-8") for name in NAMES)

    def visit(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert f"| `{name}` | " in settings
            assert field.description and f" {field.description} |" in settings.replace("\\|", "|")
            for section in _sections(field.annotation):
                visit(section)

    visit(Experiment)
    for table in TABLES.values():
        assert all(f"| `{column.name}` | {column.type} | " in tables for column in table.columns)
    for command in main.commands.values():
        for parameter in command.params:
            assert all(option in commands for option in parameter.opts if option.startswith("-")), parameter

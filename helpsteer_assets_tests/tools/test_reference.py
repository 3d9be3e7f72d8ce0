"""The committed references are what the code says now."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from helpsteer_assets.cli import main
from helpsteer_assets.experiment.reading import _sections
from helpsteer_assets.experiment.settings import Experiment, Section
from helpsteer_assets.store.tables import TABLES
from tools.reference import commands_reference, settings_reference, tables_reference, write_references

DOCS = Path(__file__).parents[2] / "docs"


def escaped(text: str) -> str:
    """As a cell of a Markdown table."""
    return text.replace("|", "\\|")


REFERENCES = {"settings.md": settings_reference, "tables.md": tables_reference, "commands.md": commands_reference}


@pytest.mark.parametrize(("name", "make"), REFERENCES.items())
def test_committed_reference_is_what_is_generated_now(name: str, make) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == make(), "run `python -m tools.reference`"


def test_references_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    written = write_references(tmp_path / "new" / "docs")
    assert {path.name: path.read_text(encoding="utf-8") for path in written} == {
        name: make() for name, make in REFERENCES.items()
    }


def test_every_key_of_every_section_is_there_with_its_meaning() -> None:
    text = settings_reference()

    def visit(model: type[BaseModel]) -> None:
        assert issubclass(model, Section)
        for name, field in model.model_fields.items():
            assert f"| `{name}` | " in text
            assert field.description and f" {escaped(field.description)} |" in text
            for section in _sections(field.annotation):
                assert f"`{name}`\n" in text or f".{name}`\n" in text
                visit(section)

    visit(Experiment)


@pytest.mark.parametrize(
    "row",
    [
        "| `precision` | `fp32` \\| `bf16` | required |",
        "| `steps` | whole number >= 1 \\| null | `null` |",
        "| `weights` | list of numbers in (0, 1], each once, at most 99 | required |",
        "| `selection_share` | number > 0 and < 0.5 | `0.05` |",
        "| `rater` | `none` \\| `embedded` \\| section | `none` |",
        "| `target_modules` | `all-linear` \\| list of names | `all-linear` |",
        "| `margin_beta` | number > 0 \\| null | `0.1` |",
    ],
)
def test_types_bounds_and_defaults_are_in_a_yaml_writers_words(row: str) -> None:
    assert row in settings_reference()


def test_every_column_of_every_table_is_there() -> None:
    text = tables_reference()
    for table in TABLES.values():
        section = text.split(f"## `{table.name}`")[1].split("\n## ")[0]
        if table.name == "margin_pairs":
            assert "Columns: as in `preference_pairs`." in section
            continue
        for column in table.columns:
            row = f"| `{column.name}` | {column.type} | {escaped(column.comment)} |"
            assert row in section or row in text.split("\n## ")[0]


def test_every_option_of_every_command_is_there() -> None:
    text = commands_reference()
    for name, command in main.commands.items():
        section = text.split(f"## `helpsteer {name}")[1].split("\n## ")[0]
        for parameter in command.params:
            assert all(option in section for option in parameter.opts if option.startswith("-")), parameter

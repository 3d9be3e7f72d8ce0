"""Generates the references of settings, tables and commands, so that they cannot drift from the code.

    python -m tools.reference [FOLDER]

writes `settings.md`, `tables.md` and `commands.md` into FOLDER (default `docs`).
"""

import argparse
import json
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from helpsteer_assets.cli import main as command_line
from helpsteer_assets.experiment.settings import Experiment, SftSettings, TrainingSettings
from helpsteer_assets.store.tables import TABLES, Column

_SETTINGS_INTRO = """\
# Settings

Every key of an experiment file, generated from the code by `python -m tools.reference`.
An experiment is a YAML file. With `extends: <shipped experiment or path>` and its own `name`, it has only the keys
that differ. Unknown keys and wrong types are refused. Under *allowed*, `|` separates alternatives.
`helpsteer check` says whether an experiment suits its source, its model and this machine."""

_TABLES_INTRO = """\
# Tables

The tables of `<home>/warehouse/helpsteer.duckdb`, generated from the code by `python -m tools.reference`.
The database holds the same comments: `SELECT table_name, column_name, comment FROM duckdb_columns()`.
Per experiment and partition, a table holds the rows of the latest materialization.

Columns that mean the same in several tables:"""

_COMMANDS_INTRO = """\
# Commands

Every command of `helpsteer`, generated from the code by `python -m tools.reference`; `helpsteer COMMAND -h`
prints the same. Exit codes: 0 is success, 1 means that it found a failed run or a damaged file, and 2 means that you
must correct something first, which it names."""

_SETTINGS_HEADER = ("key", "allowed", "default", "meaning")
_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_SPELLED = {
    "objective.weights": "list of numbers in (0, 1], each once, at most 99",
    "objective.margin_beta": "number > 0 | null",
    "name": "letters, digits, `-` and `_`, at most 63",
}
"""Where the type alone does not say what a validator asks for."""
_DEFAULTS = {"objective.margin_beta": "`0.1`", "objective.margin_role": "required with an implicit reward"}
"""Where a default depends on other keys."""


def settings_reference() -> str:
    """The settings of an experiment as Markdown: one table for its own keys, and one per section."""
    parts = [_SETTINGS_INTRO, "## The experiment", _markdown(_SETTINGS_HEADER, _rows_of(Experiment, ""))]
    trainings: list[tuple[str, ...]] = []  # the keys that the trainings share stand once
    for name, section in _sections(Experiment, ""):
        rows = _rows_of(section, f"{name}.")
        parts += [f"## `{name}`", (section.__doc__ or "").strip()]
        if issubclass(section, TrainingSettings):
            if trainings:
                missing = [f"`{key}`" for key in SftSettings.model_fields if key not in section.model_fields]
                parts.append(f"As `sft`, without {' and '.join(missing)}, but for:")
            rows, trainings = [row for row in rows if row not in trainings], trainings or rows
        parts.append(_markdown(_SETTINGS_HEADER, rows))
    return "\n\n".join(parts) + "\n"


def tables_reference() -> str:
    """The tables of the warehouse as Markdown: columns, DuckDB types and comments; those of several tables once."""
    counts = Counter(column for table in TABLES.values() for column in table.columns)
    shared = [column for column, count in counts.items() if count > 2]
    parts = [_TABLES_INTRO, _columns(shared)]
    first: dict[tuple[Column, ...], str] = {}
    for table in TABLES.values():
        filled = f" From: {', '.join(f'`{asset}`' for asset in table.assets)}." if table.assets else ""
        parts += [f"## `{table.name}`", f"{table.comment}.{filled}"]
        if (same := first.setdefault(table.columns, table.name)) != table.name:
            parts.append(f"Columns: as in `{same}`.")
            continue
        also = ", ".join(f"`{column.name}`" for column in table.columns if column in shared)
        parts += [f"Shared columns: {also}. Own columns:", _columns(c for c in table.columns if c not in shared)]
    return "\n\n".join(parts) + "\n"


def _columns(columns: Iterable[Column]) -> str:
    return _markdown(("column", "type", "meaning"), [(f"`{c.name}`", c.type, c.comment) for c in columns])


def commands_reference() -> str:
    """The commands as Markdown: what each does, its arguments and options."""
    parts = [_COMMANDS_INTRO, "Options of all commands, before their name:", _options_of(command_line)]
    for name, command in command_line.commands.items():
        arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join(["helpsteer", name, *arguments])
        parts += [f"## `{usage}`", *(" ".join(text.split()) for text in (command.help or "").split("\n\n"))]
        parts += [_options_of(command)] if any(isinstance(p, click.Option) for p in command.params) else []
    return "\n\n".join(parts) + "\n"


def _options_of(command: click.Command) -> str:
    context = click.Context(command)
    records = [record for p in command.params if isinstance(p, click.Option) and (record := p.get_help_record(context))]
    return _markdown(("option", "meaning"), [(f"`{names}`", meaning) for names, meaning in records])


def write_references(folder: Path) -> list[Path]:
    """Write the references into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "settings.md": settings_reference(),
        "tables.md": tables_reference(),
        "commands.md": commands_reference(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted key, model) of every section, in the order of the file, subsections behind their section."""
    for name, field in model.model_fields.items():
        for section in _models_in(field.annotation):
            yield f"{prefix}{name}", section
            yield from _sections(section, f"{prefix}{name}.")


def _rows_of(model: type[BaseModel], prefix: str) -> list[tuple[str, ...]]:
    return [
        (f"`{name}`", _allowed(field, f"{prefix}{name}"), _default(field, f"{prefix}{name}"), field.description or "")
        for name, field in model.model_fields.items()
    ]


def _allowed(field: FieldInfo, key: str) -> str:
    if key in _SPELLED:
        return _SPELLED[key]
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(constraint, name)
    ]
    alternatives = list(dict.fromkeys(_spelled(field.annotation)))
    # A bound is one of the number, which stands first, not of the null behind it.
    alternatives[0] = " ".join([alternatives[0], " and ".join(bounds)]).strip()
    return " | ".join(alternatives)


def _spelled(annotation: Any) -> Iterator[str]:
    """The alternatives of a type, in a YAML writer's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPES:
        yield _TYPES[annotation]
    elif _is_section(annotation):
        yield "section"
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin is Annotated:
        yield from _spelled(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        # `null` reads best at the end.
        for argument in sorted(arguments, key=lambda a: a is type(None)):
            yield from _spelled(argument)
    elif origin is list:
        yield "list of names" if arguments[0] is str else f"list of {next(_spelled(arguments[0]))}"
    elif origin is dict:
        yield f"section: {', '.join(_spelled(arguments[0]))}, each a {next(_spelled(arguments[1]))}"
    else:
        raise TypeError(f"no words for the type {annotation!r}; add them to tools/reference.py")


def _default(field: FieldInfo, key: str) -> str:
    if key in _DEFAULTS:
        return _DEFAULTS[key]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "see its keys"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`" if value != "" else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_section(annotation):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Write the references and say where."""
    parser = argparse.ArgumentParser(description="Write the references of settings, tables and commands.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="where to (default: docs)")
    for file in write_references(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()

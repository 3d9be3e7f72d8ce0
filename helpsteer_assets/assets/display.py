"""How the Dagster UI shows tables, texts and plots."""

from typing import Any

import dagster as dg

SHOWN_CHARACTERS = 300


def shorten(text: str) -> str:
    """The beginning of a text, for a table's cell."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def table_metadata(rows: list[dict[str, Any]]) -> dg.TableMetadataValue | dg.TextMetadataValue:
    """Rows as a table; what is neither a number nor a truth value becomes text."""
    if not rows:
        return dg.MetadataValue.text("none")
    shown = [
        {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in row.items()}
        for row in rows
    ]
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    columns = [dg.TableColumn(key, names[type(value)]) for key, value in shown[0].items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in shown], schema=dg.TableSchema(columns=columns))

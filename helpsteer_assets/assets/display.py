"""How the Dagster UI shows numbers, texts and tables."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

SHOWN_CHARACTERS = 300
SHOWN_DIGITS = 5
"""Significant digits of a number: 17 of them fill a column, and none beyond these says anything."""


def shorten(text: str) -> str:
    """The beginning of a text, for a table's cell."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def rounded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with its plain numbers cut to what people read; the artifact keeps the exact ones."""
    return {
        key: float(f"{value:.{SHOWN_DIGITS}g}") if isinstance(value, float) else value
        for key, value in metadata.items()
    }


def table_metadata(rows: list[dict[str, Any]]) -> dg.TableMetadataValue | dg.TextMetadataValue:
    """Rows as a table, numbers rounded, texts shortened; what is neither a number nor a truth value becomes text."""
    if not rows:
        return dg.MetadataValue.text("none")
    shown = [
        {
            key: value if isinstance(value, bool | int | float) else shorten(str(value))
            for key, value in rounded(row).items()
        }
        for row in rows
    ]
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    columns = [dg.TableColumn(key, names[type(value)]) for key, value in shown[0].items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in shown], schema=dg.TableSchema(columns=columns))


def arrow_schema(schema: pa.Schema) -> dg.TableSchema:
    """Columns of a Parquet file, for the UI."""
    return dg.TableSchema(columns=[dg.TableColumn(field.name, str(field.type)) for field in schema])

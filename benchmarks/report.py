"""Results as a report for people, and as JSON."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "dagster", "duckdb", "pyarrow", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    installed = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: version for name, version in installed.items() if version is not None},
    }


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """All numbers, unrounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


def as_text(title: str, result: Mapping[str, Any]) -> str:
    """One case: numbers a line each, lists of rows as tables with a column per row."""
    lines = [title, "=" * len(title)]
    for name, value in result.items():
        if _is_table(value):
            lines += ["", *([] if name == "rows" else [_words(name)]), *_table(value)]
        elif isinstance(value, Mapping) and not _is_ratio(value):
            lines += ["", as_text(_words(name), value)]
        else:
            lines.append(f"{_words(name)}: {_number(value)}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A line per quantity."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_words(name), *(_number(row.get(name)) for row in rows)] for name in names]
    widths = [max(len(line[column]) for line in cells) for column in range(len(rows) + 1)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _is_ratio(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == {"median", "low", "high"}


def _number(value: Any) -> str:
    if _is_ratio(value):
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

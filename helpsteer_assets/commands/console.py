"""Output for a person at a terminal: lines, bars and tables."""

import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from helpsteer_assets.commands.gc import Garbage
    from helpsteer_assets.store.home import Home


def unique(names: list[str]) -> list[str]:
    """Column names as the keys of an object: a join can bring the same name twice."""
    keys: list[str] = []
    for name in names:
        repeated = names[: len(keys)].count(name)
        keys.append(f"{name}_{repeated}" if repeated else name)
    return keys


def json_value(value: object) -> object:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value: object) -> str:
    """A value of a query's result as text."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value))


_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with what a terminal would obey written out: control characters, and those that turn the direction."""
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)


def garbage_rows(garbage: "list[Garbage]", home: "Home") -> list[tuple[str, str, str]]:
    """One row for each; those of a few bytes, such as locks, are counted."""
    from helpsteer_assets.files.durable import size_in_words

    small = Counter(item.reason for item in garbage if item.bytes < 1000)
    large = [item for item in garbage if item.bytes >= 1000]
    rows = [(size_in_words(item.bytes), str(item.path.relative_to(home)), item.reason) for item in large]
    return rows + [("", f"{count} small ones", reason) for reason, count in small.items()]


def table_lines(names: Sequence[str], rows: Iterable[Sequence[str]], *, right_from: int | None = None) -> list[str]:
    """A table as lines of text: as wide as the terminal, or up to 200 characters where there is none.

    The column `right_from` and all after it are aligned to the right; None: no column.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(names):
        numeric = right_from is not None and number >= right_from
        table.add_column(name, overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().split("\n")[1:-2]]  # around it stand empty lines


def command_name() -> str:
    """How to call `helpsteer` from the working directory: by its name where it is on the PATH, else by its path."""
    if shutil.which("helpsteer"):
        return "helpsteer"
    beside = Path(sys.executable).with_name("helpsteer")
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


class Console:
    """Where the person who started a run looks: the standard streams as they were when it was made.

    Dagster sends both streams of a running step into files, and a person would read them late and see no bar.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        err = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self.terminal: TextIO | None = err if err.isatty() else None
        """Where bars are drawn; None where nobody watches."""

    def say(self, message: str) -> None:
        """Write a line, above the bar where one is drawn."""
        # Whoever closes the terminal, or the other end of a pipe, does not want the work to end for that.
        with suppress(OSError):
            if self.terminal is not None and self._out.isatty():
                tqdm.write(message, file=self.terminal)
            else:
                print(message, file=self._out, flush=True)

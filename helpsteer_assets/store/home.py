"""The home: the folder that holds artifacts, warehouse, locks and Dagster's state.

<home>/artifacts/<asset>/<weight or "all">/<fingerprint>/   finished artifacts, each with its manifest.json
<home>/warehouse/helpsteer.duckdb                           the published tables
<home>/dagster/<experiment>/                                DAGSTER_HOME of an experiment
<home>/locks/, <home>/cache/                                locks; digests of local sources
"""

import os
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.artifacts import ArtifactStore

if TYPE_CHECKING:
    from helpsteer_assets.store.warehouse import Warehouse


class Home:
    """One home with its store and its warehouse: made once, where a command or a code location begins, and handed on.

    A path within it is `home / "locks"`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.store = ArtifactStore(self.path)

    @cached_property
    def warehouse(self) -> "Warehouse":
        """Its warehouse; `helpsteer --help` does without duckdb."""
        from helpsteer_assets.store.warehouse import Warehouse

        return Warehouse(self.path)

    @classmethod
    def from_environment(cls) -> "Home":
        """`HELPSTEER_HOME`, else `.helpsteer` in the working directory.

        Raises HelpsteerError for a URL, and for a path that SQLite or DuckDB would read as another one, and write to
        that.
        """
        named = os.environ.get("HELPSTEER_HOME") or ".helpsteer"
        if re.match(r"[a-z][a-z0-9+.-]*:/", named, re.IGNORECASE):  # `--home` makes one slash of two
            raise HelpsteerError(
                f"the home {named} is a URL, and a home is a folder: it rests on locks and renames, which object "
                "stores do not have. Set HELPSTEER_HOME to a folder, on a disk or a file system that machines share"
            )
        path = Path(os.path.expanduser(named)).absolute()  # noqa: PTH111
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise HelpsteerError(
                f"the home {path} is not valid Unicode; set HELPSTEER_HOME to another folder"
            ) from None
        if characters := [character for character in "?%\\" if character in str(path)]:
            raise HelpsteerError(
                f"the home {path} has {' and '.join(characters)} in its path, which databases read as something else; "
                "set HELPSTEER_HOME to another folder"
            )
        return cls(path)

    @property
    def digest_cache(self) -> Path | None:
        """The file that remembers digests of local sources; None where there is no home, so that none is made."""
        return self.path / "cache" / "digests.json" if self.path.is_dir() else None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

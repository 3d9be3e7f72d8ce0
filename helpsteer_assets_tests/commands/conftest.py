"""A policy of the finished run, exported in both forms."""

from pathlib import Path
from typing import Any

import pytest

from helpsteer_assets.commands.export import Export, export_policy
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.finished import Finished


def take(finished: Finished, to: Path, what: str = "w=0.1", **options: Any) -> Export:
    return export_policy(finished.experiment, Home(finished.home), what, to, announce=lambda message: None, **options)


@pytest.fixture(scope="session")
def model(finished_home: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w=0.1 as one model. Don't write into it."""
    return take(finished_home, tmp_path_factory.mktemp("exported") / "model").folder


@pytest.fixture(scope="session")
def adapter(finished_home: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w=0.1 as an adapter. Don't write into it."""
    return take(finished_home, tmp_path_factory.mktemp("exported") / "adapter", merged=False).folder


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file, by its path relative to the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_last_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

"""One undisturbed home, which all the trials of a test session are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helpsteer_assets_tests.faults.campaign import Undisturbed, try_fault


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The experiment of the campaign, run once. Its home is not to be changed."""
    return Undisturbed.make(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def survives(undisturbed: Undisturbed, tmp_path: Path) -> Callable[[str, int], None]:
    """`survives(fault, seed)` runs one trial and fails with what it found."""

    def survives(fault: str, seed: int) -> None:
        result = try_fault(fault, seed, undisturbed, tmp_path / "trial")
        assert not result.problems, "\n".join([result.note, *result.problems, result.printed])

    return survives

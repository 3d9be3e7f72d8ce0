"""A full disk ends a run in words; with space again, the same command goes on."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.disk_faults  # noqa: F401  (registers them)
from helpsteer_assets_tests.faults.homes import can_mount


@pytest.mark.skipif(not can_mount(), reason="needs to mount a tmpfs: as root, or in `unshare -Urm`")
@pytest.mark.parametrize(("fault", "seed"), [("a disk too small", 29), ("a disk filled in mid-run", 15)])
def test_a_full_disk_ends_in_words_and_loses_nothing(
    survives: Callable[[str, int], None], fault: str, seed: int
) -> None:
    survives(fault, seed)


def test_a_limit_on_the_size_of_files_ends_in_words_and_loses_nothing(survives: Callable[[str, int], None]) -> None:
    survives("a limit on the size of files", 9)

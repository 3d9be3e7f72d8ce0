"""Lost permissions end a run in words; with them back, the same command goes on. Reading needs no writing."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.permission_faults  # noqa: F401  (registers them)
from helpsteer_assets_tests.faults.homes import can_mount


@pytest.mark.parametrize(("fault", "seed"), [("permission lost", 0), ("permission lost in mid-run", 0)])
def test_lost_permissions_end_in_words_and_lose_nothing(
    survives: Callable[[str, int], None], fault: str, seed: int
) -> None:
    survives(fault, seed)


@pytest.mark.skipif(not can_mount(), reason="needs to mount a tmpfs: as root, or in `unshare -Urm`")
@pytest.mark.parametrize(("fault", "seed"), [("a read-only file system", 2), ("a file system turned read-only", 4)])
def test_a_read_only_home_is_read_and_ends_runs_in_words(
    survives: Callable[[str, int], None], fault: str, seed: int
) -> None:
    survives(fault, seed)

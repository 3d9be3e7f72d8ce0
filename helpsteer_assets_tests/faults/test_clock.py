"""Clocks decide nothing: no result, no reuse, no lock."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.clock_faults  # noqa: F401  (registers them)


@pytest.mark.parametrize(
    ("fault", "seed"),
    [("a clock that jumps in mid-run", 12), ("files of another time", 9), ("two writers with different clocks", 22)],
)
def test_clocks_that_jump_change_nothing(survives: Callable[[str, int], None], fault: str, seed: int) -> None:
    survives(fault, seed)

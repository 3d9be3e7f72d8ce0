"""A home may lie anywhere, be moved, and have any name."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.places_faults  # noqa: F401  (registers them)


@pytest.mark.parametrize(
    ("fault", "seed"),
    [("a home that was moved", 6), ("a home that is a symbolic link", 4), ("an oddly named home", 16)],
)
def test_a_home_may_lie_anywhere(survives: Callable[[str, int], None], fault: str, seed: int) -> None:
    survives(fault, seed)

"""Damaged files are noticed before they are used, and made again: nothing else is."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.damage_faults  # noqa: F401  (registers them)


@pytest.mark.parametrize(
    ("fault", "seed"),
    [
        ("a damaged artifact", 0),
        ("a damaged checkpoint", 0),
        ("damaged rows of unfinished work", 5),
        ("a damaged registry", 0),
        ("a damaged publication", 0),
        ("damaged notes", 0),
    ],
)
def test_damage_is_noticed_and_mended(survives: Callable[[str, int], None], fault: str, seed: int) -> None:
    survives(fault, seed)

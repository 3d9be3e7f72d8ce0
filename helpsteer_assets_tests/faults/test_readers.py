"""Whoever has the published database open, in whatever way, is not disturbed and disturbs nobody."""

from collections.abc import Callable

import pytest

from helpsteer_assets_tests.faults.readers_faults import READERS


@pytest.mark.parametrize("fault", READERS)
def test_publishing_succeeds_whatever_readers_do(survives: Callable[[str, int], None], fault: str) -> None:
    survives(fault, 0)

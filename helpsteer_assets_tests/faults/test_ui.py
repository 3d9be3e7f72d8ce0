"""Runs that the UI launched die or are told to end; materialized again, they go on."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.ui_faults  # noqa: F401  registers the faults


@pytest.mark.parametrize("fault", ["UI: terminated in a training", "UI: everything is killed"])
def test_a_training_goes_on_from_its_checkpoint(survives: Callable[[str, int], None], fault: str) -> None:
    survives(fault, 1)

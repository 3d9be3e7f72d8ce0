"""Trials of the faults, and that the campaign sees what is wrong: else they would prove nothing.

FAULT_TRIALS=N runs the long campaign: N trials, all faults in turn, with the seeds 0, 1, ...
"""

import os
from pathlib import Path

import pytest

from helpsteer_assets_tests.faults.campaign import Undisturbed, try_fault
from helpsteer_assets_tests.faults.faults import FAULTS, can_mount

CASES = [(name, seed) for name, (_, seeds) in FAULTS.items() for seed in seeds]
if trials := int(os.environ.get("FAULT_TRIALS", 0)):
    CASES = [(name, seed) for seed in range(trials) for name in FAULTS][:trials]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_same_command_again_ends_like_a_run_that_nothing_happened_to(
    undisturbed: Undisturbed, tmp_path: Path, name: str, seed: int
) -> None:
    if name.endswith(" disk") and not can_mount():
        pytest.skip("needs to mount a tmpfs: as root, or in `unshare -Urm`")
    note, problems = try_fault(FAULTS[name][0], f"{name} {seed}", undisturbed, tmp_path / "trial")
    assert not problems, "\n".join([note, *problems])

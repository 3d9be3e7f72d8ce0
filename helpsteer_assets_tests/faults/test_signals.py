"""`helpsteer run` dies or is told to end; the same command goes on, to the same end."""

from collections.abc import Callable

import pytest

import helpsteer_assets_tests.faults.kill_faults  # noqa: F401  registers the faults


@pytest.mark.parametrize(
    ("fault", "seed"),
    [
        ("SIGKILL at a random moment", 4),
        ("SIGTERM at a random moment", 7),
        ("Ctrl-C at a random moment", 0),
        ("its terminal is closed at a random moment", 4),
        ("power cut at a file operation", 1),
    ],
)
def test_the_same_command_ends_like_an_undisturbed_run(
    survives: Callable[[str, int], None], fault: str, seed: int
) -> None:
    survives(fault, seed)

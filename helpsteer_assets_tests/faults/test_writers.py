"""Processes that materialize the same artifacts at once: one computes, the others wait."""

from collections.abc import Callable

import helpsteer_assets_tests.faults.writers_faults  # noqa: F401  registers the faults


def test_of_two_commands_at_once_one_computes_and_the_other_reuses(survives: Callable[[str, int], None]) -> None:
    survives("two or three commands at once", 2)


def test_a_waiting_command_takes_over_from_a_killed_one(survives: Callable[[str, int], None]) -> None:
    survives("the holder of a lock is killed, others wait", 3)

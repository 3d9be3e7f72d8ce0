"""How long work reports where it stands."""

from typing import Protocol


class Progress(Protocol):
    """Called as long work advances; the caller decides what to show and how often.

    `done` of `total` units are finished; `numbers` are measurements at this point (loss, tokens per second, ...).
    """

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Report that `done` of `total` units are finished."""


def silent(done: int, total: int, **numbers: float) -> None:
    """Reports nothing."""

"""Who is told how far long work is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """What is told of long work."""

    def begin(self, what: str, total: int) -> None:
        """Say what begins, and how many steps it has."""

    def advance(self, steps: int = 1) -> None:
        """Say that some steps are done."""


class Silent:
    """Tells nobody."""

    def begin(self, what: str, total: int) -> None:
        """Take no notice."""

    def advance(self, steps: int = 1) -> None:
        """Take no notice."""

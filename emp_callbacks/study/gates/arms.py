"""The arms of `emp gates`: what each does to the heads of a trained model within one budget of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["ARMS", "CURVE_ARM", "GATED", "LEARNED", "Case", "cases_of", "curve_counts"]

ARMS: Mapping[str, str] = {
    "Z": "all heads, trained on",
    "A": "EMP's heads, not trained on",
    "B": "EMP's heads, trained on",
    "C": "scored again and pruned step by step",
    "D": "hard concrete, all open",
    "E": "hard concrete, from EMP scores",
    "E'": "hard concrete, from permuted EMP scores",
    "F": "straight-through top-K, from zeros",
    "G": "straight-through top-K, from EMP scores",
    "R": "random heads, trained on",
}
"""Arm -> what it does, in the order of all tables."""

GATED: Mapping[str, tuple[str, str]] = {
    "D": ("hard_concrete", "open"),
    "E": ("hard_concrete", "emp"),
    "E'": ("hard_concrete", "permuted"),
    "F": ("top_k", "open"),
    "G": ("top_k", "emp"),
}
"""Arm -> its gates and what they begin with."""

LEARNED = ("D", "E", "F", "G")
"""The arms with gates of which the best is set beside EMP's own heads; E' is a control."""

CURVE_ARM = "F"
_CURVE = ((1, 8), (1, 4), (1, 2), (3, 4))


class Case(NamedTuple):
    """One arm at one budget.

    Attributes:
        arm: Of `ARMS`.
        keep: Heads kept.
        draw: Number of the draw, of random heads.
    """

    arm: str
    keep: int
    draw: int = 0

    @property
    def name(self) -> str:
        """For a line of progress, and its key on disk."""
        return f"{self.arm} with {self.keep} heads" + (f", draw {self.draw + 1}" if self.arm == "R" else "")


def curve_counts(n: int) -> list[int]:
    """Return the counts of heads at which the curve through K is measured, beside EMP's own; n heads in all.

    Examples:
        >>> curve_counts(32)
        [4, 8, 16, 24]
    """
    return [max(1, n * over // under) for over, under in _CURVE]


def cases_of(n: int, budgets: Sequence[int], draws: int) -> list[Case]:
    """Return all cases of a model with n heads, each once: a budget of two names is measured for both.

    Args:
        n: Heads of the model.
        budgets: Counts of heads at which all arms are measured.
        draws: Draws of random heads.
    """
    found = [Case("Z", n)]
    for keep in budgets:
        found += [Case(arm, keep) for arm in ARMS if arm not in "ZR"]
        found += [Case("R", keep, draw) for draw in range(draws)]
    found += [Case(CURVE_ARM, keep) for keep in curve_counts(n)]
    return list(dict.fromkeys(found))

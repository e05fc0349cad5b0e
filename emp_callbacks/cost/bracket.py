"""Which beta to try next, and which of those that were tried is the answer: bisection that checks what it assumes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, final

__all__ = ["Bracket", "End", "Tried"]

End = Literal["between", "lowest", "highest", "everything", "evaluations"]

_FINE = 1.02  # a factor between two betas of which no more is asked
# Losses need not be monotone: once the answer is known to a factor of 1.19, a budget 1.41 above it is tried, too.
_COARSE, _ABOVE = 2**0.25, 2**0.5


class Tried(NamedTuple):
    """One budget that was measured.

    Attributes:
        beta: Factor on N_eff.
        density: Kept share of all scored components, in [0, 1].
        loss: Mean over the batches.
        within: Whether that is within the tolerance.
        everything: Whether nothing was zeroed that was not 0 before.
    """

    beta: float
    density: float
    loss: float
    within: bool
    everything: bool = False


@final
class Bracket:
    """The budgets that were tried, and where to go on.

    The answer is the smallest beta within the tolerance above all that are not: it is in `measured`, and so is
    everything that is known about larger ones.

    Args:
        low: Lowest beta.
        high: Highest beta.
        evaluations: At most so many are measured.
    """

    def __init__(self, low: float, high: float, evaluations: int) -> None:
        self._low, self._high, self._evaluations = float(low), float(high), evaluations
        self._at: dict[float, Tried] = {}
        self._by_masks: dict[bytes, Tried] = {}

    @property
    def measured(self) -> tuple[Tried, ...]:
        """What was measured, by rising beta."""
        return tuple(sorted(self._by_masks.values()))

    def add(self, masks: bytes, tried: Tried) -> None:
        """Take in what was measured.

        Args:
            masks: A digest of the masks.
            tried: The figures.
        """
        self._at[tried.beta] = self._by_masks[masks] = tried

    def knows(self, masks: bytes, beta: float) -> bool:
        """Return whether these masks were measured at another beta already: that then stands for this one, too."""
        if masks in self._by_masks:
            self._at[beta] = self._by_masks[masks]
        return masks in self._by_masks

    @property
    def _failing(self) -> float | None:
        """The largest beta that is not within the tolerance."""
        return max((beta for beta, tried in self._at.items() if not tried.within), default=None)

    @property
    def _passing(self) -> float | None:
        """The smallest beta above it that is."""
        failing = self._failing or 0.0
        return min((beta for beta, tried in self._at.items() if tried.within and beta > failing), default=None)

    @property
    def answer(self) -> Tried | None:
        """The smallest budget from which upwards all that were measured are within the tolerance; None: there is none.

        Where several betas keep the same, the one that was measured.
        """
        return None if self._passing is None else self._at[self._passing]

    @property
    def end(self) -> End:
        """Where the search ended; see `BudgetSearch.end`."""
        failing, passing = self._failing, self._passing
        if failing is not None and passing is not None:
            return "between"
        if passing is not None:
            return "lowest" if passing == self._low else "evaluations"
        if failing is not None and self._at[failing].everything:
            return "everything"
        return "highest" if failing == self._high else "evaluations"

    def next(self) -> float | None:
        """Return the beta to try next; None: there is nothing left to learn, or no evaluation."""
        if len(self._by_masks) >= self._evaluations:
            return None
        if not self._at:
            return min(max(1.0, self._low), self._high)
        failing, passing = self._failing, self._passing
        if passing is None:
            assert failing is not None
            return None if self.end != "evaluations" else min(2 * failing, self._high)
        if failing is None:
            return None if passing == self._low else max(passing / 2, self._low)
        above = min(_ABOVE * passing, self._high)
        # The answer may fall by another factor of 1.19 after that was tried.
        checked = above <= _COARSE * passing or any(
            _COARSE * passing < beta <= _ABOVE * _COARSE * passing for beta in self._at
        )
        if passing <= _COARSE * failing and not checked and not self._at[passing].everything:
            return above
        return math.sqrt(failing * passing) if passing > _FINE * failing else None

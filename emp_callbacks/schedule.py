"""When: which optimizer steps or epochs refresh the masks. Never touches a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from emp_callbacks.core.effective_number import check_beta


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Refreshes at positions start, start + every, ... up to and including stop.

    A position counts finished optimizer steps or finished epochs.

    Args:
        unit: What a position counts; None: refresh by hand only.
        every: Distance of two refreshes, >= 1.
        start: First refresh, >= 1; default `every`.
        stop: Last position at which a refresh may happen; default: none.
    """

    unit: Literal["epoch", "step"] | None = None
    every: int = 1
    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        name = f"every_n_{self.unit}s" if self.unit else "every"
        _check_count(name, self.every)
        if self.start is not None:
            _check_count("start", self.start)
        if self.stop is not None:
            _check_count("stop", self.stop)
            if self.stop < self.first:
                raise ValueError(
                    f"stop={self.stop} lies before the first refresh at {self.unit} {self.first}: nothing would be "
                    f"pruned; raise stop, or lower start or {name}"
                )

    @property
    def first(self) -> int:
        """Position of the first refresh."""
        return self.every if self.start is None else self.start

    def is_due(self, last: int, now: int) -> bool:
        """Return whether a refresh lies in (last, now]: one that was missed at its own position is late, not lost."""
        return self.unit is not None and self._refreshes_up_to(now) > self._refreshes_up_to(last)

    def _refreshes_up_to(self, position: int) -> int:
        end = position if self.stop is None else min(position, self.stop)
        return max((end - self.first) // self.every + 1, 0)


@dataclass(frozen=True, kw_only=True)
class BetaSchedule:
    """beta that moves from `first` to `last` while training runs.

    Args:
        first: beta up to the first refresh, > 0.
        last: beta from position `until` on, > 0.
        until: Position (epoch or step, as the refresh schedule counts) at which `last` is reached, >= 1.
        shape: "linear", "cosine", or "cubic": 1 - (1 - t)^3, which moves early (Zhu and Gupta, arXiv:1710.01878).
    """

    first: float
    last: float
    until: int
    shape: Literal["linear", "cosine", "cubic"] = "linear"

    def __post_init__(self) -> None:
        check_beta(self.first)
        check_beta(self.last)
        _check_count("until", self.until)
        if self.shape not in ("linear", "cosine", "cubic"):
            raise ValueError(f"shape must be 'linear', 'cosine' or 'cubic', got {self.shape!r}")

    def at(self, position: int) -> float:
        """Return beta at a position, between `first` and `last`."""
        t = min(max(position / self.until, 0.0), 1.0)
        moved = {"linear": t, "cosine": (1 - math.cos(math.pi * t)) / 2, "cubic": 1 - (1 - t) ** 3}[self.shape]
        return self.first + (self.last - self.first) * moved


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

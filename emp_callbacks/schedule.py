"""When: which optimizer steps or epochs refresh the masks. Never touches a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


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
        check_count(name, self.every)
        if self.start is not None:
            check_count("start", self.start)
        if self.stop is not None:
            check_count("stop", self.stop)
            if self.stop < self.first:
                raise ValueError(
                    f"stop={self.stop} lies before the first refresh at {self.unit} {self.first}: nothing would be "
                    f"pruned; raise stop, or lower start or {name}"
                )

    @property
    def first(self) -> int:
        """Position of the first refresh."""
        return self.every if self.start is None else self.start

    @property
    def told(self) -> str:
        """The schedule in the settings' own words."""
        parts = {f"every_n_{self.unit}s": self.every, "start": self.start, "stop": self.stop}
        return ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def is_due(self, last: int, now: int) -> bool:
        """Return whether a refresh lies in (last, now]: one that was missed at its own position is late, not lost."""
        return self.unit is not None and self._refreshes_up_to(now) > self._refreshes_up_to(last)

    def next_after(self, last: int) -> int | None:
        """Return the position of the first refresh beyond `last`; None if there is none."""
        position = self.first + self._refreshes_up_to(last) * self.every
        return None if self.unit is None or (self.stop is not None and position > self.stop) else position

    def _refreshes_up_to(self, position: int) -> int:
        end = position if self.stop is None else min(position, self.stop)
        return max((end - self.first) // self.every + 1, 0)


@dataclass
class Clock:
    """Where a training run stands.

    Attributes:
        steps: Applied optimizer steps.
        epochs: Finished epochs.
        last_position: Position of the schedule, in its own unit, up to which refreshes are done.
        steps_at_refresh: Steps at the last refresh.
        steps_at_epoch: Steps when the current epoch began.
        epoch_length: Optimizer steps of an epoch; None while unknown.
    """

    steps: int = 0
    epochs: int = 0
    last_position: int = 0
    steps_at_refresh: int = 0
    steps_at_epoch: int = 0
    epoch_length: int | None = None

    def end_epoch(self) -> None:
        """Count a finished epoch."""
        self.epochs += 1
        self.epoch_length = self.steps - self.steps_at_epoch or None
        self.steps_at_epoch = self.steps

    def is_near_refresh(self, schedule: Schedule, window: int) -> bool:
        """Return whether the next step is one of the last `window` before a refresh.

        Without a schedule every step may be the last before one. While the length of an epoch is unknown, all of the
        epoch before a refresh counts.
        """
        if schedule.unit is None:
            return True
        due = schedule.next_after(self.last_position)
        if due is None:
            return False
        if schedule.unit == "step":
            return self.steps >= due - window
        if self.epochs + 1 < due:
            return False
        return self.epoch_length is None or self.steps - self.steps_at_epoch >= self.epoch_length - window


@dataclass(frozen=True)
class Ramp:
    """A setting that moves from `first` to `last` while training runs: beta, density or drop_fraction.

    `Ramp(1.0, 0.2, until=8)` goes from 1 to 0.2 by epoch (or step) 8.

    Args:
        first: Value up to position `begin`, >= 0.
        last: Value from position `until` on, >= 0.
        until: Position (epoch or step, as the refresh schedule counts) at which `last` is reached, > begin.
        begin: Position at which it begins to move, >= 0.
        shape: "linear", "cosine", or "cubic": 1 - (1 - t)^3, which moves early (Zhu and Gupta, arXiv:1710.01878).
    """

    first: float
    last: float
    until: int
    begin: int = 0
    shape: Literal["linear", "cosine", "cubic"] = "linear"

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        check_count("begin", self.begin, least=0)
        check_count("until", self.until)
        if self.until <= self.begin:
            raise ValueError(f"until={self.until} must lie after begin={self.begin}")
        if self.shape not in ("linear", "cosine", "cubic"):
            raise ValueError(f"shape must be 'linear', 'cosine' or 'cubic', got {self.shape!r}")

    def left_at(self, position: int, setting: str, unit: str | None) -> str:
        """Return a line that says where the value of a setting stands before its end; nothing once it is there."""
        value = self.at(position)
        if math.isclose(value, self.last, rel_tol=0.01):
            return ""
        return (
            f"{setting} stands at {value:.3g}, on its way from {self.first:.3g} to {self.last:.3g}: its Ramp ends at "
            f"{unit} {self.until}, the last refresh was at {unit} {position}. End it earlier (until=...), or go on"
        )

    def at(self, position: int) -> float:
        """Return the value at a position, between `first` and `last`."""
        t = min(max((position - self.begin) / (self.until - self.begin), 0.0), 1.0)
        moved = {"linear": t, "cosine": (1 - math.cos(math.pi * t)) / 2, "cubic": 1 - (1 - t) ** 3}[self.shape]
        return self.first + (self.last - self.first) * moved


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

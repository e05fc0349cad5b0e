"""What a checkpoint holds of a trajectory: its last refreshes, and where the older rows are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from emp_callbacks.trajectory.events import PruneEvent, check_types
from emp_callbacks.trajectory.places import Place, exists, place_of, read_bytes, set_aside

REFRESHES = 16
"""Refreshes whose rows a checkpoint holds: its size must not grow with the length of the run."""


def as_line(event: PruneEvent) -> str:
    """Return a row as a line of the file."""
    return json.dumps(event.record()) + "\n"


def last_refreshes(events: Sequence[PruneEvent], count: int = REFRESHES) -> Sequence[PruneEvent]:
    """Return the rows of the last `count` refreshes. One refresh has one step, and each group once."""
    step, groups, start = None, set[str](), len(events)
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        if event.step != step or event.group in groups:
            if not count:
                break
            count, step, groups = count - 1, event.step, set()
        groups.add(event.group)
        start = index
    return events[start:]


@dataclass(frozen=True)
class HeldRows:
    """The last rows of a trajectory.

    Attributes:
        rows: Those of the last refreshes.
        total: Rows of the whole trajectory.
        path: Its file; None where it had none.
    """

    rows: tuple[PruneEvent, ...]
    total: int
    path: str | None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> HeldRows:
        """Return what `Trajectory.state()` said.

        Raises:
            KeyError, TypeError, ValueError: It is no such state.
        """
        rows, total, path = tuple(map(PruneEvent.from_record, state["rows"])), state["total"], state["path"]
        for row in rows:
            check_types(row)
        if type(total) is not int or total < len(rows) or bool(total) != bool(rows):
            raise ValueError(f"{len(rows)} rows of {total!r}")
        if not isinstance(path, str | None):
            raise TypeError(f"the file of the trajectory is {path!r}")
        return cls(rows, total, path)

    @property
    def missing(self) -> int:
        """How many older rows there are."""
        return self.total - len(self.rows)

    def with_older(self, events: Sequence[PruneEvent], places: Iterable[Place]) -> list[PruneEvent] | None:
        """Return all rows: the older ones from memory or the first file that holds these rows in their place.

        Args:
            events: Rows in memory.
            places: Files besides the one that is named here.

        Returns:
            None if the older rows are nowhere.
        """
        if not self.missing:
            return list(self.rows)
        if tuple(events[self.missing : self.total]) == self.rows:
            return [*events[: self.missing], *self.rows]
        held = [as_line(row) for row in self.rows]
        for lines in _files([*([] if self.path is None else [place_of(self.path)]), *places]):
            if lines[self.missing : self.total] == held:
                with suppress(ValueError, TypeError, KeyError):
                    return [*(PruneEvent.from_record(json.loads(line)) for line in lines[: self.missing]), *self.rows]
        return None

    @property
    def lost(self) -> str:
        """What to say where the older rows are nowhere."""
        where = "had no file to be read from" if self.path is None else f"are not in {self.path} any more"
        return (
            f"the checkpoint holds the last {len(self.rows)} of {self.total} rows of its trajectory, and the "
            f"{self.missing} older ones {where}: this trajectory begins at step {self.rows[0].step}"
        )


def check_state(state: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless this is what `Trajectory.state()` says."""
    HeldRows.of(state)


def _files(places: Iterable[Place]) -> Iterator[list[str]]:
    """Yield the lines of files and of what was set aside of them, as far as they can be read."""
    for place in places:
        try:
            for file in (place, *set_aside(place)[0]):
                if exists(file):
                    yield read_bytes(file).decode(errors="replace").splitlines(keepends=True)
        except Exception:  # whatever a remote store raises: the rows are not to be had there
            continue

"""The rows of one run, in memory and in a file that is this run's alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from emp_callbacks.blame import warn_the_user
from emp_callbacks.trajectory.events import PruneEvent
from emp_callbacks.trajectory.held_rows import HeldRows, as_line, last_refreshes
from emp_callbacks.trajectory.local_file import LocalFile
from emp_callbacks.trajectory.places import place_of, read_bytes
from emp_callbacks.trajectory.remote_file import RemoteFile


class Trajectory(Sequence[PruneEvent]):
    """The rows of one run, oldest first; with a path, each is in the file before the next step.

    The file is this run's alone until `close()`: a run that begins while another one writes it takes `NAME-2`, with a
    warning. Rows of an older run in it are set aside as `NAME.1`, `NAME.2`, ... at the first row of this one. Where
    rows cannot be written they stay in memory, with a warning, and go into the file with the next ones.

    Args:
        path: JSON-lines file, a URL that fsspec knows (`s3://bucket/run/rows.jsonl`: written whole at every refresh),
            or None for memory only. It is opened at once: a folder that cannot be written is an error before training.

    Attributes:
        path: The file, a Path, or of a URL a string; None for memory only.

    Raises:
        OSError: The file cannot be created or written.
        ImportError: A package that the URL needs is missing.
        ValueError: fsspec does not know such a URL.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._events: list[PruneEvent] = []
        self._written = 0  # rows that the file holds
        self._warned = self._closed = False
        self._file: LocalFile | RemoteFile | None = None
        if path is not None:
            place = place_of(path)
            self._file = LocalFile(place) if isinstance(place, Path) else RemoteFile(place)
            self._file.open()

    @property
    def path(self) -> Path | str | None:
        """The file: a Path, or of a URL a string; None for memory only."""
        return None if self._file is None else self._file.path

    @overload
    def __getitem__(self, index: int) -> PruneEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[PruneEvent]: ...
    def __getitem__(self, index: int | slice) -> PruneEvent | list[PruneEvent]:
        return self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        last = f", last: {self[-1].density:.3f} kept at step {self[-1].step}" if self else ""
        return f"Trajectory({len(self)} rows{last}; {self.path or 'in memory'})"

    def records(self) -> list[dict[str, Any]]:
        """Return all rows as plain JSON types."""
        return [event.record() for event in self._events]

    def extend(self, events: Iterable[PruneEvent]) -> None:
        """Append rows; they go to the file in one write, so a kill leaves whole rows and at most one torn."""
        new = list(events)
        self._events.extend(new)
        if new:
            self._write()

    def close(self) -> None:
        """Release the file to other runs. Twice is once; rows that come later take it again, or `NAME-2`."""
        if self._file is None or self._closed:
            return
        if self._written < len(self._events):
            self._write()
        self._closed = True
        self._file.close()
        if left := len(self._events) - self._written:
            warn_the_user(f"{left} rows could not be written to {self.path}: they are in memory only")

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the rows of the last refreshes, the number of all, and their file."""
        rows, path = last_refreshes(self._events), self.path
        where = os.path.abspath(path) if isinstance(path, Path) else path
        return {"rows": [event.record() for event in rows], "total": len(self._events), "path": where}

    def restore(self, state: Mapping[str, Any]) -> str:
        """Become the trajectory that a checkpoint holds; rows that the file has beyond it are set aside.

        Older rows than it holds come from memory or from its file, if that is still the same.

        Returns:
            What a user must know; empty if nothing.

        Raises:
            OSError: The file cannot be written; nothing was changed.
        """
        held = HeldRows.of(state)
        file = self._file
        everything = held.with_older(self._events, [] if file is None else [file.path, file.wanted])
        events = list(held.rows) if everything is None else everything
        if file is not None:
            self._closed = False
            file.open()
            file.replace(_text(events))
        self._events, self._written = events, len(events)  # last: a file that cannot be written changes nothing
        return held.lost if everything is None else ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Return the rows of a JSON-lines file or URL; a last row torn by a kill is left out.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A row other than the last is not a PruneEvent.
        """
        try:
            lines = read_bytes(place_of(path)).decode().splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a trajectory: {error}") from error
        trajectory = cls()
        for number, line in enumerate(lines, start=1):
            try:
                trajectory._events.append(PruneEvent.from_record(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise ValueError(f"{path}, line {number}: not a row of a trajectory ({error})") from error
        return trajectory

    def _write(self) -> None:
        """Write what the file does not hold yet; where the file is not as we left it, all rows."""
        if self._file is None:
            return
        self._closed = False
        try:
            self._file.open()
            if self._file.is_intact:
                self._file.append(_text(self._events[self._written :]))
            else:
                self._file.replace(_text(self._events))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn_the_user(
                    f"{self.path} cannot be written ({error}): rows stay in memory, and are written at the next "
                    "refresh that can; training goes on"
                )
            return
        self._written = len(self._events)


def _text(events: Iterable[PruneEvent]) -> bytes:
    return "".join(map(as_line, events)).encode()

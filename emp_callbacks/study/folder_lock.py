"""A mark on what a running command works on, so that a second command does not destroy it."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from emp_callbacks.file_lock import try_lock

__all__ = ["BusyError", "FileLock"]


class BusyError(OSError):
    """Another command holds a lock."""


class FileLock:
    """A lock on a file, held until `release`, at the latest until the process ends, however it ends.

    Args:
        path: The file; it is made if it is missing, and stays.
        busy: What to say where another process holds it.
        shared: Whether others may hold it, too, if they also share it.

    Raises:
        BusyError: Another process holds the lock.
    """

    def __init__(self, path: Path, busy: str, *, shared: bool = False) -> None:
        self._file: IO[bytes] | None = path.open("a+b")
        if not try_lock(self._file.fileno(), shared=shared):
            self.release()
            raise BusyError(busy)

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None

"""A local file of rows that belongs to one live run: locked, appended to, replaced in one step."""

from __future__ import annotations

import gc
import os
import stat
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, final

from emp_callbacks.blame import warn_the_user
from emp_callbacks.file_lock import try_lock, unlock
from emp_callbacks.trajectory.places import numbered, set_aside


@final
class LocalFile:
    """One run's file. The lock is the kernel's: it ends with `close()`, with this object or with the process.

    Args:
        wanted: The file, if no live run has it; else NAME-2, NAME-3, ...

    Attributes:
        path: The file that this run has; `wanted` before `open()`.
    """

    _descriptor: int | None = None  # also of an object that is only half made

    def __init__(self, wanted: Path) -> None:
        self.wanted = self.path = wanted
        self._process = 0
        self._length: int | None = None  # bytes of our own rows; None while it is not known what the file holds

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: not the lock, so that it is a live run of its own."""
        return {**self.__dict__, "_descriptor": None, "_length": None}

    def __del__(self) -> None:
        self.close()

    def open(self) -> None:
        """Take the file for this run, or the first NAME-2, NAME-3, ... that no live run has.

        Raises:
            OSError: It cannot be written.
        """
        if self._descriptor is not None and self._process == os.getpid():
            return
        self.close()  # after a fork the lock is the parent's
        self.wanted.parent.mkdir(parents=True, exist_ok=True)
        for path in chain([self.path], (Path(numbered(self.wanted, number)) for number in count(1))):
            descriptor = _locked(path)
            if descriptor is None and path == self.wanted:
                gc.collect()  # a pruner that nobody refers to any more is freed late, being part of a circle
                descriptor = _locked(path)
            if descriptor is not None:
                break
        self._descriptor, self._process, self._length = descriptor, os.getpid(), None
        if path != self.path:
            taken, self.path = self.path, path
            warn_the_user(f"{taken} is being written by another run that goes on; the rows of this one are in {path}")

    def close(self) -> None:
        """Release the file. Twice is once."""
        descriptor, self._descriptor, self._length = self._descriptor, None, None
        if descriptor is not None:
            if self._process == os.getpid():
                unlock(descriptor)
            os.close(descriptor)

    @property
    def is_intact(self) -> bool:
        """Whether the file holds exactly our rows: not deleted, rotated, cut or written to by others."""
        if self._descriptor is None or self._length is None:
            return False
        try:
            return _is(self.path, self._descriptor) and os.fstat(self._descriptor).st_size == self._length
        except OSError:
            return False

    def append(self, text: bytes) -> None:
        """Add rows to an intact file; if that fails it holds what it held before.

        Raises:
            OSError: They could not be written.
        """
        assert self._descriptor is not None
        assert self._length is not None
        try:
            _write(self._descriptor, text)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._length)
            raise
        self._length += len(text)

    def replace(self, text: bytes) -> None:
        """Make `text` what the file holds, in one step; what is there and does not begin it is set aside.

        Raises:
            OSError: It could not be written; the file is as it was.
        """
        held = self.path.read_bytes() if self.path.exists() else None
        if held == text and self._descriptor is not None and _is(self.path, self._descriptor):
            self._length = len(text)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            try_lock(descriptor)  # before the file has its name: nobody comes between
            _write(descriptor, text)
            if held and not text.startswith(held):
                os.replace(self.path, set_aside(self.path)[1])
            os.replace(partial, self.path)
        except BaseException:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor, self._process, self._length = descriptor, os.getpid(), len(text)


def _locked(path: Path) -> int | None:
    """Return a descriptor of the file, made if missing, with the lock on it; None if another has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileExistsError(f"{path} is no regular file, and a trajectory needs one; name another file")
            if not try_lock(descriptor):
                os.close(descriptor)
                return None
            if _is(path, descriptor):  # else it was replaced between the two calls
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Return whether the file of that name is the one that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    # A network file system sends what was written, and says that its disk is full, when a descriptor is closed.
    os.close(os.dup(descriptor))

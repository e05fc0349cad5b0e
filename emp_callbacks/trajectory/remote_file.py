"""A file of rows behind a URL: object stores cannot append, so it is written whole every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, final
from weakref import WeakValueDictionary

from emp_callbacks.blame import warn_the_user
from emp_callbacks.trajectory.places import exists, file_system, numbered, read_bytes, set_aside

Result = TypeVar("Result")


@final
class RemoteFile:
    """One run's file behind a URL. No locks reach there: runs of one process are told apart, of several they are not.

    Args:
        wanted: The URL, if no live run of this process has it; else NAME-2, NAME-3, ...

    Attributes:
        path: The URL that this run has; `wanted` before `open()`.
    """

    is_intact = False  # it cannot be appended to

    _live: ClassVar[WeakValueDictionary[str, RemoteFile]] = WeakValueDictionary()

    def __init__(self, wanted: str) -> None:
        self.wanted = self.path = wanted
        self._ours = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: it is a live run of its own."""
        return {**self.__dict__, "_ours": False}

    def open(self) -> None:
        """Take the URL for this run, or the first NAME-2, NAME-3, ... that no live run of this process has.

        Raises:
            OSError: It cannot be written.
            ImportError: A package is missing.
            ValueError: It is a kind of URL that nobody knows.
        """
        if self._live.get(self.path) is self:
            return
        names = [self.path, *(str(numbered(self.wanted, n)) for n in range(1, len(self._live) + 2))]
        taken, path = self.path, next(name for name in names if name not in self._live)
        file_system(path)  # a kind of URL that nobody knows is no OSError
        if not _remotely(path, lambda: exists(path)):
            _write(path, b"")
        self.path, self._ours = path, False
        self._live[path] = self
        if path != taken:
            warn_the_user(f"{taken} is being written by another run that goes on; the rows of this one are in {path}")

    def close(self) -> None:
        """Release the URL. Twice is once."""
        if self._live.get(self.path) is self:
            del self._live[self.path]

    def append(self, text: bytes) -> None:
        """Not possible here."""
        raise NotImplementedError(f"{self.path} cannot be appended to; replace it")

    def replace(self, text: bytes) -> None:
        """Make `text` what the file holds; what another run left there and does not begin it is set aside.

        Raises:
            OSError: It could not be written.
        """
        if not self._ours:
            _remotely(self.path, lambda: _make_room(self.path, text))
        _write(self.path, text)
        self._ours = True


def _make_room(url: str, text: bytes) -> None:
    if exists(url) and not text.startswith(read_bytes(url)):
        system, inside = file_system(url)
        system.mv(inside, file_system(str(set_aside(url)[1]))[1])


def _write(url: str, text: bytes) -> None:
    system, inside = file_system(url)

    def write() -> None:
        try:
            system.pipe_file(inside, text)
        except FileNotFoundError:  # a store that has folders
            system.makedirs(inside.rpartition("/")[0], exist_ok=True)
            system.pipe_file(inside, text)

    _remotely(url, write)


def _remotely(url: str, work: Callable[[], Result]) -> Result:
    """Return what `work` returns; every store has exceptions of its own, which become OSError."""
    try:
        return work()
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{url}: {error}") from error

"""Files of tokens that appear when they are whole, and what lets their writer go on after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from emp_callbacks.study.documents import Place
from emp_callbacks.study.folder_lock import FolderLock
from emp_callbacks.study.recipe.token_format import beside, file_sha256

__all__ = ["TokenOutput", "no_document"]

_SAVED_EVERY = 5.0  # seconds of work that a kill costs


class TokenOutput:
    """The files of all parts while they grow; a `with` block is needed.

    NAME.partial beside each file holds its tokens so far, and one NAME.partial.json for all says how many of them
    count, and up to where in the sources they lead. Both are there until `finish`.

    Args:
        outs: Part -> its file.
        settings: What the tokens depend on. Work that was begun with others is not gone on with.
        overwrite: Whether to begin anew in any case.

    Attributes:
        place: Up to where the sources are in the files.

    Raises:
        BusyError: Another process writes the same file.
        FileExistsError: Other settings, or a source that was changed since.
    """

    def __init__(self, outs: Mapping[str, Path], settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self._outs, self._settings = outs, dict(settings)
        self._width = np.dtype(settings["dtype"]).itemsize
        self._partial = [path.with_name(f"{path.name}.partial") for path in outs.values()]
        self._state = beside(self._partial[0])
        self._modified = [_modified(source["name"]) for source in settings["sources"]]
        self.place, self._tokens, self._documents = Place(), [0] * len(outs), [0] * len(outs)
        busy = f"another process writes {self._partial[0]}: {{owner}}; wait for it"
        self._lock = FolderLock(self._partial[0].parent, [self._partial[0].name], busy)
        self._files: list[IO[bytes]] = []
        try:
            if overwrite:
                self._state.unlink(missing_ok=True)
            if self._state.is_file():
                self._take_up(json.loads(self._state.read_bytes()))
        except BaseException:
            self._close()
            raise
        self._saved_at = time.monotonic()

    def _take_up(self, state: Mapping[str, Any]) -> None:
        changed = [key for key, value in self._settings.items() if state["settings"].get(key) != value]
        if not changed and state["modified"] != self._modified:
            changed = ["the time of a source"]
        if changed:
            raise FileExistsError(
                f"{self._partial[0]} was begun with other values of {', '.join(changed)}; give the same as then to go "
                "on, or begin anew: --overwrite"
            )
        self.place, self._tokens, self._documents = Place(*state["place"]), state["tokens"], state["documents"]
        for path, whole, tokens in zip(self._partial, self._outs.values(), self._tokens, strict=True):
            if whole.exists() and not path.exists():  # killed between two renamings
                whole.rename(path)
            if not path.exists() or path.stat().st_size < tokens * self._width:
                raise FileExistsError(f"{path} is shorter than {self._state} says; begin anew: --overwrite")

    def __enter__(self) -> TokenOutput:
        for path, tokens in zip(self._partial, self._tokens, strict=True):
            file = path.open("ab")
            file.truncate(tokens * self._width)
            self._files.append(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._files:
            return
        try:
            if self.place == Place():
                for path in self._partial:
                    path.unlink()
            else:
                self._save()
        except OSError as full:
            raise OSError(full.errno, full.strerror, str(self._partial[0])) from full
        finally:
            self._close()

    def _close(self) -> None:
        while self._files:
            with suppress(OSError):  # a full disk has been told of
                self._files.pop().close()
        self._lock.release()

    def add(self, tokens: Sequence[bytes], documents: Mapping[int, int], place: Place) -> None:
        """Add tokens to each part, of so many documents, up to a place in the sources."""
        for part, (file, more) in enumerate(zip(self._files, tokens, strict=True)):
            file.write(more)
            self._tokens[part] += len(more) // self._width
            self._documents[part] += documents.get(part, 0)
        self.place = place
        if time.monotonic() - self._saved_at > _SAVED_EVERY:
            self._save()

    def _save(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())  # before what counts them
        state = {
            "settings": self._settings,
            "modified": self._modified,
            "place": self.place,
            "tokens": self._tokens,
            "documents": self._documents,
        }
        _write(self._state, state)
        self._saved_at = time.monotonic()

    def finish(self) -> dict[str, Mapping[str, Any]]:
        """Give the files their names, and return what is written beside them.

        Raises:
            ValueError: A part got no document.
        """
        for name, documents in zip(self._outs, self._documents, strict=True):
            if not documents:
                raise no_document(name, sum(self._documents))
        self._save()
        found: dict[str, Mapping[str, Any]] = {}
        for part, (name, path) in enumerate(zip(self._outs, self._partial, strict=True)):
            counts = {"tokens": self._tokens[part], "documents": self._documents[part], "sha256": file_sha256(path)}
            found[name] = {**self._settings, "part": name, **counts}
        for told, path, whole in zip(found.values(), self._partial, self._outs.values(), strict=True):
            _write(beside(whole), told)
            os.replace(path, whole)
        self._state.unlink()
        self._close()
        return found


def no_document(part: str, documents: int) -> ValueError:
    """Return the error that of so many documents none is left for a part."""
    more = (
        f"a larger --{part}-fraction, or files of its own: --{part}" if part != "train" and documents else "other texts"
    )
    return ValueError(f"of {documents} documents with text, {part} gets none; give {more}")


def _modified(name: str) -> int | None:
    """Return when a file was changed, None for what is no file."""
    return os.stat(name).st_mtime_ns if os.path.exists(name) else None


def _write(path: Path, told: Mapping[str, Any]) -> None:
    """Write JSON that is there as a whole or not at all."""
    ahead = path.with_name(f"{path.name}.new")
    with ahead.open("w", encoding="utf-8") as file:
        json.dump(told, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(ahead, path)

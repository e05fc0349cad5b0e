"""The folder of a study: one file per finished run, reused by the next call, never lost silently."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from emp_callbacks.checkpoint.whole_output import PARTIAL, appearing, aside
from emp_callbacks.study.arms import Cell
from emp_callbacks.study.folder_lock import LOCKS, FolderLock

__all__ = ["AGAIN", "RunStore", "digest", "read_results", "write_atomically"]

# The first line of OUT/config.yaml begins like this: how a folder of ours is told from somebody else's.
_OURS = "# written by emp"
AGAIN = "run the study again: it reuses the finished runs"
"""What to do with a results.json that cannot be read."""

_DIGEST = "content_digest"


def digest(data: Any) -> str:
    """Return the sha256 of plain data (mappings in any key order) as hexadecimal text."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old file or the new one, never half of it."""
    with appearing(path, folder=False) as partial:
        partial.write_text(text)


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of a study from its results.json.

    Raises:
        ValueError: The file is damaged or of another version.
    """
    results = _read_json(path, AGAIN)
    if results.get("schema") != 1:
        raise ValueError(f"{path} has schema {results.get('schema')!r}, and this version reads schema 1")
    return results


class RunStore:
    """Finished runs in one folder.

    Args:
        out: Folder of the study; made by `open`.
        recipe_digest: Hash of everything that all runs of the study have in common.
    """

    def __init__(self, out: Path, recipe_digest: str) -> None:
        self.out = out
        self.recipe_digest = recipe_digest
        self.runs = out / "runs"
        self._lock: FolderLock | None = None

    def open(self, recipe: Mapping[str, Any], overwrite: bool = False, only: Sequence[Cell] = ()) -> Path | None:
        """Make the folder ready, write config.yaml into it, and keep other commands out until `close`.

        Args:
            recipe: For config.yaml.
            overwrite: Move what is there aside.
            only: The trainings that this command does alone: others may do others at the same time.

        Returns:
            Where `overwrite` moved the earlier contents, or None.

        Raises:
            BusyError: Another command works in the folder.
            FileExistsError: The folder holds other things than runs of this recipe.
            OSError: The folder cannot be made or written.
        """
        moved = None
        if _has_content(self.out):
            if overwrite:
                moved = self._move_aside()
            else:
                self._check_owner()
        self.out.mkdir(parents=True, exist_ok=True)
        self._take([cell.file for cell in only] or None)
        # First of all: a command that starts at the same time knows the folder by it.
        write_atomically(
            self.out / "config.yaml",
            f"{_OURS}: the recipe with every default filled in\n" + yaml.safe_dump(dict(recipe), sort_keys=False),
        )
        self.runs.mkdir(exist_ok=True)
        return moved

    def close(self) -> None:
        """Let other commands work in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, parts: list[str] | None) -> None:
        busy = "let it finish, or choose another folder with --out DIR"
        self._lock = FolderLock(self.out, parts, f"another emp command works in {self.out}: {{owner}}; {busy}")

    def finished(self, cell: Cell, fingerprint: str) -> dict[str, Any] | None:
        """Return the record of a finished run, or None if it has yet to run.

        Raises:
            FileExistsError: The file comes from a run with other settings.
            ValueError: The file is damaged, or was edited.
        """
        path = self._file(cell)
        if not path.is_file():
            return None
        record = _read_record(path)
        if record.get("fingerprint") != fingerprint:
            raise self._refusal(path)
        return record

    def save(self, cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record of a finished run and return it as `finished` will read it."""
        saved: dict[str, Any] = json.loads(json.dumps({**record, "recipe_digest": self.recipe_digest}))
        text = json.dumps({**saved, _DIGEST: digest(saved)}, indent=1)
        write_atomically(self._file(cell), text + "\n")
        for partial in (self.checkpoint, self._cases):
            partial(cell, str(record.get("fingerprint"))).unlink(missing_ok=True)
        return saved

    def save_cases(self, cell: Cell, fingerprint: str, cases: Mapping[str, Any]) -> None:
        """Write the finished cases, by name, of a run that consists of several, until `save` has all of it."""
        saved = {"cases": dict(cases)}
        write_atomically(self._cases(cell, fingerprint), json.dumps({**saved, _DIGEST: digest(saved)}) + "\n")

    def finished_cases(self, cell: Cell, fingerprint: str) -> dict[str, Any]:
        """Return what `save_cases` wrote last; {} before, and where the run has other settings.

        Raises:
            ValueError: The file is damaged, or was edited.
        """
        path = self._cases(cell, fingerprint)
        return dict(_read_record(path)["cases"]) if path.is_file() else {}

    def folder(self, cell: Cell, fingerprint: str) -> Path:
        """Return the folder of one run's logs; empty, unless an interrupted run left a checkpoint to go on from."""
        folder = self.runs / cell.file
        if folder.exists() and not self.checkpoint(cell, fingerprint).is_file():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        return folder

    def checkpoint(self, cell: Cell, fingerprint: str) -> Path:
        """Return where an unfinished run keeps its checkpoint; a run with other settings does not go on from it."""
        return self.runs / cell.file / f"{fingerprint[:16]}.ckpt"

    def weights(self, cell: Cell) -> Path:
        """Return where the weights of a trained network are kept, for what prunes it afterwards."""
        return self.runs / f"{cell.file}.safetensors"

    def _cases(self, cell: Cell, fingerprint: str) -> Path:
        return self.runs / f"{cell.file}.{fingerprint[:16]}.cases"

    def _file(self, cell: Cell) -> Path:
        return self.runs / f"{cell.file}.json"

    def _check_owner(self) -> None:
        config = self.out / "config.yaml"
        if not config.is_file() or not config.read_bytes().startswith(_OURS.encode()):
            raise FileExistsError(
                f"{self.out} is not empty and was not written by emp; choose another folder with"
                " --out DIR, or add --overwrite to move what is there aside"
            )
        for path in sorted(self.runs.glob("*.json")):
            if _read_record(path).get("recipe_digest") != self.recipe_digest:
                raise self._refusal(path)

    def _refusal(self, path: Path) -> FileExistsError:
        return FileExistsError(
            f"{self.out} holds runs of a different recipe ({path.name} does not match); choose another folder"
            " with --out DIR, or add --overwrite to move the old runs aside and start anew"
        )

    def _move_aside(self) -> Path:
        if Path.cwd().resolve().is_relative_to(self.out.resolve()):
            raise FileExistsError(f"{self.out} is the current folder and cannot be moved; choose --out DIR")
        if (self.out / LOCKS).is_dir():
            self._take(None)
        moved = self.out.rename(aside(self.out))
        self.close()
        shutil.rmtree(moved / LOCKS, ignore_errors=True)
        return moved


def _has_content(folder: Path) -> bool:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, and the results need a folder; choose --out DIR")
    return folder.is_dir() and any(not _is_beginning(path) for path in folder.iterdir())


def _is_beginning(path: Path) -> bool:
    """Whether a command that starts at this moment leaves this before it writes config.yaml."""
    return path.name == LOCKS or (path.name.startswith("config.yaml.") and path.name.endswith(PARTIAL))


def _read_record(path: Path) -> dict[str, Any]:
    """Return the record of a finished run, as it was saved: nobody has changed a figure since."""
    remedy = "remove it, and that run is done again"
    record = _read_json(path, remedy)
    if (found := record.pop(_DIGEST, None)) is None:
        raise ValueError(
            f"{path} has no digest of its content: an earlier version wrote it, or it was edited; {remedy}"
        )
    if found != digest(record):
        raise ValueError(f"{path} is damaged or was edited (its content has another digest); {remedy}")
    return record


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged (a {type(data).__name__}, not a mapping); {remedy}")
    return data

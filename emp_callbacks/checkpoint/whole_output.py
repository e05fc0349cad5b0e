"""Files and folders that appear when they are whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing", "aside", "has_content", "move_aside"]


@contextmanager
def appearing(out: Path, *, folder: bool) -> Iterator[Path]:
    """Lend a path beside `out`, which becomes `out` when the block has ended, and is removed where it fails.

    A file that is there is replaced. A folder with content is moved aside first, see `aside`: nothing that
    another wrote is deleted, and none of its files is mixed with the new ones.

    Args:
        out: The file or folder to be.
        folder: Which of them; an empty folder is lent.
    """
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    moved = None
    try:
        if folder:
            partial.mkdir()
        yield partial
        if folder and has_content(out):
            moved = move_aside(out)
        os.replace(partial, out)
        moved = None
    finally:
        if moved is not None:
            moved.rename(out)
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def move_aside(folder: Path) -> Path:
    """Rename a folder, see `aside`, and return where it is."""
    return folder.rename(aside(folder))


def aside(folder: Path) -> Path:
    """Return the first free name of NAME.old-1, -2, ..., to which a folder makes way for a new one."""
    number = 1
    while (free := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return free


def has_content(folder: Path) -> bool:
    """Return whether a path is a folder with something in it."""
    return folder.is_dir() and any(folder.iterdir())

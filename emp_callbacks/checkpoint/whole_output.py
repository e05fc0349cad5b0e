"""Files and folders that appear when they are whole, or not at all."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PARTIAL", "appearing", "aside", "has_content", "is_folder"]

PARTIAL = ".partial"
"""How the name of what is half written ends."""

_FOREIGN = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".h5", ".npz", ".onnx", ".msgpack", ".gguf"}


@contextmanager
def appearing(out: Path, *, folder: bool) -> Iterator[Path]:
    """Lend a path beside `out`, which becomes `out` when the block has ended, and is removed where it fails.

    A file that is there is replaced. A folder with content is moved aside first, see `aside`: nothing that
    another wrote is deleted, and none of its files is mixed with the new ones.

    Args:
        out: The file or folder to be.
        folder: Which of them; an empty folder is lent.
    """
    # No other process takes this name, on whichever host and in whichever container: process ids repeat there.
    partial = out.with_name(f"{out.name}.{platform.node()}-{secrets.token_hex(8)}{PARTIAL}")
    moved = None
    try:
        if folder:
            partial.mkdir()
        yield partial
        if folder and has_content(out):
            moved = out.rename(aside(out))
        os.replace(partial, out)
        moved = None
    finally:
        if moved is not None:
            moved.rename(out)
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def aside(folder: Path) -> Path:
    """Return the first free name of NAME.old-1, -2, ..., to which a folder makes way for a new one."""
    number = 1
    while (free := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return free


def has_content(folder: Path) -> bool:
    """Return whether a path is a folder with something in it."""
    return folder.is_dir() and any(folder.iterdir())


def is_folder(out: str | os.PathLike[str]) -> bool:
    """Return whether a folder is to be written: all but a name that ends in .safetensors; Llama-3.2 has no suffix.

    Raises:
        ValueError: There is no name, or that of a file of another format.
    """
    path = Path(out)
    if path.name in ("", ".."):  # "", "." and the root
        raise ValueError(f"--out {os.fspath(out)!r} has no name of its own, which can appear when all is written")
    if path.is_dir() or os.fspath(out).endswith(os.sep):
        return True
    if path.suffix.lower() in _FOREIGN:
        raise ValueError(f"--out {path}: emp writes safetensors; name {path.with_suffix('.safetensors')}, or a folder")
    return path.suffix.lower() != ".safetensors"

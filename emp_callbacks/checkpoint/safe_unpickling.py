"""Reads what `torch.save` wrote without running code from it: objects of other classes become inert placeholders."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

__all__ = ["Placeholder", "load_inert"]


class Placeholder(list[Any]):
    """Stands for an object of a file whose class is not imported, such as a hyper-parameter; does nothing.

    A list, as what a file appends to must be one. What releases of torch let a file do with an object differs: the
    oldest append to `list` alone, the newest set items of `dict` and its like alone.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]  # objects can be keys

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the class would have been given, and drop it."""

    def __setstate__(self, state: object) -> None:
        """Drop what the object was made of."""

    def __setitem__(self, *_: Any) -> None:
        """Drop an item of a mapping."""


def load_inert(path: Path, *, mapped: bool = False) -> Any:
    """Return what a file holds, on the CPU.

    PyTorch's restricted unpickler reads it. To that, each name that it does not know is declared as a class of ours:
    it imports and calls nothing by the names in the file, whatever they are.

    Args:
        path: The file.
        mapped: Leave the tensors on disk until they are used, where the format allows it.

    Raises:
        pickle.UnpicklingError: The file is a Python object as a whole, or holds one that has no placeholder
            ("Unsupported"); or it is damaged.
        Exception: The file is damaged: whatever `torch.load` raises then.
    """
    mmap = mapped and zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower():
            raise
        unsupported = pickle.UnpicklingError("Unsupported object")
        unsupported.__cause__ = error
    # One class for each name: the unpickler tells them apart by class.
    stand_ins: list[Any] = [(type("Placeholder", (Placeholder,), {}), name) for name in _unknown_names(path)]
    if not stand_ins:
        raise unsupported
    with safe_globals(stand_ins):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise unsupported from error
    if isinstance(found, Placeholder):
        raise unsupported
    return found


def _unknown_names(path: Path) -> list[str]:
    try:
        return list(get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # of the old format, or TorchScript, which is a program
        return []

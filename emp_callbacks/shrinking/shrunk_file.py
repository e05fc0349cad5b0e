"""Kept indices in the metadata of a safetensors file, and the shrunk model back from it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping

from torch import nn

from emp_callbacks.shrinking.surgery import SHRUNK, Cut, Surgery, perform

__all__ = ["load_shrunk", "surgery_metadata"]

_KEY = "emp_shrunk"


def surgery_metadata(surgery: Surgery) -> dict[str, str]:
    """Return the entry of the metadata that says what is left of each module."""
    cuts = {name: {axis: cut._asdict() for axis, cut in axes.items()} for name, axes in surgery.items()}
    return {_KEY: json.dumps({"format": 1, "modules": cuts}, separators=(",", ":"))}


def _surgery(metadata: Mapping[str, str]) -> Surgery:
    modules = json.loads(metadata[_KEY])["modules"]
    return {name: {axis: Cut(**cut) for axis, cut in axes.items()} for name, axes in modules.items()}


def load_shrunk(model: nn.Module, file: str | os.PathLike[str]) -> nn.Module:
    """Cut a dense model to the shape of a shrunk one's file, and load it.

    The file is one that `save_shrunk`, `emp export --shrink` or `emp prune --shrink` wrote.

    Args:
        model: The dense architecture, freshly made; changed in place. Its weights do not matter.
        file: The safetensors file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, does not say what was cut, or belongs to another architecture; the model may
            be cut already in the last case.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(file):
        raise ValueError(f"{os.fspath(file)} is a folder: name its .safetensors file, or load it as its metadata say")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{os.fspath(file)} does not exist")
    with open(file, "rb"):  # safetensors says of a file that it may not read that there is none
        pass
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        if zipfile.is_zipfile(file):
            raise ValueError(
                f"{os.fspath(file)} is torch.save's, which does not say what was cut: write the shrunk model by "
                "save_shrunk(model, report, 'NAME.safetensors')"
            ) from error
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{os.fspath(file)} is damaged ({reason}); copy or export it again") from error
    if _KEY not in metadata:
        raise ValueError(
            f"{os.fspath(file)} does not say what was cut (no {_KEY!r} in its metadata): write a shrunk model by "
            "save_shrunk(model, report, file); a model of full size loads by "
            "model.load_state_dict(safetensors.torch.load_file(file))"
        )
    try:
        perform(model, _surgery(metadata))
        model.load_state_dict(tensors)
        SHRUNK.add(model)
    except (AttributeError, RuntimeError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{os.fspath(file)} does not fit this {type(model).__name__}: {reason}") from error
    return model

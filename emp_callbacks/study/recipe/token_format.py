"""Files of tokens: the tokens and nothing else, as nanoGPT's .bin, and beside it what is known of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FORMAT", "beside", "dtype_for", "file_sha256", "read_sidecar"]

FORMAT = 1
"""The version that a NAME.bin.json states as its "format"."""

_MOST_BYTES = 1 << 26  # of a sidecar: it names every source file, and a corpus has at most some hundred thousand
_NEEDED = {"format": int, "dtype": str, "vocab_size": int, "tokens": int, "sha256": str}


def beside(path: Path) -> Path:
    """Return where it is written what a file of tokens holds: data.bin -> data.bin.json."""
    return path.with_name(f"{path.name}.json")


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the tokens in a file, little-endian: uint16 for 65,536 different ones, else uint32.

    Examples:
        >>> dtype_for(50257).name, dtype_for(128256).name
        ('uint16', 'uint32')
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def read_sidecar(path: Path) -> Mapping[str, Any] | None:
    """Return what the file beside a file of tokens says, None where there is no such file.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    sidecar = beside(path)
    if not sidecar.is_file():
        return None
    told: Any = None
    if sidecar.stat().st_size <= _MOST_BYTES:
        try:
            told = json.loads(sidecar.read_bytes())
        except ValueError:  # no JSON, or no UTF-8
            told = None
    if not isinstance(told, dict) or not all(isinstance(told.get(name), kind) for name, kind in _NEEDED.items()):
        raise ValueError(f"{sidecar} does not say what {path.name} holds; run emp tokenize again, or remove {sidecar}")
    if told["format"] != FORMAT or told["dtype"] != dtype_for(told["vocab_size"]).name:
        raise ValueError(
            f"{sidecar} is of format {told['format']} with {told['dtype']} tokens, and this release reads format "
            f"{FORMAT} with {dtype_for(told['vocab_size']).name}; run emp tokenize again"
        )
    return told


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits, as `sha256sum` shows it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

"""Small data in the formats of the real ones, made on the spot: what `--smoke` trains on."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["STAND_INS", "stand_in"]

_FOLDER = Path("runs", "stand-in")
_IMAGE_SIZE = 64
_TEXT_BYTES = 600_000


def stand_in(name: str) -> Path:
    """Return the folder of some data, made if it is not there; processes that start together make one.

    Args:
        name: images, tokens or gpt2.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in STAND_INS:
        raise ValueError(f"no stand-in data {name!r}; known: {', '.join(STAND_INS)}")
    folder = _FOLDER / name
    if folder.is_dir():
        return folder
    _FOLDER.mkdir(parents=True, exist_ok=True)
    made = _FOLDER / f".{name}-{secrets.token_hex(8)}"
    made.mkdir()
    try:
        STAND_INS[name](made)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _images(folder: Path) -> None:
    """Write scikit-learn's digits as an ImageNet-style folder: train/ and validation/ with a folder per class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("validation" if i % 5 == 4 else "train") / f"n{label:08d}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((_IMAGE_SIZE, _IMAGE_SIZE))
        image.convert("RGB").save(path, quality=80)


def _tokens(folder: Path) -> None:
    """Write the documentation inside the running Python as train.bin, val.bin and test.bin of bytes in uint16."""
    from emp_callbacks.study.recipe.sources import stdlib_text

    tokens = np.frombuffer(stdlib_text(_TEXT_BYTES), np.uint8).astype("<u2")
    first, second = len(tokens) * 90 // 100, len(tokens) * 95 // 100
    for name, part in {"train": tokens[:first], "val": tokens[first:second], "test": tokens[second:]}.items():
        part.tofile(folder / f"{name}.bin")


def _gpt2(folder: Path) -> None:
    """Write a tiny GPT-2 over bytes, untrained, as a Hugging Face folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128, "vocab_size": 256}
        GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes)).save_pretrained(folder)


STAND_INS: dict[str, Callable[[Path], None]] = {"images": _images, "tokens": _tokens, "gpt2": _gpt2}
"""Name -> what writes it into an empty folder."""

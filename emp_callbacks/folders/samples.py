"""What a model in a folder is called with, so that a criterion sees its activations: text and images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.extras import needs
from emp_callbacks.folders.processors import architecture, check_takes, processor_of
from emp_callbacks.folders.text_calls import read_text
from emp_callbacks.targets.names import few

__all__ = [
    "Samples",
    "check_count",
    "counted",
    "image_samples",
    "media_files",
    "model_inputs",
    "read_each",
    "spread",
    "text_samples",
]

_COLOURS = {1: "L", 3: "RGB"}  # channels -> the mode of Pillow


@dataclass(frozen=True)
class Samples:
    """What a model is called with, one sequence, image or clip after the other.

    Attributes:
        inputs: Keyword arguments of the model's forward, each a batch of one on the CPU: int64 ids, float32 pixels and
            features.
        unit: What a sample is made of: "tokens", "images" or "seconds of sound".
        notes: What a reader must know, a line each.
    """

    inputs: Sequence[Mapping[str, Tensor]] = field(repr=False)
    unit: str
    notes: tuple[str, ...] = ()


def text_samples(
    folder: Path,
    config: Any,
    text: Path | Sequence[Path],
    *,
    count: int = 128,
    length: int = 2048,
    seed: int = 0,
    first: bool = False,
    held_out_tail: float = 0.0,
    tokenizer: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Samples:
    """Return windows of a text: at random places as Wanda takes them, or the first ones as the EMP paper does.

    How the text is read and where its BOS stands: `read_text`. How a window becomes a call: `TextCall`. A text with
    room for fewer windows gives all that fit beside each other, with a note.

    Args:
        folder: With the tokenizer's files.
        config: The model's, a transformers config.
        text: One file or several, UTF-8.
        count: Windows.
        length: Tokens in one, what the tokenizer puts around a text included; of encoder and decoder together. Lowered
            to what the model takes, with a note.
        seed: Of the places.
        first: Take the first `count` windows, one behind the other (the EMP paper: 128 of 512 tokens).
        held_out_tail: Fraction of the tokens, at the end of the text, that no window reaches into.
        tokenizer: Another folder to take the tokenizer from.
        progress: Called with the fraction of the text that is tokenised.

    Raises:
        ImportError: transformers is not installed.
        OSError: A file is missing.
        ValueError: Not one window fits, or see `read_text`.
    """
    check_count(count)
    read = read_text(folder, config, text, tokenizer=tokenizer, progress=progress)
    length, notes = read.fitting(length)
    ids, _ = read.cut(held_out_tail)
    room = read.call.room(length)
    fit = len(ids) // room
    if not fit:
        raise ValueError(
            f"the text has {len(ids)} tokens for calibration and a window takes {room}; give a longer text, or "
            f"--length {len(ids) + length - room} at most"
        )
    if fit < count:
        notes += (f"the text has {len(ids)} tokens: {fit} windows of {length} instead of {count}",)
    if first or fit < count:
        begins = [room * i for i in range(min(count, fit))]
    else:
        draws = torch.Generator().manual_seed(seed)
        begins = torch.randint(len(ids) - room + 1, (count,), generator=draws).tolist()
    inputs = tuple(read.call(ids[begin : begin + room]) for begin in begins)
    return Samples(inputs, "tokens", read.notes + notes)


def image_samples(folder: Path, config: Any, images: Path, *, count: int = 128) -> Samples:
    """Return images of a folder and its subfolders, as the image processor of the model's folder makes them.

    Args:
        folder: The model's, with preprocessor_config.json.
        config: The model's, a transformers config.
        images: A folder, or one image. Of its images, sorted by path, `count` evenly spaced ones are taken; their
            colours become those of the model's channels.
        count: Images.

    Raises:
        ImportError: transformers or Pillow is not installed.
        FileNotFoundError: There is no image.
        ValueError: None can be read, or the model takes none.
    """
    check_count(count)
    processor = processor_of(folder, "AutoImageProcessor", "image processor")
    check_takes(config, ["pixel_values"], "images", "give a text or sounds, or a folder with a model of images")
    needs("reading images", "study", "PIL")
    from PIL import Image

    known = Image.registered_extensions()
    readable = {suffix for suffix, name in known.items() if name in Image.OPEN}
    channels = int(getattr(config, "num_channels", 3))
    if channels not in _COLOURS:
        raise ValueError(f"a {architecture(config)} takes images of {channels} channels; files give 1 or 3")

    def read(path: Path) -> dict[str, Tensor]:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert(_COLOURS[channels])))
        return model_inputs(processor(pixels.view(*pixels.shape[:2], channels).movedim(-1, 0), return_tensors="pt"))

    # What Pillow says of a damaged file depends on the format.
    damage = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    inputs, notes = read_each(spread(media_files(images, readable), count), read, damage)
    return Samples(inputs, "images", counted(len(inputs), count, "images") + notes)


def media_files(where: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files of a folder and its subfolders with one of these endings, sorted; or the one file itself.

    Raises:
        FileNotFoundError: There is none.
    """
    paths = [where] if where.is_file() else sorted(where.rglob("*"))
    found = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{where} holds no file that ends in {few(sorted(suffixes), 12)}; name a folder that does"
        )
    return found


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Return `count` evenly spaced ones, or all where there are fewer."""
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def read_each(
    paths: Sequence[Path], read: Callable[[Path], dict[str, Tensor]], damage: tuple[type[Exception], ...]
) -> tuple[tuple[dict[str, Tensor], ...], tuple[str, ...]]:
    """Return what is read from the files that can be, and a note that names the others.

    Args:
        paths: Files.
        read: Reads one.
        damage: What it raises where a file cannot be read.

    Raises:
        ValueError: None can be read.
    """
    inputs, damaged = [], []
    for path in paths:
        try:
            inputs.append(read(path))
        except damage as error:
            damaged.append(f"{path} ({str(error).partition(chr(10))[0]})")
    if not inputs:
        raise ValueError(f"none of {len(paths)} files can be read: {few(damaged)}; give others")
    return tuple(inputs), (f"left out, because they cannot be read: {few(damaged)}",) if damaged else ()


def counted(found: int, asked: int, unit: str) -> tuple[str, ...]:
    """Return the note that there are fewer than were asked for, if so."""
    return (f"{found} of the {asked} {unit} that were asked for",) if found < asked else ()


def model_inputs(made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a processor made, as a model is called with it: floating values in float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in made.items()}


def check_count(count: int) -> None:
    """Check that a number of samples is one.

    Raises:
        ValueError: It is below 1.
    """
    if count < 1:
        raise ValueError(f"calibration needs at least one sample, got {count}: --samples")

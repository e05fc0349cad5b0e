"""Tables of tensors for kernels that work on all of them in one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest load
TILE = 4096  # values that one program masks, of which one check sum is kept
TILE_BINS = 32  # of a histogram of each tile of scores
SAMPLE = 1 << 20  # scores of all groups together; the bracket of one group then holds one score in 200
LEAST_SAMPLE = 1 << 14  # of one group
# The lowest bits of a score's bit pattern that are 0 whatever the score.
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13}
_KEPT = 8


@dataclass(frozen=True)
class Tiles:
    """How tensors of some lengths are cut into tiles of equal length, one for each program of a launch.

    Attributes:
        owner: Which tensor each tile is of, shape (P,), int32.
        start: Its first element there, shape (P,), int64.
        length: Elements of each tensor, shape (T,), int64.
        first: The first tile of each tensor and the number of all, shape (T + 1,), int64.
        count: P.
    """

    owner: Tensor
    start: Tensor
    length: Tensor
    first: Tensor
    count: int


_tiles: OrderedDict[tuple[tuple[int, ...], int, torch.device], Tiles] = OrderedDict()


def tiles_of(lengths: Sequence[int], tile: int, device: torch.device) -> Tiles:
    """Return the tiles; those of the last few calls are kept, as a training's weights stay of one size."""
    key = tuple(lengths), tile, device
    found = _tiles.pop(key, None)
    if found is None:
        length = np.asarray(lengths, dtype=np.int64)
        counts = -(-length // tile)
        first = np.concatenate([[0], counts.cumsum()])
        owner = np.repeat(np.arange(len(length), dtype=np.int32), counts)
        start = (np.arange(first[-1]) - first[owner]) * tile
        tables = [to_device(torch.from_numpy(values), device) for values in (owner, start, length, first)]
        found = Tiles(tables[0], tables[1], tables[2], tables[3], int(first[-1]))
    _tiles[key] = found
    while len(_tiles) > _KEPT:
        _tiles.popitem(last=False)
    return found


def addresses(columns: Sequence[Sequence[Tensor | None]], device: torch.device) -> tuple[Tensor, int]:
    """Return where tensors lie, shape (columns, T), int64, 0 for None, and the alignment that all share, in bytes."""
    places = np.array([[0 if one is None else one.data_ptr() for one in column] for column in columns], np.int64)
    aligned = not (places % ALIGNMENT).any()
    return to_device(torch.from_numpy(places), device), ALIGNMENT if aligned else 1


def launching(device: torch.device) -> AbstractContextManager[None]:
    """Return a block that launches kernels on a device: Triton's go to the current one, whatever they get."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a host's values on a device, without waiting for it; those that are on a device already stay there."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

"""Sums of what the tiles of tensors gave, always in one order: the same numbers at every call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.tables import Tiles

FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def sums_of_tiles(parts: Tensor, tiles: Tiles) -> Tensor:
    """Return the sums over each tensor's tiles, shape (T, columns), float64, from (P, columns); always in one order."""
    tensors, columns = len(tiles.length), parts.shape[1]
    sums = torch.empty(tensors, columns, dtype=torch.float64, device=parts.device)
    _add_tiles[(tensors, columns)](parts, tiles.first, sums, columns, 1024)
    return sums


@triton.jit
def _add_tiles(parts, first, sums, columns, BLOCK: tl.constexpr):
    i, column = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first + i), tl.load(first + i + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        total += tl.load(parts + at * columns + column, mask=at < end, other=0.0)
    tl.store(sums + i * columns + column, tl.sum(total))

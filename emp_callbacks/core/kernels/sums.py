"""Sums of what the tiles of tensors gave, always in one order: the same numbers at every call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.tables import Tiles, launching

FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def sums_of_tiles(parts: Tensor, tiles: Tiles) -> Tensor:
    """Return the sums over each tensor's tiles, shape (T, columns), float64, from (P, columns); always in one order."""
    return sums_of_runs(parts, tiles.first)


def sums_of_runs(values: Tensor, first: Tensor) -> Tensor:
    """Return the sums over rows that follow each other, shape (T, columns), float64, from (P, columns).

    Args:
        values: Float64, contiguous.
        first: The first row of each run and the end of the last, shape (T + 1,), int64.
    """
    runs, columns = len(first) - 1, values.shape[1]
    sums = torch.empty(runs, columns, dtype=torch.float64, device=values.device)
    if runs:
        with launching(values.device):
            _add_runs[(runs, columns)](values, first, sums, columns, 1024)
    return sums


@triton.jit
def _add_runs(parts, first, sums, columns, BLOCK: tl.constexpr):
    i, column = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first + i), tl.load(first + i + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        total += tl.load(parts + at * columns + column, mask=at < end, other=0.0)
    tl.store(sums + i * columns + column, tl.sum(total))

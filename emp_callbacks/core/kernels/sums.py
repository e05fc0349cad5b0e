"""Sums over many tensors in one pass, in float64; the same numbers at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.tables import Tiles, addresses, tiles_of

BLOCK = 2048
WARPS = 8
TILE = 16 * BLOCK
FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def moments_of(scores: Sequence[Tensor]) -> Tensor:
    """Return sum |s|, sum s^2 and the number of scores that are not 0, shape (T, 3), float64.

    Args:
        scores: T flat tensors of one dtype.
    """
    device = scores[0].device
    tiles = tiles_of([one.numel() for one in scores], TILE, device)
    table, alignment = addresses([scores], device)
    parts = torch.empty(tiles.count, 3, dtype=torch.float64, device=device)
    if tiles.count:
        _moments[(tiles.count,)](
            table, tiles.owner, tiles.start, tiles.length, parts,
            FLOATS[scores[0].dtype], TILE, BLOCK, alignment, num_warps=WARPS,
        )  # fmt: skip
    return sums_of_tiles(parts, tiles)


def sums_of_tiles(parts: Tensor, tiles: Tiles) -> Tensor:
    """Return the sums over each tensor's tiles, shape (T, columns), float64, from (P, columns); always in one order."""
    tensors, columns = len(tiles.length), parts.shape[1]
    sums = torch.empty(tensors, columns, dtype=torch.float64, device=parts.device)
    _add_tiles[(tensors, columns)](parts, tiles.first, sums, columns, 1024)
    return sums


@triton.jit
def _moments(
    table, owner, start, length, parts,
    FLOAT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    scores = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(FLOAT)), ALIGNMENT)
    size = tl.load(length + i)
    end = tl.minimum(first + TILE, size)
    total, total_sq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    whole = first + (end - first) // BLOCK * BLOCK
    for begin in range(first, whole, BLOCK):
        score = tl.abs(tl.load(scores + tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)).to(tl.float64))
        total += score
        total_sq += score * score
        count += (score != 0).to(tl.int32)
    if whole < end:
        at = whole + tl.arange(0, BLOCK)
        score = tl.abs(tl.load(scores + at, mask=at < end, other=0.0).to(tl.float64))
        total += score
        total_sq += score * score
        count += (score != 0).to(tl.int32)
    tl.store(parts + 3 * program, tl.sum(total))
    tl.store(parts + 3 * program + 1, tl.sum(total_sq))
    tl.store(parts + 3 * program + 2, tl.sum(count).to(tl.float64))


@triton.jit
def _add_tiles(parts, first, sums, columns, BLOCK: tl.constexpr):
    i, column = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first + i), tl.load(first + i + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        total += tl.load(parts + at * columns + column, mask=at < end, other=0.0)
    tl.store(sums + i * columns + column, tl.sum(total))

"""One pass over the scores of many groups: their moments, and a histogram of those in a window of each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.sums import FLOATS, sums_of_tiles
from emp_callbacks.core.kernels.tables import TILE_BINS, Tiles, addresses, launching, tiles_of, to_device

BLOCK = 1024
TILE = 32 * BLOCK
WARPS = 4


class Surveyed(NamedTuple):
    """What a pass has seen of T tensors.

    Attributes:
        moments: sum |s|, sum s^2 and the number of scores that are not 0, shape (T, 3), float64; 0 if not asked for.
        above: Scores above the window, shape (T,), int64.
        bins: Of each group's window, shape (G, bins), int64; of each tile's, shape (P, TILE_BINS), int32.
        tiles: How the tensors were cut.
    """

    moments: Tensor
    above: Tensor
    bins: Tensor
    tiles: Tiles


def survey_tensors(
    scores: Sequence[Tensor], group_of: Tensor, low_g: Tensor, shift_g: Tensor, bins: int, *, by_tile: bool, sums: bool
) -> Surveyed:
    """Count the scores in and above a window of keys of each group, and sum them.

    The key of a score is the bit pattern of its magnitude. Bin b of the window holds the keys from low + (b << shift)
    on, 1 << shift of them.

    Args:
        scores: T flat tensors of one dtype.
        group_of: The group of each, shape (T,), int32, on their device.
        low_g: Where each group's window begins, shape (G,), int32 or int64, as wide as the keys.
        shift_g: Shape (G,), of the same dtype.
        bins: Of a window.
        by_tile: Whether each tile has a window's bins of its own, TILE_BINS of them.
        sums: Whether moments are summed.
    """
    device, dtype = scores[0].device, scores[0].dtype
    tiles = tiles_of([one.numel() for one in scores], TILE, device)
    table, alignment = addresses([scores], device)
    parts = torch.zeros(tiles.count, 4, dtype=torch.float64, device=device)
    counts = torch.zeros((tiles.count, TILE_BINS) if by_tile else (len(low_g), bins), dtype=torch.int32, device=device)
    wide = low_g.dtype == torch.int64
    if tiles.count:
        with launching(device):
            _survey[(tiles.count,)](
                table, tiles.owner, tiles.start, tiles.length, group_of, low_g, shift_g, parts, counts,
                FLOATS[dtype], tl.float64 if wide else tl.float32, tl.int64 if wide else tl.int32,
                counts.shape[1], by_tile, sums, (1 << (63 if wide else 31)) - 1, TILE, BLOCK, alignment,
                num_warps=WARPS,
            )  # fmt: skip
    added = sums_of_tiles(parts, tiles)
    return Surveyed(added[:, :3], added[:, 3].long(), counts, tiles)


@triton.jit
def _survey(
    table, owner, start, length, group_of, low_g, shift_g, parts, counts,
    FLOAT: tl.constexpr, KEY: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr, BY_TILE: tl.constexpr,
    SUMS: tl.constexpr, HIGHEST: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), TILE)
    scores = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(FLOAT)), ALIGNMENT) + first
    group = tl.load(group_of + i)
    low, shift = tl.load(low_g + group), tl.load(shift_g + group)
    # The highest key of the window; beyond the highest of all keys there is none. A score of 0 is in no window.
    high = tl.minimum(low.to(tl.int64) + (tl.full([], BINS, tl.int64) << shift.to(tl.int64)) - 1, HIGHEST)
    high = tl.where(high < low, HIGHEST, high).to(BITS)  # 64 bits of it were not enough
    least = tl.maximum(low, 1)
    window = counts + (program if BY_TILE else group).to(tl.int64) * BINS
    end = tl.minimum(TILE, tl.load(length + i) - first).to(tl.int32)
    total, total_sq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    nonzero, above = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for begin in range(0, end, BLOCK):
        at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
        if begin + BLOCK <= end:  # without a bound, loads are as wide as the alignment allows
            magnitude = tl.abs(tl.load(scores + at).to(KEY))
        else:
            magnitude = tl.abs(tl.load(scores + at, mask=at < end, other=0.0).to(KEY))
        key = magnitude.to(BITS, bitcast=True)
        if SUMS:
            wide = magnitude.to(tl.float64)
            total += wide
            total_sq += wide * wide
            nonzero += (key != 0).to(tl.int32)
        above += (key > high).to(tl.int32)  # what is behind the end has key 0
        inside = (key >= least) & (key <= high)
        tl.atomic_add(window + ((key - low) >> shift), tl.full([BLOCK], 1, tl.int32), mask=inside, sem="relaxed")
    if SUMS:
        tl.store(parts + 4 * program, tl.sum(total))
        tl.store(parts + 4 * program + 1, tl.sum(total_sq))
        tl.store(parts + 4 * program + 2, tl.sum(nonzero).to(tl.float64))
    tl.store(parts + 4 * program + 3, tl.sum(above).to(tl.float64))


SAMPLE_BLOCK = 1024


def sample_tensors(
    scores: Sequence[Tensor], counts: Sequence[int], steps: Sequence[float], group_of: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return |s| of one of every so many scores of each tensor, shape (M,), `dtype`, and its group, (M,), int32.

    Each time at another place of its `step`, so as not to beat with the rows of a matrix.
    """
    device = scores[0].device
    tiles = tiles_of(counts, SAMPLE_BLOCK, device)
    table, _ = addresses([scores], device)
    total = sum(counts)
    sample = torch.empty(total, dtype=dtype, device=device)
    groups = torch.empty(total, dtype=torch.int32, device=device)
    first = to_device(torch.tensor([0, *counts]).cumsum(0), device)
    wide_steps = to_device(torch.tensor(list(steps), dtype=torch.float64), device)
    if tiles.count:
        with launching(device):
            _sample[(tiles.count,)](
                table, tiles.owner, tiles.start, tiles.length, wide_steps, group_of, first, sample, groups,
                FLOATS[scores[0].dtype], FLOATS[dtype], SAMPLE_BLOCK,
            )  # fmt: skip
    return sample, groups


@triton.jit
def _sample(
    table, owner, start, length, steps, group_of, first, sample, groups,
    FLOAT: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = tl.load(owner + program)
    scores = tl.load(table + i).to(tl.pointer_type(FLOAT))
    at = tl.load(start + program) + tl.arange(0, BLOCK)
    inside = at < tl.load(length + i)
    spread = at.to(tl.float64) * 0.6180339887498949  # the golden ratio's multiples, modulo 1, spread most evenly
    place = ((at.to(tl.float64) + spread - tl.floor(spread)) * tl.load(steps + i)).to(tl.int64)
    magnitude = tl.abs(tl.load(scores + place, mask=inside, other=0.0).to(KEY))
    to = tl.load(first + i) + at
    tl.store(sample + to, magnitude, mask=inside)
    tl.store(groups + to, tl.zeros([BLOCK], tl.int32) + tl.load(group_of + i), mask=inside)


def ties_before(scores: Sequence[Tensor], value_t: Tensor, upto: Tensor, tiles: Tiles, limit_tk: Tensor) -> Tensor:
    """Return how many scores of each tensor equal a value and lie before an index, shape (T, K), int64.

    Args:
        scores: T flat tensors of one dtype.
        value_t: Shape (T,), float32 or float64.
        upto: How many ties lie before each tile, over all tensors, shape (P + 1,), int64.
        tiles: How the tensors were cut.
        limit_tk: The indices, shape (T, K), int64, each in [0, length].
    """
    device = scores[0].device
    table, _ = addresses([scores], device)
    found = torch.empty_like(limit_tk)
    with launching(device):
        _ties_before[tuple(limit_tk.shape)](
            table, value_t, upto, tiles.first, limit_tk.contiguous(), found, limit_tk.shape[1],
            FLOATS[scores[0].dtype], FLOATS[value_t.dtype], TILE, BLOCK,
        )  # fmt: skip
    return found


@triton.jit
def _ties_before(
    table, value_t, upto, first, limit_tk, found, columns,
    FLOAT: tl.constexpr, KEY: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, k = tl.program_id(0), tl.program_id(1)
    scores = tl.load(table + i).to(tl.pointer_type(FLOAT))
    value, limit = tl.load(value_t + i), tl.load(limit_tk + i * columns + k)
    begin = tl.load(first + i)
    whole = limit // TILE
    before = tl.load(upto + begin + whole) - tl.load(upto + begin)
    ties = tl.zeros([BLOCK], tl.int32)
    for block in range(whole * TILE, limit, BLOCK):
        at = block + tl.arange(0, BLOCK)
        inside = at < limit
        score = tl.abs(tl.load(scores + at, mask=inside, other=0.0).to(KEY))
        ties += ((score == value) & inside).to(tl.int32)
    tl.store(found + i * columns + k, before + tl.sum(ties))

"""How scores of many groups lie to a bracket of each group, in one pass; those in it are taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.sums import FLOATS
from emp_callbacks.core.kernels.tables import addresses, tiles_of, to_device

BLOCK = 2048
WARPS = 8
TILE = 16 * BLOCK


class Taken(NamedTuple):
    """Scores in the brackets, in no order.

    Attributes:
        sums: Scores above each group's bracket and in it, shape (G, 2), int64.
        magnitude: In the dtype of the bounds; group g's begin at `first[g]`, as many as there are in its bracket, or
            as there is room for.
        place: Index in its tensor of each, int64.
        tensor: Index of its tensor, int32.
        first: Shape (G + 1,).
    """

    sums: Tensor
    magnitude: Tensor
    place: Tensor
    tensor: Tensor
    first: list[int]


def divide_tensors(
    scores: Sequence[Tensor], group_of: Sequence[int], low_g: Tensor, high_g: Tensor, room: Sequence[int]
) -> Taken:
    """Return how many scores of each group are above `high` and how many within `low` and `high`, and these.

    Args:
        scores: T flat tensors of one dtype, on one device.
        group_of: The group of each tensor.
        low_g: Lower end of each group's bracket, shape (G,), float32 or float64, on the device.
        high_g: Upper end.
        room: How many scores of each group are taken out at most.
    """
    device = scores[0].device
    tiles = tiles_of([one.numel() for one in scores], TILE, device)
    table, alignment = addresses([scores], device)
    first = torch.tensor([0, *room]).cumsum(0)
    total = int(first[-1])
    magnitude = torch.empty(total, dtype=low_g.dtype, device=device)
    place = torch.empty(total, dtype=torch.int64, device=device)
    tensor = torch.empty(total, dtype=torch.int32, device=device)
    sums = torch.zeros(len(room), 2, dtype=torch.int64, device=device)
    groups = to_device(torch.tensor(list(group_of), dtype=torch.int32), device)
    if tiles.count:
        _divide[(tiles.count,)](
            table, tiles.owner, tiles.start, tiles.length, groups, low_g, high_g, to_device(first, device),
            sums, magnitude, place, tensor,
            FLOATS[scores[0].dtype], FLOATS[low_g.dtype], TILE, BLOCK, alignment, num_warps=WARPS,
        )  # fmt: skip
    return Taken(sums, magnitude, place, tensor, first.tolist())


@triton.jit
def _divide(
    table, owner, start, length, groups, low_g, high_g, room_g, sums, magnitudes, places, tensors,
    FLOAT: tl.constexpr, KEY: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    scores = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(FLOAT)), ALIGNMENT)
    group = tl.load(groups + i)
    low, high = tl.load(low_g + group), tl.load(high_g + group)
    room, room_end = tl.load(room_g + group), tl.load(room_g + group + 1)
    size = tl.load(length + i)
    end = tl.minimum(first + TILE, size)
    whole = first + (end - first) // BLOCK * BLOCK
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(first, end, BLOCK):
        at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
        if begin < whole:
            score = tl.abs(tl.load(scores + at).to(KEY))
        else:
            score = tl.abs(tl.load(scores + at, mask=at < end, other=0.0).to(KEY))
        above += (score > high).to(tl.int32)
        # What lies behind the end counts as 0, and a score of 0 is in no bracket.
        within = ((score >= low) & (score <= high)).to(tl.int32)
        count = tl.sum(within)
        if count > 0:
            begun = room + tl.atomic_add(sums + 2 * group + 1, count.to(tl.int64))
            slot = begun + tl.cumsum(within) - 1
            fits = (within != 0) & (slot < room_end)
            tl.store(magnitudes + slot, score, mask=fits)
            tl.store(places + slot, at.to(tl.int64), mask=fits)
            tl.store(tensors + slot, tl.zeros_like(within) + i, mask=fits)
    tl.atomic_add(sums + 2 * group, tl.sum(above).to(tl.int64))

"""Masks from thresholds, their counts and the masked values, of many tensors in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.masking import INTEGERS, weighed
from emp_callbacks.core.kernels.sums import FLOATS, sums_of_tiles
from emp_callbacks.core.kernels.tables import TILE as CHECKED
from emp_callbacks.core.kernels.tables import addresses, launching, tiles_of, to_device
from emp_callbacks.core.row_parts import RowCuts

BLOCK = 1024
WARPS = 8
TILE = 16 * BLOCK


class OneCut(NamedTuple):
    """The rule for a tensor that is, or is a part of, one group.

    Attributes:
        value: The lowest kept score.
        ties_end: Of the scores equal to it, those at an index below this are kept.
    """

    value: float
    ties_end: int


class Choice(NamedTuple):
    """What one tensor's mask is made of; contiguous, of n components.

    Attributes:
        scores: Either sign.
        cut: What is kept.
        counted: The range of indices that this rank counts.
        old: The mask until now, bool; None: all were kept.
        mask: Where the new one is written, which may be `old`.
        source: The values to be masked, None if there are none.
        target: Where they are written, which may be `source`.
        sums: Where the check sums of what is written go, see `masking.copy_masked`; None: there are none.
    """

    scores: Tensor
    cut: OneCut | RowCuts
    counted: tuple[int, int]
    old: Tensor | None
    mask: Tensor
    source: Tensor | None
    target: Tensor | None
    sums: Tensor | None = None


def choose_tensors(choices: Sequence[Choice], dtype: torch.dtype, *, within_old: bool) -> Tensor:
    """Write masks and masked values, and return kept, kept mass, flipped and regrown of each, shape (T, 4), float64.

    Args:
        choices: Of T tensors whose scores have one dtype and whose values, where there are, one item size; the cuts of
            all are of one kind.
        dtype: float32 or float64, in which scores compare.
        within_old: Whether what was pruned stays so.
    """
    device, of_rows = choices[0].scores.device, isinstance(choices[0].cut, RowCuts)
    tiles = tiles_of([one.scores.numel() for one in choices], TILE, device)
    parts = torch.empty(tiles.count, 4, dtype=torch.float64, device=device)
    columns = [
        (one.scores, one.old, one.mask, one.source, one.target, *_row_tensors(one.cut), one.sums) for one in choices
    ]
    table, alignment = addresses(list(zip(*columns, strict=True)), device)
    lowest = [one.cut.value if isinstance(one.cut, OneCut) else 0.0 for one in choices]
    values = to_device(torch.tensor(lowest, dtype=dtype), device)
    bounds = to_device(torch.tensor([[*one.counted, *_shape(one.cut)] for one in choices]), device)
    sizes = {one.source.element_size() for one in choices if one.source is not None} or {4}
    if tiles.count:
        with launching(device):
            _choose[(tiles.count,)](
                table, len(choices), tiles.owner, tiles.start, tiles.length, values, bounds, parts,
                FLOATS[choices[0].scores.dtype], FLOATS[dtype], INTEGERS[sizes.pop()], within_old, of_rows,
                TILE, BLOCK, CHECKED, alignment, num_warps=WARPS,
            )  # fmt: skip
    return sums_of_tiles(parts, tiles)


def _row_tensors(cut: OneCut | RowCuts) -> tuple[Tensor | None, Tensor | None]:
    return (cut.value, cut.last_tie) if isinstance(cut, RowCuts) else (None, None)


def _shape(cut: OneCut | RowCuts) -> tuple[int, int]:
    return (len(cut.value), cut.width) if isinstance(cut, RowCuts) else (cut.ties_end, 0)


@triton.jit
def _beyond(score, first, at, i, table, tensors, value, ties_end, width, KEY: tl.constexpr, OF_ROWS: tl.constexpr):
    """Return which scores are not kept; of those equal to the lowest kept one, the last."""
    if OF_ROWS:
        of_row = tl.load(table + 5 * tensors + i).to(tl.pointer_type(KEY))
        last_tie = tl.load(table + 6 * tensors + i).to(tl.pointer_type(tl.int64))
        piece = (first + at) // width
        row = piece % ties_end  # the number of rows
        column = piece // ties_end * width + (first + at) - piece * width
        lowest = tl.load(of_row + row)
        return (score < lowest) | ((score == lowest) & (column > tl.load(last_tie + row)))
    return (score < value) | ((score == value) & (at >= ties_end))


@triton.jit
def _within(bound, first, TILE: tl.constexpr):
    """Return an index of a tensor as one of its tile that begins at `first`, which needs 32 bits only."""
    return tl.minimum(tl.maximum(bound - first, 0), TILE).to(tl.int32)


@triton.jit
def _choose(
    table, tensors, owner, start, length, values, bounds, parts,
    FLOAT: tl.constexpr, KEY: tl.constexpr, BITS: tl.constexpr, WITHIN_OLD: tl.constexpr, OF_ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), TILE)
    old_place = tl.load(table + tensors + i)
    source_place, target_place = tl.load(table + 3 * tensors + i), tl.load(table + 4 * tensors + i)
    sums_place = tl.load(table + 7 * tensors + i)
    scores = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(FLOAT)), ALIGNMENT) + first
    old = tl.multiple_of(old_place.to(tl.pointer_type(tl.int8)), ALIGNMENT) + first
    mask = tl.multiple_of(tl.load(table + 2 * tensors + i).to(tl.pointer_type(tl.int8)), ALIGNMENT) + first
    source = tl.multiple_of(source_place.to(tl.pointer_type(BITS)), ALIGNMENT) + first
    target = tl.multiple_of(target_place.to(tl.pointer_type(BITS)), ALIGNMENT) + first
    sums = sums_place.to(tl.pointer_type(tl.int64)) + first // CHECKED
    value = tl.load(values + i)
    count_from = _within(tl.load(bounds + 4 * i), first, TILE)
    count_to = _within(tl.load(bounds + 4 * i + 1), first, TILE)
    ties_end, width = tl.load(bounds + 4 * i + 2), tl.load(bounds + 4 * i + 3)
    if OF_ROWS == 0:
        ties_end = _within(ties_end, first, TILE)
    end = _within(tl.load(length + i), first, TILE)
    kept_sum, flipped_sum, regrown_sum = (
        tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32),
    )  # fmt: skip
    mass_sum = tl.zeros([BLOCK], tl.float64)
    check_sum = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, end, BLOCK):
        at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
        counted = (at >= count_from) & (at < count_to)
        was = tl.full([BLOCK], 1, tl.int1)
        if begin + BLOCK <= end:  # without a bound, loads are as wide as the alignment allows
            score = tl.abs(tl.load(scores + at).to(KEY))
            if old_place != 0:
                was = tl.load(old + at) != 0
            kept = _beyond(score, first, at, i, table, tensors, value, ties_end, width, KEY, OF_ROWS) == 0
            if WITHIN_OLD:
                kept = kept & was
            tl.store(mask + at, kept.to(tl.int8))
            if source_place != 0:
                bits = tl.load(source + at)
                shown = tl.where(kept, bits, 0)
                if source_place == target_place:
                    tl.store(target + at, shown, mask=(bits != 0) & (kept == 0))
                else:
                    tl.store(target + at, shown)
                check_sum += weighed(shown, at % CHECKED)
        else:
            inside = at < end
            score = tl.abs(tl.load(scores + at, mask=inside, other=0.0).to(KEY))
            if old_place != 0:
                was = tl.load(old + at, mask=inside, other=1) != 0
            # Clamped, so that no bound of a row is read behind the end.
            place = tl.minimum(at, end - 1)
            kept = _beyond(score, first, place, i, table, tensors, value, ties_end, width, KEY, OF_ROWS) == 0
            if WITHIN_OLD:
                kept = kept & was
            tl.store(mask + at, kept.to(tl.int8), mask=inside)
            if source_place != 0:
                bits = tl.load(source + at, mask=inside, other=0)
                shown = tl.where(kept, bits, 0)
                if source_place == target_place:
                    tl.store(target + at, shown, mask=(bits != 0) & (kept == 0) & inside)
                else:
                    tl.store(target + at, shown, mask=inside)
                check_sum += weighed(shown, at % CHECKED)
        # Once for several blocks: a sum over a block is what all its threads wait for.
        if (sums_place != 0) & (((begin + BLOCK) % CHECKED == 0) | (begin + BLOCK >= end)):
            tl.store(sums + begin // CHECKED, tl.sum(check_sum))
            check_sum = tl.zeros([BLOCK], tl.int64)
        kept_sum += (kept & counted).to(tl.int32)
        flipped_sum += ((kept != was) & counted).to(tl.int32)
        regrown_sum += (kept & (was == 0) & counted).to(tl.int32)
        mass_sum += tl.where(kept & counted, score, 0.0).to(tl.float64)
    tl.store(parts + 4 * program, tl.sum(kept_sum).to(tl.float64))
    tl.store(parts + 4 * program + 1, tl.sum(mass_sum))
    tl.store(parts + 4 * program + 2, tl.sum(flipped_sum).to(tl.float64))
    tl.store(parts + 4 * program + 3, tl.sum(regrown_sum).to(tl.float64))

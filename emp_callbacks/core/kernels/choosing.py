"""Masks from thresholds, their counts and the masked values, of many tensors in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.masking import INTEGERS
from emp_callbacks.core.kernels.sums import FLOATS, sums_of_tiles
from emp_callbacks.core.kernels.tables import addresses, tiles_of, to_device
from emp_callbacks.core.row_parts import RowCuts

BLOCK = 2048
WARPS = 8
TILE = 8 * BLOCK


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
    """

    scores: Tensor
    cut: OneCut | RowCuts
    counted: tuple[int, int]
    old: Tensor | None
    mask: Tensor
    source: Tensor | None
    target: Tensor | None


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
    columns = [(one.scores, one.old, one.mask, one.source, one.target, *_row_tensors(one.cut)) for one in choices]
    table, alignment = addresses(list(zip(*columns, strict=True)), device)
    lowest = [one.cut.value if isinstance(one.cut, OneCut) else 0.0 for one in choices]
    values = to_device(torch.tensor(lowest, dtype=dtype), device)
    bounds = to_device(torch.tensor([[*one.counted, *_shape(one.cut)] for one in choices]), device)
    sizes = {one.source.element_size() for one in choices if one.source is not None} or {4}
    if tiles.count:
        _choose[(tiles.count,)](
            table, len(choices), tiles.owner, tiles.start, tiles.length, values, bounds, parts,
            FLOATS[choices[0].scores.dtype], FLOATS[dtype], INTEGERS[sizes.pop()], within_old, of_rows,
            TILE, BLOCK, alignment, num_warps=WARPS,
        )  # fmt: skip
    return sums_of_tiles(parts, tiles)


def _row_tensors(cut: OneCut | RowCuts) -> tuple[Tensor | None, Tensor | None]:
    return (cut.value, cut.last_tie) if isinstance(cut, RowCuts) else (None, None)


def _shape(cut: OneCut | RowCuts) -> tuple[int, int]:
    return (len(cut.value), cut.width) if isinstance(cut, RowCuts) else (cut.ties_end, 0)


@triton.jit
def _beyond(score, at, i, table, tensors, value, ties_end, width, KEY: tl.constexpr, OF_ROWS: tl.constexpr):
    """Return which scores are not kept; of those equal to the lowest kept one, the last."""
    if OF_ROWS:
        of_row = tl.load(table + 5 * tensors + i).to(tl.pointer_type(KEY))
        last_tie = tl.load(table + 6 * tensors + i).to(tl.pointer_type(tl.int64))
        row = at // width % ties_end  # the number of rows
        column = at // (width * ties_end) * width + at % width
        lowest = tl.load(of_row + row)
        return (score < lowest) | ((score == lowest) & (column > tl.load(last_tie + row)))
    return (score < value) | ((score == value) & (at >= ties_end))


@triton.jit
def _choose(
    table, tensors, owner, start, length, values, bounds, parts,
    FLOAT: tl.constexpr, KEY: tl.constexpr, BITS: tl.constexpr, WITHIN_OLD: tl.constexpr, OF_ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    scores = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(FLOAT)), ALIGNMENT)
    old_place = tl.load(table + tensors + i)
    source_place, target_place = tl.load(table + 3 * tensors + i), tl.load(table + 4 * tensors + i)
    old = tl.multiple_of(old_place.to(tl.pointer_type(tl.int8)), ALIGNMENT)
    mask = tl.multiple_of(tl.load(table + 2 * tensors + i).to(tl.pointer_type(tl.int8)), ALIGNMENT)
    source = tl.multiple_of(source_place.to(tl.pointer_type(BITS)), ALIGNMENT)
    target = tl.multiple_of(target_place.to(tl.pointer_type(BITS)), ALIGNMENT)
    value = tl.load(values + i)
    count_from, count_to = tl.load(bounds + 4 * i), tl.load(bounds + 4 * i + 1)
    ties_end, width = tl.load(bounds + 4 * i + 2), tl.load(bounds + 4 * i + 3)
    size = tl.load(length + i)
    end = tl.minimum(first + TILE, size)
    kept_sum, flipped_sum, regrown_sum = (
        tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32),
    )  # fmt: skip
    mass_sum = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, end, BLOCK):
        at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
        if begin + BLOCK <= end:
            score = tl.abs(tl.load(scores + at).to(KEY))
            before = tl.full([BLOCK], 1, tl.int8)
            if old_place != 0:
                before = tl.load(old + at)
            kept = _beyond(score, at, i, table, tensors, value, ties_end, width, KEY, OF_ROWS) == 0
            if WITHIN_OLD:
                kept = kept & (before != 0)
            tl.store(mask + at, kept.to(tl.int8))
            if source_place != 0:
                bits = tl.load(source + at)
                if source_place == target_place:
                    tl.store(target + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))
                else:
                    tl.store(target + at, tl.where(kept, bits, 0))
            counted = (at >= count_from) & (at < count_to)
        else:
            inside = at < end
            score = tl.abs(tl.load(scores + at, mask=inside, other=0.0).to(KEY))
            before = tl.full([BLOCK], 1, tl.int8)
            if old_place != 0:
                before = tl.load(old + at, mask=inside, other=1)
            kept = _beyond(score, at, i, table, tensors, value, ties_end, width, KEY, OF_ROWS) == 0
            if WITHIN_OLD:
                kept = kept & (before != 0)
            tl.store(mask + at, kept.to(tl.int8), mask=inside)
            if source_place != 0:
                bits = tl.load(source + at, mask=inside, other=0)
                if source_place == target_place:
                    tl.store(target + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0) & inside)
                else:
                    tl.store(target + at, tl.where(kept, bits, 0), mask=inside)
            counted = (at >= count_from) & (at < count_to) & inside
        was = before != 0
        kept_sum += (kept & counted).to(tl.int32)
        flipped_sum += ((kept != was) & counted).to(tl.int32)
        regrown_sum += (kept & (was == 0) & counted).to(tl.int32)
        mass_sum += tl.where(kept & counted, score, 0.0).to(tl.float64)
    tl.store(parts + 4 * program, tl.sum(kept_sum).to(tl.float64))
    tl.store(parts + 4 * program + 1, tl.sum(mass_sum))
    tl.store(parts + 4 * program + 2, tl.sum(flipped_sum).to(tl.float64))
    tl.store(parts + 4 * program + 3, tl.sum(regrown_sum).to(tl.float64))

"""Rows of a matrix, each its own group: one program for each row, which never leaves the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.kernels.sums import FLOATS
from emp_callbacks.core.kernels.tables import launching

RESIDENT = 1 << 14  # scores of a row that stay in registers; longer ones are read again, from the cache, at each probe
ALL_TIES = torch.iinfo(torch.int64).max


def row_moments(scores_rn: Tensor) -> Tensor:
    """Return sum |s|, sum s^2 and the number of scores that are not 0 of each row, shape (R, 3), float64."""
    rows, size = scores_rn.shape
    sums = torch.zeros(rows, 3, dtype=torch.float64, device=scores_rn.device)
    if scores_rn.numel():
        block = min(triton.next_power_of_2(size), 2048)
        with launching(scores_rn.device):
            _row_moments[(rows,)](scores_rn, size, sums, block, num_warps=_warps(block))
    return sums


def row_thresholds(scores_rn: Tensor, keep_r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the lowest kept score of each row and the column of the last tie that is kept.

    Args:
        scores_rn: Shape (R, N), contiguous, floating, either sign.
        keep_r: How many are kept, shape (R,), int64, each in [1, N].
        dtype: float32 or float64, in which they compare.

    Returns:
        Shape (R,), `dtype`, and shape (R,), int64; ALL_TIES where all scores equal to the lowest are kept.
    """
    rows, size = scores_rn.shape
    value = torch.empty(rows, dtype=dtype, device=scores_rn.device)
    last_tie = torch.empty(rows, dtype=torch.int64, device=scores_rn.device)
    if scores_rn.numel():
        block = min(triton.next_power_of_2(size), RESIDENT)
        wide = dtype == torch.float64
        with launching(scores_rn.device):
            _row_thresholds[(rows,)](
                scores_rn, keep_r, size, value, last_tie,
                FLOATS[dtype], tl.int64 if wide else tl.int32, 62 if wide else 30, max(1, size.bit_length()), ALL_TIES,
                block, size <= block, num_warps=_warps(block),
            )  # fmt: skip
    return value, last_tie


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _row_moments(scores, size, sums, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total, total_sq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        score = tl.abs(tl.load(scores + row * size + at, mask=at < size, other=0.0).to(tl.float64))
        total += score
        total_sq += score * score
        count += (score != 0).to(tl.int32)
    tl.store(sums + 3 * row, tl.sum(total))
    tl.store(sums + 3 * row + 1, tl.sum(total_sq))
    tl.store(sums + 3 * row + 2, tl.sum(count).to(tl.float64))


@triton.jit
def _keys(scores, at, size, KEY: tl.constexpr, BITS: tl.constexpr):
    score = tl.abs(tl.load(scores + at, mask=at < size, other=0.0).to(KEY))
    return tl.where(at < size, score.to(BITS, bitcast=True), -1)


@triton.jit
def _count(keys, scores, size, least, KEY: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Count the keys of a row that are at least `least`."""
    if WHOLE:
        return tl.sum((keys >= least).to(tl.int32))
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        count += (_keys(scores, begin + tl.arange(0, BLOCK), size, KEY, BITS) >= least).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _count_ties(
    keys, scores, size, key, before, KEY: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Count the keys of a row that equal `key` and lie before a column."""
    if WHOLE:
        return tl.sum(((keys == key) & (tl.arange(0, BLOCK) < before)).to(tl.int32))
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        count += ((_keys(scores, at, size, KEY, BITS) == key) & (at < before)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _row_thresholds(
    all_scores, keep_r, size, value, last_tie,
    KEY: tl.constexpr, BITS: tl.constexpr, HIGHEST: tl.constexpr, COLUMN_BITS: tl.constexpr, EVERY_TIE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores = all_scores + row * size
    keep = tl.load(keep_r + row).to(tl.int32)
    keys = _keys(scores, tl.arange(0, BLOCK), size, KEY, BITS)
    key, bit = tl.full([], 0, BITS), tl.full([], 1 << HIGHEST, BITS)
    for _ in range(0, HIGHEST + 1):  # the highest key that as many reach as are kept, bit by bit
        if _count(keys, scores, size, key | bit, KEY, BITS, BLOCK, WHOLE) >= keep:
            key = key | bit
        bit = bit >> 1
    need = keep - _count(keys, scores, size, key + 1, KEY, BITS, BLOCK, WHOLE)
    last = tl.full([], EVERY_TIE, tl.int64)
    if need < _count_ties(keys, scores, size, key, size, KEY, BITS, BLOCK, WHOLE):
        column, step = tl.full([], 0, tl.int32), tl.full([], 1 << (COLUMN_BITS - 1), tl.int32)
        for _ in range(0, COLUMN_BITS):  # fewer than needed lie before it
            if _count_ties(keys, scores, size, key, column | step, KEY, BITS, BLOCK, WHOLE) < need:
                column = column | step
            step = step >> 1
        last = column.to(tl.int64)
    tl.store(value + row, key.to(KEY, bitcast=True))
    tl.store(last_tie + row, last)

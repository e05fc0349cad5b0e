"""Masks applied to many tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.kernels.tables import TILE, addresses, launching, tiles_of

BLOCK = TILE
WARPS = 8
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def mask_tensors(values: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set what masks prune to 0, in place; one launch.

    Values that are 0 already are not written: where masks hold, it costs one read of values and masks.

    Args:
        values: T tensors of one item size, each dense in memory; read as bits, so NaN and Inf are like any other.
        masks: Bool, True = kept, each laid out in memory as its values.
    """
    device, size = values[0].device, values[0].element_size()
    tiles = tiles_of([one.numel() for one in values], BLOCK, device)
    table, alignment = addresses([values, masks], device)
    if tiles.count:
        with launching(device):
            _mask[(tiles.count,)](
                table, len(values), tiles.owner, tiles.start, tiles.length,
                INTEGERS[size], BLOCK, alignment, num_warps=WARPS,
            )  # fmt: skip


def mask_tensor(values: Tensor, mask: Tensor) -> None:
    """Do the same in place with one tensor, and without a table."""
    size = values.numel()
    with launching(values.device):
        _mask_one[(triton.cdiv(size, BLOCK),)](as_bits(values), mask.view(torch.uint8), size, BLOCK, num_warps=WARPS)


def copy_masked(
    dense: Sequence[Tensor], masks: Sequence[Tensor], shown: Sequence[Tensor], sums: Sequence[Tensor]
) -> None:
    """Write dense values into other tensors, 0 for the pruned ones, and a check sum of each tile; one launch.

    Args:
        dense: T tensors of one item size, each dense in memory.
        masks: Bool, True = kept, each laid out in memory as its values.
        shown: Laid out like the dense values; may be the same memory.
        sums: Of each, one int64 for each BLOCK values.
    """
    _launch(_copy_masked, [dense, masks, shown, sums])


def follow_shown(
    shown: Sequence[Tensor], masks: Sequence[Tensor], dense: Sequence[Tensor], sums: Sequence[Tensor]
) -> None:
    """Take over what something else wrote into `shown` since `copy_masked`: kept values and others that are not 0."""
    _launch(_follow_shown, [shown, masks, dense, sums])


def put_dense(shown: Sequence[Tensor], masks: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    """Write dense values over pruned ones that are 0."""
    _launch(_put_dense, [shown, masks, dense])


def _launch(kernel, columns: Sequence[Sequence[Tensor]]) -> None:
    values = columns[0]
    device = values[0].device
    tiles = tiles_of([one.numel() for one in values], BLOCK, device)
    table, alignment = addresses(columns, device)
    if tiles.count:
        with launching(device):
            kernel[(tiles.count,)](
                table, len(values), tiles.owner, tiles.start, tiles.length,
                INTEGERS[values[0].element_size()], BLOCK, alignment, num_warps=WARPS,
            )  # fmt: skip


@triton.jit
def _mask(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    values = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(TYPE)), ALIGNMENT)
    mask = tl.multiple_of(tl.load(table + tensors + i).to(tl.pointer_type(tl.int8)), ALIGNMENT)
    size = tl.load(length + i)
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:  # without a bound, loads are as wide as the alignment allows
        kept = tl.load(mask + at) != 0
        bits = tl.load(values + at)
        tl.store(values + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))
    else:
        inside = at < size
        kept = tl.load(mask + at, mask=inside, other=1) != 0
        bits = tl.load(values + at, mask=inside, other=0)
        tl.store(values + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))


@triton.jit
def _mask_one(values, mask, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kept = tl.load(mask + at, mask=inside, other=1) != 0
    bits = tl.load(values + at, mask=inside, other=0)
    tl.store(values + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))


@triton.jit
def _place(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Return of this program's tile: its tensor, first element and places in it, which are inside, three columns."""
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    values = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(TYPE)), ALIGNMENT)
    mask = tl.multiple_of(tl.load(table + tensors + i).to(tl.pointer_type(tl.int8)), ALIGNMENT)
    other = tl.multiple_of(tl.load(table + 2 * tensors + i).to(tl.pointer_type(TYPE)), ALIGNMENT)
    at = first + tl.arange(0, BLOCK)
    return i, first, at, at < tl.load(length + i), values, mask, other


@triton.jit
def weighed(bits, at):
    """Return values times odd numbers by their place `at`: their sum changes with any one of them, and their order."""
    if bits.dtype == tl.int64:
        bits = bits ^ (bits >> 32)
    return (bits.to(tl.int32) * (2 * at + 1).to(tl.int32)).to(tl.int64)


@triton.jit
def _check_sum(bits, BLOCK: tl.constexpr):
    return tl.sum(weighed(bits, tl.arange(0, BLOCK)), axis=0)


@triton.jit
def _copy_masked(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    i, first, at, inside, dense, mask, shown = _place(
        table, tensors, owner, start, length, TYPE, BLOCK, ALIGNMENT
    )  # fmt: skip
    sums = tl.load(table + 3 * tensors + i).to(tl.pointer_type(tl.int64))
    kept = tl.load(mask + at, mask=inside, other=0) != 0
    bits = tl.where(kept, tl.load(dense + at, mask=inside, other=0), 0)
    tl.store(shown + at, bits, mask=inside)
    tl.store(sums + first // BLOCK, _check_sum(bits, BLOCK))


@triton.jit
def _follow_shown(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    i, first, at, inside, shown, mask, dense = _place(
        table, tensors, owner, start, length, TYPE, BLOCK, ALIGNMENT
    )  # fmt: skip
    sums = tl.load(table + 3 * tensors + i).to(tl.pointer_type(tl.int64))
    bits = tl.load(shown + at, mask=inside, other=0)
    if _check_sum(bits, BLOCK) != tl.load(sums + first // BLOCK):
        kept = tl.load(mask + at, mask=inside, other=0) != 0
        tl.store(dense + at, bits, mask=inside & (kept | ((bits << 1) != 0)))  # the sign of a zero is no value


@triton.jit
def _put_dense(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    _, _, at, inside, shown, mask, dense = _place(
        table, tensors, owner, start, length, TYPE, BLOCK, ALIGNMENT
    )  # fmt: skip
    hidden = inside & (tl.load(mask + at, mask=inside, other=1) == 0)
    bits = tl.load(shown + at, mask=inside, other=0)
    tl.store(shown + at, tl.load(dense + at, mask=hidden, other=0), mask=hidden & ((bits << 1) == 0))

"""Masks applied to many tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.kernels.tables import addresses, tiles_of

BLOCK = 4096
WARPS = 8
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def mask_tensors(values: Sequence[Tensor], masks: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> None:
    """Set what masks prune to 0, in place or in other tensors, which get the kept values, too; one launch.

    In place, values that are 0 already are not written: where masks hold, it costs one read of values and masks.

    Args:
        values: T tensors of one item size, each dense in memory; read as bits, so NaN and Inf are like any other.
        masks: Bool, True = kept, each laid out in memory as its values.
        into: Laid out like the values; default: in place.
    """
    device, size = values[0].device, values[0].element_size()
    tiles = tiles_of([one.numel() for one in values], BLOCK, device)
    table, alignment = addresses([values, masks, values if into is None else into], device)
    if tiles.count:
        _mask[(tiles.count,)](
            table, len(values), tiles.owner, tiles.start, tiles.length,
            INTEGERS[size], into is None, BLOCK, alignment, num_warps=WARPS,
        )  # fmt: skip


def mask_tensor(values: Tensor, mask: Tensor) -> None:
    """Set what a mask prunes to 0, in place, as `mask_tensors`; without a table."""
    bits = as_bits(values)
    _mask_one[(triton.cdiv(bits.numel(), BLOCK),)](bits, mask, bits.numel(), BLOCK, num_warps=WARPS)


@triton.jit
def _mask(
    table, tensors, owner, start, length,
    TYPE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i, first = tl.load(owner + program), tl.multiple_of(tl.load(start + program), BLOCK)
    values = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(TYPE)), ALIGNMENT)
    mask = tl.multiple_of(tl.load(table + tensors + i).to(tl.pointer_type(tl.int8)), ALIGNMENT)
    into = tl.multiple_of(tl.load(table + 2 * tensors + i).to(tl.pointer_type(TYPE)), ALIGNMENT)
    size = tl.load(length + i)
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:  # without a bound, loads are as wide as the alignment allows
        kept = tl.load(mask + at) != 0
        bits = tl.load(values + at)
        if IN_PLACE:
            tl.store(into + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))
        else:
            tl.store(into + at, tl.where(kept, bits, 0))
    else:
        inside = at < size
        kept = tl.load(mask + at, mask=inside, other=1) != 0
        bits = tl.load(values + at, mask=inside, other=0)
        if IN_PLACE:
            tl.store(into + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))
        else:
            tl.store(into + at, tl.where(kept, bits, 0), mask=inside)


@triton.jit
def _mask_one(values, mask, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kept = tl.load(mask + at, mask=inside, other=1) != 0
    bits = tl.load(values + at, mask=inside, other=0)
    tl.store(values + at, tl.zeros_like(bits), mask=(bits != 0) & (kept == 0))

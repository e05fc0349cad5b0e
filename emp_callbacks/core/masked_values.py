"""Zeroing, taking out and putting back the pruned values of a tensor, in place and exact for NaN and Inf.

On a CPU the mask is worked on as integers, chunk by chunk: several times as fast as torch's masked_fill_,
masked_select and masked_scatter_, which elsewhere do the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.chunks import chunks, count_true, longest_chunk, scratch
from emp_callbacks.core.device import on_host


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Set the pruned values to 0.

    Args:
        values: Any shape and dtype; changed in place.
        mask: Same shape, bool, True = kept.
    """
    if not _in_flat_order(values, mask):
        values.masked_fill_(~mask, 0)  # not mul_: 0 * inf is nan
        return
    bits, kept = _bits(values), mask.view(torch.int8).view(-1)
    with scratch(longest_chunk(bits), bits.dtype, bits.device) as buffer:
        for at in chunks(bits):
            bits[at] &= buffer[: at.stop - at.start].copy_(kept[at]).neg_()  # -1 has all bits set


def take_pruned(values: Tensor, mask: Tensor) -> Tensor:
    """Return the pruned values in flat order, shape (pruned,).

    Args:
        values: Any shape and dtype.
        mask: Same shape, bool, True = kept.
    """
    if not _in_flat_order(values, mask):
        return values.masked_select(~mask)
    flat, kept = _bits(values), mask.view(-1).numpy()
    taken, end = flat.new_empty(values.numel() - int(count_true(mask))), 0
    for at in chunks(flat):
        start, end = end, end + at.stop - at.start - np.count_nonzero(kept[at])
        np.compress(~kept[at], flat[at].numpy(), out=taken[start:end].numpy())
    return taken.view(values.dtype)


def put_pruned(values: Tensor, mask: Tensor, taken: Tensor) -> None:
    """Put back what `take_pruned` took.

    Args:
        values: Any shape and dtype; changed in place.
        mask: Same shape, bool, True = kept.
        taken: Shape (pruned,), dtype of the values.
    """
    if not _in_flat_order(values, mask):
        values.masked_scatter_(~mask, taken)
        return
    flat, kept, stored, end = _bits(values), mask.view(-1).numpy(), _bits(taken), 0
    for at in chunks(flat):
        places = torch.from_numpy(np.flatnonzero(~kept[at]))
        flat[at].scatter_(0, places, stored[end : end + len(places)])
        end += len(places)


def _in_flat_order(values: Tensor, mask: Tensor) -> bool:
    return on_host(values) and values.is_contiguous() and mask.is_contiguous()


def _bits(values: Tensor) -> Tensor:
    return as_bits(values.view(-1))

"""Zeroing, taking out and putting back the pruned values of tensors, in place and exact for NaN and Inf.

On a CPU the mask is worked on as integers, chunk by chunk: several times as fast as torch's masked_fill_,
masked_select and masked_scatter_. On an accelerator many tensors are worked on in one launch where Triton serves them,
elsewhere in one kernel of torch's each; nothing but `take_pruned` and `put_pruned` waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.chunks import chunks, longest_chunk, scratch
from emp_callbacks.core.device import on_host
from emp_callbacks.core.kernels.choice import kernels_serve
from emp_callbacks.core.kernels.tables import TILE

LARGE = 1 << 20  # so many values are worth the launch of a kernel of ours, which costs the host more than torch's
_WIDEST = 8  # bytes of one value that kernels know


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Set the pruned values to 0.

    Args:
        values: Any shape and dtype; changed in place.
        mask: Same shape, bool, True = kept.
    """
    if _in_flat_order(values, mask):
        bits, kept = _bits(values), mask.view(torch.int8).view(-1)
        with scratch(longest_chunk(bits), bits.dtype, bits.device) as buffer:
            for at in chunks(bits):
                bits[at] &= buffer[: at.stop - at.start].copy_(kept[at]).neg_()  # -1 has all bits set
    elif values.numel() >= LARGE and _sorted([values], [mask])[0]:
        _kernels().mask_tensor(values, mask)
    else:
        with torch.no_grad():  # not mul_: 0 * inf is nan; not masked_fill_: the inverse would be another kernel
            torch.where(mask, values, _zero(values.dtype, values.device), out=values)


def take_pruned(values: Tensor, mask: Tensor) -> Tensor:
    """Return the pruned values in flat order, shape (pruned,).

    Args:
        values: Any shape and dtype.
        mask: Same shape, bool, True = kept.
    """
    if not _in_flat_order(values, mask):
        return values.masked_select(~mask)
    flat, kept = _bits(values), mask.view(-1).numpy()
    taken, end = flat.new_empty(kept.size - np.count_nonzero(kept)), 0
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


# ---- many tensors at once -------------------------------------------------------------------------------------------


def zero_pruned_all(values: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the pruned values of many tensors to 0, as `zero_pruned`.

    Args:
        values: Any shapes and dtypes; changed in place.
        masks: Of the same shapes, bool, True = kept.
    """
    together, alone = _sorted(values, masks) if len(values) > 1 else ([], [*range(len(values))])
    for some in together:
        _kernels().mask_tensors(*_of(some, values, masks))
    for i in alone:
        zero_pruned(values[i], masks[i])


@torch.no_grad()
def copy_masked(
    dense: Sequence[Tensor], masks: Sequence[Tensor], shown: Sequence[Tensor], sums: Sequence[Tensor]
) -> None:
    """Write dense values into other tensors, 0 for the pruned ones.

    Args:
        dense: Any shapes and dtypes.
        masks: Of the same shapes, bool, True = kept.
        shown: Laid out like the dense values; changed in place.
        sums: Of each, what `no_sums` returns; see `follow_shown`.
    """
    together, alone = _sorted(dense, masks, shown)
    for some in together:
        _kernels().copy_masked(*_of(some, dense, masks, shown, sums))
    for i in alone:
        torch.where(masks[i], dense[i], _zero(dense[i].dtype, dense[i].device), out=shown[i])


@torch.no_grad()
def follow_shown(
    shown: Sequence[Tensor], masks: Sequence[Tensor], dense: Sequence[Tensor], sums: Sequence[Tensor]
) -> None:
    """Take what something else wrote into `shown` since `copy_masked` over into the dense values.

    That is every kept value, and of the pruned those that are not 0. The kernel reads the shown values alone, and the
    rest of a tile only where these have another check sum.

    Args:
        shown: What `copy_masked` wrote into.
        masks: Its masks.
        dense: Its dense values; changed in place.
        sums: Its check sums.
    """
    together, alone = _sorted(shown, masks, dense)
    for some in together:
        _kernels().follow_shown(*_of(some, shown, masks, dense, sums))
    for i in alone:
        torch.where(masks[i] | (shown[i] != 0), shown[i], dense[i], out=dense[i])


@torch.no_grad()
def put_dense(shown: Sequence[Tensor], masks: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    """Write dense values over pruned ones that are 0; what something else wrote there stays.

    Args:
        shown: What `copy_masked` wrote into; changed in place.
        masks: Its masks.
        dense: Its dense values.
    """
    together, alone = _sorted(shown, masks, dense)
    for some in together:
        _kernels().put_dense(*_of(some, shown, masks, dense))
    for i in alone:
        torch.where(masks[i] | (shown[i] != 0), shown[i], dense[i], out=shown[i])


def no_sums(values: Tensor) -> Tensor:
    """Return memory for the check sums of `copy_masked`, one int64 for each TILE values."""
    return torch.zeros(-(-values.numel() // TILE), dtype=torch.int64, device=values.device)


def is_dense(values: Tensor) -> bool:
    """Return whether values fill a range of memory, each place once, in whatever order of the dimensions."""
    if values.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def _sorted(*columns: Sequence[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Return which tensors a kernel can work on together, by lists of their places, and which are left over.

    Together: of one item size, on one device, each dense in memory, its mask and others laid out alike.
    """
    if not columns[0] or not kernels_serve(columns[0][:1]):
        return [], [*range(len(columns[0]))]
    device, together = columns[0][0].device, dict[int, list[int]]()
    alone: list[int] = []
    for i, row in enumerate(zip(*columns, strict=True)):
        first = row[0]
        alike = all(other.stride() == first.stride() and other.device == first.device for other in row[1:])
        if alike and first.device == device and first.element_size() <= _WIDEST and is_dense(first):
            together.setdefault(first.element_size(), []).append(i)
        else:
            alone.append(i)
    return [*together.values()], alone


def _of(places: list[int], *columns: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[column[i] for i in places] for column in columns]


def _kernels() -> Any:
    from emp_callbacks.core.kernels import masking  # Triton: where it is wanted only

    return masking


@functools.cache
@torch.inference_mode(False)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _in_flat_order(values: Tensor, mask: Tensor) -> bool:
    return on_host(values) and values.is_contiguous() and mask.is_contiguous()


def _bits(values: Tensor) -> Tensor:
    return as_bits(values.view(-1))

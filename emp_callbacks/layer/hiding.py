"""Dense values of many weights hidden and shown together: on an accelerator in one launch, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from emp_callbacks.core.device import on_host
from emp_callbacks.core.masked_values import copy_masked, follow_shown, put_dense
from emp_callbacks.layer.dense_buffer import DenseBuffer
from emp_callbacks.layer.dense_store import DenseStore
from emp_callbacks.layer.segment import Segment


class Part(Protocol):
    """A part of a tensor and the store of the dense values that masks hide there."""

    segment: Segment
    store: DenseStore


class Places(NamedTuple):
    """Where a refresh reads a part's dense values and writes masked ones; the same where they are masked in place.

    `sums` is where the check sums of what is written go; see `copy_masked`.
    """

    source: Tensor
    target: Tensor
    sums: Tensor | None = None


class _Shown(NamedTuple):
    """One part on an accelerator: its owner, the memory that forward reads, the mask, the dense values."""

    owner: Tensor
    values: Tensor
    mask: Tensor
    buffer: DenseBuffer


@torch.no_grad()
def hide_all(parts: Iterable[Part], *, written: bool = False) -> None:
    """Move what masks prune out of the parts and leave zeros; twice is once.

    Args:
        parts: Changed.
        written: Whether dense and masked values are where `prepare` said already.
    """
    lent: list[_Shown] = []
    apart: list[_Shown] = []
    for part in parts:
        store, values = part.store, part.segment.weight
        if on_host(values):
            store.hide(values)
        elif store.hidden_by is None and (mask := store.mask) is not None:
            store.hidden_by = mask
            buffer, owner = store.buffer, part.segment.owner
            if buffer is not None and (own := buffer.take_aside(values)) is not None:
                buffer.dense = values  # whatever memory the owner has now: an optimizer may have given it another
                lent.append(_Shown(owner, own, mask, buffer))
            else:
                apart.append(_Shown(owner, values, mask, _buffer_of(store, values)))
    if not written and (lent or apart):
        _keep_apart(apart)
        shown, masks, dense, sums = _columns([*lent, *apart])
        copy_masked(dense, masks, shown, sums)
    for one in lent:
        one.owner.data = one.values


@torch.no_grad()
def prepare(part: Part) -> Places | None:
    """Return where a part's dense values are, and where masked ones are to be written for `hide_all(written=True)`.

    None where that is not known beforehand: on a CPU, and of a weight that several pruners mask.
    """
    store, values = part.store, part.segment.weight
    if on_host(values) or store.hidden_by is not None or len(store.members) > 1:
        return None
    if store.buffer is not None and (own := store.buffer.take_aside(values)) is not None:
        store.buffer.aside = own
        return Places(values, own, store.buffer.sums)
    buffer = _buffer_of(store, values)
    buffer.dense.copy_(values)  # not lent now: the scores may be another hold on the weight's memory
    return Places(buffer.dense, values, buffer.sums)


@torch.no_grad()
def unhide_all(parts: Iterable[Part], *, in_place: bool) -> None:
    """Give the parts their dense values; twice is once.

    Args:
        parts: Changed.
        in_place: Whether the values are to be where forward reads them, also for whoever holds the memory; else the
            owners may be given other memory until they are hidden again.
    """
    lent: list[_Shown] = []
    written: list[_Shown] = []
    for part in parts:
        store, values = part.store, part.segment.weight
        if store.packed is None:
            store.follow(values)
        if store.packed is not None or store.hidden_by is None or store.buffer is None:
            store.unhide(values)
        else:
            store.written.clear()
            owner = part.segment.owner
            lends = not in_place and store.buffer.stands_in(owner, values)
            (lent if lends else written).append(_Shown(owner, values, store.hidden_by, store.buffer))
            store.forget()
    if lent:
        follow_shown(*_columns(lent))
    if written:
        put_dense(*_columns(written)[:3])
    for one in lent:
        _lend(one.owner, one.values, one.buffer)


def _buffer_of(store: DenseStore, values: Tensor) -> DenseBuffer:
    """Return the store's buffer, a new one where there is none of this layout."""
    if store.buffer is None or not store.buffer.fits(values):
        store.buffer = DenseBuffer.like(values)
    return store.buffer


def _keep_apart(shown: Sequence[_Shown]) -> None:
    """Copy dense values that are where forward reads them."""
    if shown:
        torch._foreach_copy_([one.buffer.dense for one in shown], [one.values for one in shown])


def _lend(owner: Tensor, values: Tensor, buffer: DenseBuffer) -> None:
    """Make the dense values an owner's memory and put its own aside."""
    buffer.aside = values
    owner.data = buffer.dense


def _columns(shown: Sequence[_Shown]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the values, the masks, the dense values and their check sums."""
    buffers = [one.buffer for one in shown]
    dense, sums = [buffer.dense for buffer in buffers], [buffer.sums for buffer in buffers]
    return [one.values for one in shown], [one.mask for one in shown], dense, sums

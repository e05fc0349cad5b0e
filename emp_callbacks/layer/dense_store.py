"""The dense values behind masks: one store per tensor part, however many pruners mask it."""

from __future__ import annotations

import math
from typing import Protocol, final
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.device import on_host
from emp_callbacks.core.masked_values import (
    is_dense,
    put_dense,
    put_pruned,
    take_pruned,
    zero_pruned,
)
from emp_callbacks.layer.dense_buffer import DenseBuffer
from emp_callbacks.layer.segment import Segment

_SAMPLES = 4096  # a look at them takes a CPU some microseconds
_ACCELERATOR_SAMPLES = 16
_CANDIDATES = 1 << 15  # places among which the masks' pruned ones are looked for
_GOLDEN = (math.sqrt(5) - 1) / 2


class Member(Protocol):
    """One pruner's mask on the part."""

    mask: Tensor | None


@final
class DenseStore:
    """Values that masks hide in one part of a tensor, and a watch on who else writes there.

    Attributes:
        members: Whose masks are in force: kept is what all of them keep. One that is through stays until all are.
        modes: Mode of each member that is still at work, by its id.
        hidden_by: The mask that hides values now; None while the part itself holds the dense values.
        packed: On a CPU, the dense values of what `hidden_by` prunes in flat order.
        buffer: On an accelerator, all dense values, which it holds no more than stale ones while nothing is hidden.
        written: What something else wrote under masks since the last update, with each mask, oldest first: a checkpoint
            whose weights are loaded before its own masks finds its values there.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.modes: dict[int, str] = {}
        self.hidden_by: Tensor | None = None
        self.packed: Tensor | None = None
        self.buffer: DenseBuffer | None = None
        self.written: list[tuple[Tensor, Tensor]] = []
        self._joined: tuple[list[Tensor], Tensor | None] = [], None
        self._seal: tuple[int, int] | None = None
        self._sampled: tuple[Tensor | None, tuple[int, ...], Tensor | None] = None, (), None

    @property
    def mask(self) -> Tensor | None:
        """What all members keep; None where none has a mask yet."""
        masks = [member.mask for member in self.members if member.mask is not None]
        if len(masks) < 2:
            return masks[0] if masks else None
        joined_of, joined = self._joined
        if len(joined_of) != len(masks) or any(a is not b for a, b in zip(joined_of, masks, strict=True)):
            joined = masks[0].clone()
            for mask in masks[1:]:
                joined &= mask
            self._joined = masks, joined
        return joined

    # ---- hiding ---------------------------------------------------------------------------------------------------

    @property
    def stash(self) -> Tensor | None:
        """Dense values of what `hidden_by` prunes in flat order; None while the part itself holds them. May wait."""
        if self.hidden_by is None or self.packed is not None:
            return self.packed
        assert self.buffer is not None
        return take_pruned(self.buffer.dense, self.hidden_by)

    def hide(self, values: Tensor) -> None:
        """Move what the masks prune out of a CPU's values and leave zeros; twice is once."""
        mask = self.mask
        if mask is not None and self.hidden_by is None:
            self.packed, self.hidden_by = take_pruned(values, mask), mask
            zero_pruned(values, mask)

    def unhide(self, values: Tensor) -> None:
        """Move it back; twice is once."""
        self.written.clear()
        self.follow(values)
        if self.packed is not None and self.hidden_by is not None:
            put_pruned(values, self.hidden_by, self.packed)
        elif self.hidden_by is not None and self.buffer is not None:
            put_dense([values], [self.hidden_by], [self.buffer.dense])
        self.forget()

    def forget(self) -> None:
        """Take it that the part itself holds the dense values."""
        if self.hidden_by is not None:
            self.hidden_by = self.packed = self._seal = None

    def uncover(self, values: Tensor) -> None:
        """Put in place what something else wrote since the last update, exactly; else move the hidden values back."""
        for mask, written in self.written:
            there, own = mask.to(values.device), written.to(values)
            put_pruned(values, there, torch.where(own != 0, own, take_pruned(values, there)))
        if self.written:
            self.forget()
        self.unhide(values)

    @property
    def keeps_older(self) -> bool:
        """Whether something else wrote zeros alone under the masks, and values of before are still behind them."""
        if not self.written or self.hidden_by is None or bool(self.written[-1][1].any()):
            return False
        stash = self.stash
        return stash is not None and bool(stash.any())

    def behind(self, values: Tensor, mask: Tensor) -> Tensor | None:
        """Return the dense values behind one member's mask; None while the part itself holds them. May wait."""
        self.follow(values)
        if self.hidden_by is None or self.hidden_by is mask:
            return self.stash
        if self.packed is None:
            assert self.buffer is not None
            return take_pruned(self.buffer.dense, mask.to(values.device))
        dense = values.clone()
        put_pruned(dense, self.hidden_by, self.packed)
        return take_pruned(dense, mask.to(dense.device))

    def follow(self, values: Tensor) -> None:
        """Go where the model was moved: Lightning takes it from the GPU to the CPU when a fit ends. May wait, if so."""
        if self.hidden_by is None or (self.packed is not None and self.hidden_by.device == values.device):
            return
        host = on_host(values)
        if not host and self.buffer is not None and self.buffer.fits(values):
            return
        packed = self.stash  # with the mask where it was
        assert packed is not None
        self.hidden_by = self.hidden_by.to(values.device)
        if host:
            self.packed, self.buffer = packed.to(values.device), None
        else:
            self.packed, self.buffer = None, DenseBuffer.like(values)
            self.buffer.put(values, self.hidden_by, packed.to(values))

    # ---- the watch ------------------------------------------------------------------------------------------------

    def seal(self, values: Tensor) -> None:
        """Remember where the values lie and how often they were written: nobody but us writes them from here on."""
        self._seal = values.data_ptr(), _version(values)

    def is_sealed(self, values: Tensor) -> bool:
        """Whether there was a `seal`, and since then no write that leaves a trace."""
        return self._seal == (values.data_ptr(), _version(values))

    def is_touched(self, values: Tensor, *, sampled: bool = True) -> bool:
        """Whether the values moved or were written since `seal`. Reads no value on an accelerator.

        A write through `.data` leaves no trace but the values: on a CPU some thousand that should be 0 are looked at.

        Args:
            values: The part of the tensor.
            sampled: Whether to look at values at all.
        """
        if self._seal is None:
            return False
        if self._seal != (values.data_ptr(), _version(values)):
            return True
        places = self._sample(values) if sampled and on_host(values) else None
        return places is not None and bool(as_bits(_in_memory_order(values)).numpy().take(places.numpy()).any())

    def count_sampled(self, values: Tensor) -> Tensor | None:
        """Return how many of a few values that should be 0 are not, on their device, without waiting for it."""
        places = None if self._seal is None else self._sample(values)
        return None if places is None else (_in_memory_order(values)[places[0]] != 0).mul(places[1]).sum()

    def _sample(self, values: Tensor) -> Tensor | None:
        """Return the places, in order of memory, of some values that the masks prune; None where there are none.

        On an accelerator shape (2, samples): places, and 1 where the mask prunes; how many it does would be a wait.
        """
        mask = self.mask if self.hidden_by is None else self.hidden_by
        if mask is None or not is_dense(values):
            return None
        if self._sampled[0] is not mask or self._sampled[1] != values.stride():
            alike = mask.stride() == values.stride() and mask.device == values.device
            kept = _in_memory_order(mask if alike else torch.empty_like(values, dtype=torch.bool).copy_(mask))
            choose = _some_pruned if on_host(values) else _some_pruned_at_once
            self._sampled = mask, values.stride(), choose(kept)
        return self._sampled[2]

    def take_over(self, values: Tensor, *, record: bool = True) -> None:
        """Make what something else wrote over hidden values the dense values, and hide it; keep the rest.

        Zeros say nothing, as a masked copy of the weights brings them too; unless all of the weight is 0, or what is
        behind the mask is NaN or Inf.

        Args:
            values: The part of the tensor.
            record: Whether to look whether there is any and remember it in `written`, which waits for an accelerator;
                else something was written for sure.
        """
        if self.hidden_by is None:
            return
        touched = self.is_touched(values) or not record
        self.follow(values)
        found = False
        if record or self.packed is not None:
            written = take_pruned(values, self.hidden_by)
            found = bool(written.any())
            if touched or found:
                self.written.append((self.hidden_by, written))
        if not touched and not found:
            return
        if self.buffer is not None:
            self.buffer.take_over(values, self.hidden_by)
        elif self.packed is not None:
            self.packed = self.packed.to(written)  # of the dtype that the model has now
            old = (written == 0) & self.packed.isfinite() & (found or values.any())
            self.packed = torch.where(old, self.packed, written)
        zero_pruned(values, self.hidden_by)


def _some_pruned(kept: Tensor) -> Tensor:
    candidates = _spread(kept.numel(), _CANDIDATES)
    pruned = candidates[~kept[candidates]]
    return pruned[_spread(len(pruned), _SAMPLES)]


def _some_pruned_at_once(kept: Tensor) -> Tensor:
    candidates = _spread(kept.numel(), _CANDIDATES, kept.device)
    pruned = ~kept[candidates]
    # The pruned ones come first, in an order that goes through all of them in a few steps.
    order = pruned.double() + torch.arange(len(pruned), dtype=torch.float64, device=kept.device) * _GOLDEN % 1
    chosen = order.topk(min(len(pruned), _ACCELERATOR_SAMPLES)).indices
    return torch.stack([candidates[chosen], pruned[chosen].long()])


def _in_memory_order(values: Tensor) -> Tensor:
    """Return dense values flat, in the same memory."""
    return values.as_strided((values.numel(),), (1,))


def _spread(size: int, most: int, device: torch.device | None = None) -> Tensor:
    """Return up to `most` of the indices below `size`: one of each of as many equal parts.

    Where in its part it lies changes from part to part, so that no row or column length repeats it.
    """
    count = min(size, most)
    parts = torch.arange(count, dtype=torch.float64, device=device)
    return ((parts + parts * _GOLDEN % 1) * (size / max(1, count))).long()


def _version(values: Tensor) -> int:
    return -1 if values.is_inference() else values._version


# Owner -> the stores of its parts that a pruner works with now; a pruner that nobody holds any more holds none.
_IN_USE: WeakIdKeyDictionary = WeakIdKeyDictionary()
Place = tuple[str, int]


def find_store(segment: Segment) -> DenseStore | None:
    """Return the store that pruners at work share for this part of a tensor; None if there is none."""
    return next((store for at, store in _in_use(segment) if at == _place(segment)), None)


def put_in_use(segment: Segment, store: DenseStore) -> None:
    """Let others that mask this part find the store."""
    _IN_USE[segment.owner] = [(at, ref(other)) for at, other in (*_in_use(segment), (_place(segment), store))]


def out_of_use(segment: Segment, store: DenseStore) -> None:
    """Forget a store that nobody works with any more."""
    _IN_USE[segment.owner] = [(at, ref(other)) for at, other in _in_use(segment) if other is not store]


def _in_use(segment: Segment) -> list[tuple[Place, DenseStore]]:
    held = _IN_USE.get(segment.owner, [])  # type: ignore[no-untyped-call]
    return [(at, store) for at, reference in held if (store := reference()) is not None]


def _place(segment: Segment) -> Place:
    # Of an owner that is no parameter but a flat buffer of many, the name says which part is meant.
    whole = segment.owner.numel() == segment.weight.numel()
    return ("" if whole else segment.name), segment.weight.numel()

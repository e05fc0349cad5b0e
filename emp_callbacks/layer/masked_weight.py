"""One weight under a pruner's mask."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_callbacks.layer.dense_store import DenseStore, find_store, out_of_use, put_in_use
from emp_callbacks.layer.hiding import hide_all, unhide_all
from emp_callbacks.layer.segment import Segment


class MaskedWeight:
    """A segment, one pruner's mask on it and, in `feedback`, the dense values that masks hide.

    Args:
        segment: This rank's part of the parameter.

    Attributes:
        segment: As given.
        mask: Layout of `segment.weight`, bool, True = kept; None before the first refresh (all kept).
        store: The dense values, shared with other pruners of the same part.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.mask: Tensor | None = None
        self.store = DenseStore()
        self.store.members.append(self)

    @property
    def name(self) -> str:
        """Name of the parameter in the user's model."""
        return self.segment.name

    @property
    def weight(self) -> Tensor:
        """The segment's values outside autograd."""
        return self.segment.weight

    @property
    def mask_or_ones(self) -> Tensor:
        """The mask; all True before the first refresh."""
        return torch.ones_like(self.weight, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def stash(self) -> Tensor | None:
        """Dense values behind this mask in flat order, shape (pruned,); None while the segment itself holds them."""
        return None if self.mask is None else self.store.behind(self.weight, self.mask)

    def hide(self) -> None:
        """Move the pruned values from the parameter into the store and leave zeros; twice is once."""
        hide_all([self])

    def unhide(self) -> None:
        """Move the stored values back into the parameter; twice is once."""
        unhide_all([self], in_place=True)

    def seal(self) -> None:
        """Say that nobody but this package writes the weights from here on, until the next update."""
        self.store.seal(self.weight)

    @property
    def is_sealed(self) -> bool:
        """Whether the weights were said to be masked and have not been written since."""
        return self.store.is_sealed(self.weight)

    # ---- several pruners of one weight ----------------------------------------------------------------------------

    def check_alone_or_alike(self, mode: str) -> None:
        """Raise ValueError where a pruner at work masks the same weight in another mode."""
        store = find_store(self.segment)
        others = {*store.modes.values()} - {mode} if store is not None else set()
        if others:
            raise ValueError(
                f"{self.name!r} is pruned already by another EMP pruner in mode {others.pop()!r}, this one has mode "
                f"{mode!r}: use one mode for both, exclude it here, or finalize() the other pruner first"
            )

    def join(self, mode: str) -> bool:
        """Mask together with the pruners at work on the same weight; return whether there are any."""
        store = find_store(self.segment)
        if store is not None and store is not self.store:
            self.store = store
            store.members.append(self)
        elif store is None:
            put_in_use(self.segment, self.store)
        self.store.modes[id(self)] = mode
        return len(self.store.modes) > 1

    def leave(self) -> None:
        """Work with the weight no more; the mask stays in force as long as another pruner does."""
        self.store.modes.pop(id(self), None)
        if not self.store.modes:
            out_of_use(self.segment, self.store)

"""What a mask means between two refreshes: which values it hides, clears or holds at zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned
from emp_callbacks.layer.dense_store import DenseStore, find_store, out_of_use, put_in_use
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
        self.store.hide(self.weight)

    def unhide(self) -> None:
        """Move the stored values back into the parameter; twice is once."""
        self.store.unhide(self.weight)

    def seal(self) -> None:
        """Say that nobody but this package writes the weights from here on, until the next update."""
        self.store.seal(self.weight)

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


States = Iterable[tuple[Tensor, float]]
"""Of each of an optimizer's per-weight tensors the segment's part, and what it holds of a weight that never moved."""


class MaskMode(ABC):
    """What happens to a masked weight at a refresh and around every optimizer step."""

    name: str
    masks_gradient = False  # as it arrives
    masks_gradient_late = False  # when it was read
    clears_states = False
    keeps_zero = False  # whether pruned entries are 0 between two updates

    def reveal(self, weight: MaskedWeight) -> None:
        """Put the dense values in place."""

    def before_update(self, weight: MaskedWeight) -> None:
        """Prepare the weight for the optimizer step; the gradients are ready."""

    def after_update(self, weight: MaskedWeight) -> None:
        """Make the weight what forward and backward must see until the next step."""

    def mask_gradient(self, weight: MaskedWeight) -> None:
        """Take the pruned entries out of the gradient, where the mode asks for it."""

    def notice(self, weight: MaskedWeight) -> int:  # noqa: ARG002
        """Make values that something else wrote obey the mask; return how many were lost by that."""
        return 0

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mask that follows `old` when a refresh selects `new`; same shape, bool."""
        return new

    @abstractmethod
    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:
        """Give the weight, whose dense values are in place, a new mask.

        Args:
            weight: Changed in place.
            mask: Layout of the segment, bool, True = kept.
            states: The segment's part of the optimizer's per-weight tensors (momentum, second moment).
        """

    @abstractmethod
    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:
        """Take the mask (and the dense values behind it) that a checkpoint brought back with the parameter."""


@final
class Feedback(MaskMode):
    """Dense weights keep training; forward and backward see the masked ones; gradients go to the dense ones.

    N_eff always describes the dense weights, so it does not compound.

    Source: Lin et al., "Dynamic Model Pruning with Feedback", arXiv:2006.07253.
    """

    name = "feedback"
    keeps_zero = True

    def reveal(self, weight: MaskedWeight) -> None:
        weight.unhide()

    def before_update(self, weight: MaskedWeight) -> None:
        weight.unhide()

    def after_update(self, weight: MaskedWeight) -> None:
        weight.hide()

    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:  # noqa: ARG002
        weight.unhide()
        weight.mask = mask
        weight.hide()

    def notice(self, weight: MaskedWeight) -> int:
        weight.store.take_over(weight.weight)
        return 0

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:
        # The masks of today hide what the parameter came with, and what other pruners of it put behind theirs.
        weight.store.take_over(weight.weight)
        weight.store.uncover(weight.weight)
        weight.mask = mask
        if mask is not None and stash is not None:
            put_pruned(weight.weight, mask, stash)
        weight.hide()
        weight.seal()


@final
class Project(MaskMode):
    """Pruned weights are set to zero at the refresh, then free to grow back (iterative hard thresholding)."""

    name = "project"
    clears_states = True

    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:
        _clear(weight, mask, states)

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.mask = mask  # what has grown since the refresh is part of the checkpoint's weights


class _HoldsZero(MaskMode):
    """Pruned weights are zero between refreshes: gradients are masked, the mask is re-applied after each step."""

    clears_states = True
    keeps_zero = True

    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:
        _clear(weight, mask, states)
        self.mask_gradient(weight)

    def after_update(self, weight: MaskedWeight) -> None:
        if weight.mask is not None:
            zero_pruned(weight.weight, weight.mask)

    def notice(self, weight: MaskedWeight) -> int:
        if weight.mask is None:
            return 0
        written = take_pruned(weight.weight, weight.mask)
        lost = int(written.count_nonzero())
        if lost:
            weight.store.written.append((weight.mask, written))
            zero_pruned(weight.weight, weight.mask)
        return lost

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.store.uncover(weight.weight)
        weight.mask = mask
        self.after_update(weight)

    def mask_gradient(self, weight: MaskedWeight) -> None:
        gradient = weight.segment.gradient
        if weight.mask is None or gradient is None:
            return
        if gradient.is_sparse:  # of an embedding: only the rows that were looked up
            gradient._values().masked_fill_(~weight.mask[tuple(gradient._indices())], 0)
        else:
            zero_pruned(gradient, weight.mask)


@final
class Freeze(_HoldsZero):
    """Pruned weights stay zero for good.

    N_eff is measured on the survivors, so repeated refreshes compound; `stop` and `min_density` limit that.
    """

    name = "freeze"
    masks_gradient = True

    def before_update(self, weight: MaskedWeight) -> None:
        self.mask_gradient(weight)

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        # All-zero scores keep everything, but must not bring back what was frozen.
        return new if old is None else new & old


@final
class Rewire(_HoldsZero):
    """At a refresh some of the kept are dropped and as many others grown, which start at 0.

    What is pruned is looked at by its gradient, which is therefore masked only where the optimizer's own step begins: a
    norm that is clipped before is that of the dense gradient.

    Source: SET (arXiv:1707.04780), RigL (arXiv:1911.11134).
    """

    name = "rewire"
    masks_gradient_late = True


@final
class Observe(MaskMode):
    """Masks are computed and logged, never applied."""

    name = "observe"

    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:  # noqa: ARG002
        weight.mask = mask

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.mask = mask


def _clear(weight: MaskedWeight, mask: Tensor, states: States) -> None:
    """Give a weight its mask; what it prunes is 0 from now on, and to the optimizer as if it had never moved."""
    weight.mask = mask
    zero_pruned(weight.weight, mask)
    for values, neutral in states:
        if neutral:
            values.masked_fill_(~mask, neutral)
        else:
            zero_pruned(values, mask)


MASK_MODES: dict[str, type[MaskMode]] = {
    "feedback": Feedback,
    "project": Project,
    "freeze": Freeze,
    "rewire": Rewire,
}

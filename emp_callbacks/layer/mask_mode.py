"""What a mask means between two refreshes: which values it hides, clears or holds at zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned
from emp_callbacks.layer.segment import Segment


@dataclass(eq=False)
class MaskedWeight:
    """A segment, its mask and, in `feedback`, the dense values that the mask hides.

    Attributes:
        segment: This rank's part of the parameter.
        mask: Layout of `segment.weight`, bool, True = kept; None before the first refresh (all kept).
        stash: Dense values of the pruned entries in flat order, shape (pruned,); None while the segment itself
            holds them.
    """

    segment: Segment
    mask: Tensor | None = None
    stash: Tensor | None = None

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

    def hide(self) -> None:
        """Move the pruned values from the parameter into the stash and leave zeros; twice is once."""
        if self.mask is not None and self.stash is None:
            self.stash = take_pruned(self.weight, self.mask)
            zero_pruned(self.weight, self.mask)

    def unhide(self) -> None:
        """Move the stashed values back into the parameter; twice is once."""
        if self.mask is not None and self.stash is not None:
            put_pruned(self.weight, self.mask, self.stash)
            self.stash = None


class MaskMode(ABC):
    """What happens to a masked weight at a refresh and around every optimizer step."""

    name: str
    masks_gradient = False
    clears_states = False

    def reveal(self, weight: MaskedWeight) -> None:
        """Put the dense values in place."""

    def before_update(self, weight: MaskedWeight) -> None:
        """Prepare the weight for the optimizer step; the gradients are ready."""

    def after_update(self, weight: MaskedWeight) -> None:
        """Make the weight what forward and backward must see until the next step."""

    def mask_gradient(self, weight: MaskedWeight) -> None:
        """Take the pruned entries out of the gradient, where the mode asks for it."""

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mask that follows `old` when a refresh selects `new`; same shape, bool."""
        return new

    @abstractmethod
    def install(self, weight: MaskedWeight, mask: Tensor, states: Iterable[Tensor]) -> None:
        """Give the weight, whose dense values are in place, a new mask.

        Args:
            weight: Changed in place.
            mask: Layout of the segment, bool, True = kept.
            states: The segment's part of the optimizer's per-weight tensors (momentum, second moment).
        """

    @abstractmethod
    def restore(self, weight: MaskedWeight) -> None:
        """Bring the parameter into agreement with the mask (and stash) that a checkpoint brought back."""


@final
class Feedback(MaskMode):
    """Dense weights keep training; forward and backward see the masked ones; gradients go to the dense ones.

    N_eff always describes the dense weights, so it does not compound.

    Source: Lin et al., "Dynamic Model Pruning with Feedback", arXiv:2006.07253.
    """

    name = "feedback"

    def reveal(self, weight: MaskedWeight) -> None:
        weight.unhide()

    def before_update(self, weight: MaskedWeight) -> None:
        weight.unhide()

    def after_update(self, weight: MaskedWeight) -> None:
        weight.hide()

    def install(self, weight: MaskedWeight, mask: Tensor, states: Iterable[Tensor]) -> None:  # noqa: ARG002
        weight.unhide()
        weight.mask = mask
        weight.hide()

    def restore(self, weight: MaskedWeight) -> None:
        if weight.mask is not None:
            zero_pruned(weight.weight, weight.mask)


@final
class Project(MaskMode):
    """Pruned weights are set to zero at the refresh, then free to grow back (iterative hard thresholding)."""

    name = "project"
    clears_states = True

    def install(self, weight: MaskedWeight, mask: Tensor, states: Iterable[Tensor]) -> None:
        weight.mask = mask
        for values in (weight.weight, *states):
            zero_pruned(values, mask)

    def restore(self, weight: MaskedWeight) -> None:
        """Nothing: what has grown since the refresh is part of the checkpoint's weights."""


@final
class Freeze(MaskMode):
    """Pruned weights stay zero for good: gradients are masked, the mask is re-applied after each step.

    N_eff is measured on the survivors, so repeated refreshes compound; `stop` and `min_density` limit that.
    """

    name = "freeze"
    masks_gradient = True
    clears_states = True

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        # All-zero scores keep everything, but must not bring back what was frozen.
        return new if old is None else new & old

    def install(self, weight: MaskedWeight, mask: Tensor, states: Iterable[Tensor]) -> None:
        weight.mask = mask
        for values in (weight.weight, *states):
            zero_pruned(values, mask)
        self.mask_gradient(weight)

    def after_update(self, weight: MaskedWeight) -> None:
        if weight.mask is not None:
            zero_pruned(weight.weight, weight.mask)

    def restore(self, weight: MaskedWeight) -> None:
        self.after_update(weight)

    def before_update(self, weight: MaskedWeight) -> None:
        self.mask_gradient(weight)

    def mask_gradient(self, weight: MaskedWeight) -> None:
        gradient = weight.segment.gradient
        if weight.mask is not None and gradient is not None:
            zero_pruned(gradient, weight.mask)


@final
class Observe(MaskMode):
    """Masks are computed and logged, never applied."""

    name = "observe"

    def install(self, weight: MaskedWeight, mask: Tensor, states: Iterable[Tensor]) -> None:  # noqa: ARG002
        weight.mask = mask

    def restore(self, weight: MaskedWeight) -> None:
        """Nothing to do: the weights are never touched."""


MASK_MODES: dict[str, type[MaskMode]] = {"feedback": Feedback, "project": Project, "freeze": Freeze}

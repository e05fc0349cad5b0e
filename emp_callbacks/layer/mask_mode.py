"""What a mask means between two refreshes: which values it hides, clears or holds at zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.device import on_host
from emp_callbacks.core.masked_values import put_pruned, take_pruned, zero_pruned, zero_pruned_all
from emp_callbacks.layer.hiding import Places, hide_all, prepare, unhide_all
from emp_callbacks.layer.masked_weight import MaskedWeight

States = Iterable[tuple[Tensor, float]]
"""Of each of an optimizer's per-weight tensors the segment's part, and what it holds of a weight that never moved."""


class MaskMode(ABC):
    """What happens to a masked weight at a refresh and around every optimizer step."""

    name: str
    masks_gradient = False  # as it arrives
    masks_gradient_late = False  # when it was read
    clears_states = False
    keeps_pruned = False  # whether what is pruned stays so, also where all-zero scores keep everything
    keeps_zero = False  # whether pruned entries are 0 between two updates
    takes_over = False  # whether what something else writes there becomes the dense value

    def reveal(self, weights: Sequence[MaskedWeight], *, in_place: bool) -> None:
        """Let the owners hold the dense values: where forward reads them, or in other memory, see `unhide_all`."""

    def before_update(self, weights: Sequence[MaskedWeight]) -> None:
        """Prepare the weights for the optimizer step; the gradients are ready."""

    def after_update(self, weights: Sequence[MaskedWeight]) -> None:
        """Make the weights what forward and backward must see until the next step."""

    def mask_gradients(self, weights: Sequence[MaskedWeight]) -> None:
        """Take the pruned entries out of the gradients, where the mode asks for it."""

    def notice(self, weight: MaskedWeight) -> int:  # noqa: ARG002
        """Make values that something else wrote obey the mask; return how many were lost by that. May wait."""
        return 0

    def notice_late(self, weight: MaskedWeight) -> Tensor | None:  # noqa: ARG002
        """Do the same without waiting for an accelerator, of a weight that something else wrote for sure.

        Returns:
            How many values were lost, shape (), on the weight's device; None: none.
        """
        return None

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return the mask that follows `old` when a refresh selects `new`; same shape, bool."""
        return new & old if self.keeps_pruned and old is not None else new

    def places(self, weight: MaskedWeight) -> Places | None:  # noqa: ARG002
        """Return where a refresh reads a weight's dense values and where masked ones are to be written.

        Inside `reveal`. Both laid out like the weight; the same where values are masked in place. None: only `install`
        knows.
        """
        return None

    def install(self, weight: MaskedWeight, mask: Tensor, states: States) -> None:
        """Give one weight a new mask; see `install_all`."""
        self.install_all([weight], [mask], [states])

    @abstractmethod
    def install_all(
        self,
        weights: Sequence[MaskedWeight],
        masks: Sequence[Tensor],
        states: Sequence[States],
        *,
        written: bool = False,
    ) -> None:
        """Give the weights, whose dense values are in place, new masks.

        Args:
            weights: Changed in place.
            masks: Of each, layout of the segment, bool, True = kept.
            states: Of each, the segment's part of the optimizer's per-weight tensors (momentum, second moment).
            written: Whether masked values were written already to where `places` said; of all weights.
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
    keeps_zero = takes_over = True

    def reveal(self, weights: Sequence[MaskedWeight], *, in_place: bool) -> None:
        unhide_all(weights, in_place=in_place)

    def before_update(self, weights: Sequence[MaskedWeight]) -> None:
        unhide_all(weights, in_place=False)

    def after_update(self, weights: Sequence[MaskedWeight]) -> None:
        hide_all(weights)

    def places(self, weight: MaskedWeight) -> Places | None:
        return prepare(weight)

    def install_all(
        self,
        weights: Sequence[MaskedWeight],
        masks: Sequence[Tensor],
        states: Sequence[States],  # noqa: ARG002
        *,
        written: bool = False,
    ) -> None:
        unhide_all(weights, in_place=False)
        _give(weights, masks)
        hide_all(weights, written=written)

    def notice(self, weight: MaskedWeight) -> int:
        weight.store.take_over(weight.weight)
        return 0

    def notice_late(self, weight: MaskedWeight) -> Tensor | None:
        weight.store.take_over(weight.weight, record=False)
        return None

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:
        # The masks of today hide what the parameter came with, and what other pruners of it put behind theirs.
        weight.store.take_over(weight.weight)
        weight.store.uncover(weight.weight)
        weight.mask = mask
        if mask is not None and stash is not None:
            put_pruned(weight.weight, mask, stash)
        weight.hide()
        weight.seal()


class _Clears(MaskMode):
    """Pruned weights are set to zero at the refresh, and to the optimizer they are as if they had never moved."""

    clears_states = True

    def places(self, weight: MaskedWeight) -> Places | None:
        return Places(weight.weight, weight.weight)

    def install_all(
        self,
        weights: Sequence[MaskedWeight],
        masks: Sequence[Tensor],
        states: Sequence[States],
        *,
        written: bool = False,
    ) -> None:
        _clear(weights, masks, states, written=written)


@final
class Project(_Clears):
    """Pruned weights are set to zero at the refresh, then free to grow back (iterative hard thresholding)."""

    name = "project"

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.mask = mask  # what has grown since the refresh is part of the checkpoint's weights


class _HoldsZero(_Clears):
    """Pruned weights are zero between refreshes: gradients are masked, the mask is re-applied after each step."""

    keeps_zero = True

    def install_all(
        self,
        weights: Sequence[MaskedWeight],
        masks: Sequence[Tensor],
        states: Sequence[States],
        *,
        written: bool = False,
    ) -> None:
        super().install_all(weights, masks, states, written=written)
        self.mask_gradients(weights)
        for weight in weights:
            weight.seal()

    def after_update(self, weights: Sequence[MaskedWeight]) -> None:
        pairs = [(weight.weight, weight.mask) for weight in weights if weight.mask is not None]
        zero_pruned_all([values for values, _ in pairs], [mask for _, mask in pairs])

    def notice(self, weight: MaskedWeight) -> int:
        if weight.mask is None:
            return 0
        written = take_pruned(weight.weight, weight.mask)
        lost = int(written.count_nonzero())
        if lost:
            weight.store.written.append((weight.mask, written))
            zero_pruned(weight.weight, weight.mask)
        return lost

    def notice_late(self, weight: MaskedWeight) -> Tensor | None:
        if weight.mask is None:
            return None
        lost = (weight.weight != 0).logical_and_(~weight.mask).sum()
        zero_pruned(weight.weight, weight.mask)
        return lost

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.store.uncover(weight.weight)
        weight.mask = mask
        self.after_update([weight])

    def mask_gradients(self, weights: Sequence[MaskedWeight]) -> None:
        values, masks = [], []
        for weight in weights:
            gradient, mask = weight.segment.gradient, weight.mask
            if mask is None or gradient is None:
                continue
            if gradient.is_sparse:  # of an embedding: only the rows that were looked up
                rows = gradient._values()
                zero_pruned(rows, mask[tuple(gradient._indices())])
            else:
                values.append(gradient)
                masks.append(mask)
        zero_pruned_all(values, masks)


@final
class Freeze(_HoldsZero):
    """Pruned weights stay zero for good.

    N_eff is measured on the survivors, so repeated refreshes compound; `stop` and `min_density` limit that.
    """

    name = "freeze"
    masks_gradient = keeps_pruned = True


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

    def install_all(
        self,
        weights: Sequence[MaskedWeight],
        masks: Sequence[Tensor],
        states: Sequence[States],  # noqa: ARG002
        *,
        written: bool = False,  # noqa: ARG002
    ) -> None:
        _give(weights, masks)

    def restore(self, weight: MaskedWeight, mask: Tensor | None, stash: Tensor | None) -> None:  # noqa: ARG002
        weight.mask = mask


def _give(weights: Sequence[MaskedWeight], masks: Sequence[Tensor]) -> list[Tensor]:
    """Give weights their masks and return these, on an accelerator in the weights' own order of memory."""
    given = []
    for weight, mask in zip(weights, masks, strict=True):
        values = weight.weight
        if not on_host(values) and mask.stride() != values.stride():  # one launch works on both as they lie
            mask = torch.empty_like(values, dtype=torch.bool).copy_(mask)
        weight.mask = mask
        given.append(mask)
    return given


def _clear(
    weights: Sequence[MaskedWeight], masks: Sequence[Tensor], states: Sequence[States], *, written: bool
) -> None:
    """Give weights their masks; what these prune is 0 from now on, and to the optimizer as if it had never moved."""
    cleared: list[tuple[Tensor, Tensor]] = []
    for weight, mask, of_weight in zip(weights, _give(weights, masks), states, strict=True):
        cleared += [] if written else [(weight.weight, mask)]
        for values, neutral in of_weight:
            if neutral:
                values.masked_fill_(~mask, neutral)
            else:
                cleared.append((values, mask))
    zero_pruned_all([values for values, _ in cleared], [mask for _, mask in cleared])


MASK_MODES: dict[str, type[MaskMode]] = {
    "feedback": Feedback,
    "project": Project,
    "freeze": Freeze,
    "rewire": Rewire,
}

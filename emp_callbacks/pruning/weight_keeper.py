"""What keeps masked weights as the mode wants them around every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.backends import Backend
from emp_callbacks.layer.mask_mode import MaskedWeight, MaskMode

OnGradients = Callable[[Collection[int], Tensor | None], None]


@final
class WeightKeeper:
    """The masked weights, and every hook on the optimizer and on gradients; a backend's UpdateListener.

    Args:
        weights: What is masked, one entry a segment.
        mode: What their masks mean.
        backend: Tells of every optimizer step.
        on_gradients: Called once per step that will be applied, with the ids of the owners that hold their final
            gradients and the factor of these, if any.

    Attributes:
        weights: As given.
        attached: Whether the hooks are on.
    """

    def __init__(
        self, weights: Sequence[MaskedWeight], mode: MaskMode, backend: Backend, on_gradients: OnGradients
    ) -> None:
        self.weights, self._mode, self._backend, self._on_gradients = list(weights), mode, backend, on_gradients
        self.attached = False
        self._by_owner: dict[int, list[MaskedWeight]] = {}
        for weight in weights:
            self._by_owner.setdefault(id(weight.segment.owner), []).append(weight)
        self._gradient_hooks: list[RemovableHandle] = []

    @property
    def owners(self) -> Collection[int]:
        """Ids of the tensors that the optimizer updates and that hold masked weights."""
        return self._by_owner.keys()

    def attach(self) -> None:
        """Put the hooks in place."""
        self.attached = True
        self._backend.attach(self)
        if not self._mode.masks_gradient:
            return
        parameters = {id(parameter) for parameter in self._backend.module.parameters()}
        for weight in self.weights:
            owner = weight.segment.owner
            if id(owner) in parameters and owner.requires_grad:
                # As the gradient arrives: before clipping reads its norm and before DDP sums it.
                hook = owner.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
                self._gradient_hooks.append(hook)

    def detach(self) -> None:
        """Take the hooks off; the weights are left as forward sees them. Twice is once."""
        self.settle()
        self._backend.detach()
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        self.attached = False

    # ---- what a backend tells -------------------------------------------------------------------------------------

    def gradients_ready(self, owners: Sequence[Tensor], scale: Tensor | None) -> None:
        """Called by the backend once per step that will be applied, when the owners hold their final gradients."""
        self._on_gradients({id(owner) for owner in owners}, scale)

    def before_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when gradients are ready and the update comes next."""
        for weight in self._of(owners):
            self._mode.before_update(weight)

    def after_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when the update is done, before anything reads the weights."""
        for weight in self._of(owners):
            self._mode.after_update(weight)

    def _of(self, owners: Sequence[Tensor]) -> Iterator[MaskedWeight]:
        for owner in owners:
            yield from self._by_owner.get(id(owner), ())

    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        for weight in self._by_owner[id(parameter)]:
            self._mode.mask_gradient(weight)

    # ---- what the pruner asks for ---------------------------------------------------------------------------------

    def mask_gradients(self) -> None:
        """Take the pruned entries out of all gradients now, in `freeze`."""
        for weight in self.weights:
            self._mode.mask_gradient(weight)

    def settle(self) -> None:
        """Bring every weight to what forward sees, also after an optimizer step that raised half-way."""
        for weight in self.weights:
            self._mode.after_update(weight)

    def settle_if_attached(self) -> None:
        """Settle, unless the hooks are off: after `finalize()` the model is the user's alone."""
        if self.attached:
            self.settle()

    @torch.no_grad()
    def install_again(self) -> None:
        """Put the masks as they are in place again, also where weights have grown back. Collective."""
        for weight in self.weights:
            self._mode.install(weight, weight.mask_or_ones, self._backend.optimizer_states(weight.segment))
        self._backend.refresh_copies()

    @contextmanager
    @torch.no_grad()
    def dense_owners(self) -> Iterator[None]:
        """Inside the block the tensors that the optimizer updates hold the dense values."""
        for weight in self.weights:
            self._mode.reveal(weight)
        try:
            yield
        finally:
            self.settle()

    @contextmanager
    def dense_copies(self) -> Iterator[None]:
        """Inside the block the model computes with its dense weights. Collective where parameters are sharded."""
        try:
            with self.dense_owners():
                self._backend.refresh_copies()
                yield
        finally:
            self._backend.refresh_copies()

"""What keeps masked weights as the mode wants them: around every update, and against whoever else writes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.backends import Backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.core.device import is_captured
from emp_callbacks.core.masked_values import zero_pruned
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.pruning.load_hook import LoadHook
from emp_callbacks.pruning.other_writers import OtherWriters, seal
from emp_callbacks.targets import adapted_weights

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
        weights: As given, or as `replace` gave them.
        attached: Whether the hooks are on.
        copied: Whether this is a copy of another, which has no hooks.
    """

    def __init__(
        self, weights: Sequence[MaskedWeight], mode: MaskMode, backend: Backend, on_gradients: OnGradients
    ) -> None:
        self._mode, self._backend, self._on_gradients = mode, backend, on_gradients
        self.attached = self.copied = False
        self._begun = False  # a step, by a closure
        self._revealed = self._read = 0  # blocks of `dense_owners` that are open, and of `dense_copies`
        self._masked: dict[MaskedWeight, tuple[int, int]] = {}  # the gradient as it was left when it had arrived
        self._gradient_hooks: list[RemovableHandle] = []
        self._load_hook: RemovableHandle | None = None
        self._writers = OtherWriters(mode)
        self._take(weights)

    def _take(self, weights: Sequence[MaskedWeight]) -> None:
        self.weights = list(weights)
        self._by_owner: dict[int, list[MaskedWeight]] = {}
        for weight in weights:
            self._by_owner.setdefault(id(weight.segment.owner), []).append(weight)

    @property
    def owners(self) -> Collection[int]:
        """Ids of the tensors that the optimizer updates and that hold masked weights."""
        return self._by_owner.keys()

    @property
    def _applied(self) -> Sequence[MaskedWeight]:
        return self.weights if self._mode.name != "observe" else ()

    def __getstate__(self) -> dict[str, Any]:
        # The hooks on optimizers and modules are in no copy of these.
        hooks: dict[str, Any] = {"_gradient_hooks": [], "_load_hook": None, "_masked": {}}
        return {**vars(self), "attached": False, "copied": True, **hooks}

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks in place.

        Raises:
            ValueError: Another pruner at work masks one of the weights in another mode; nothing was changed.
        """
        for weight in self._applied:
            weight.check_alone_or_alike(self._mode.name)
        shared = [weight.join(self._mode.name) for weight in self._applied]
        mine = {id(weight.store) for weight in self._applied}
        twice = bool(shared) and all(shared) and any({id(w.store) for w in k._applied} == mine for k in _AT_WORK)
        self.attached = True
        _AT_WORK.add(self)
        self._backend.attach(self)
        if self._applied:
            hook = LoadHook(self._notice_load)
            self._load_hook = self._backend.module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
        self._hook_gradients()
        seal(self._applied)
        if twice and not self._backend.rank:
            warn_the_user(
                f"another EMP pruner is at work on the same weights ({self.weights[0].name!r}, ...): kept is what both "
                "keep. If this one was to replace it, call its finalize() first"
            )

    def _hook_gradients(self) -> None:
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
        if not self.attached:
            return
        self.settle()
        self._backend.detach()
        self._unhook_gradients()
        if self._load_hook is not None:
            self._load_hook.remove()
        for weight in self._applied:
            weight.leave()
        self._writers.leave(self._applied)
        _AT_WORK.discard(self)
        self.attached = False

    def _unhook_gradients(self) -> None:
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()

    def replace(self, weights: Sequence[MaskedWeight]) -> None:
        """Go on with weights of which some are new and some are gone; those that stay are the same objects."""
        before = set(self.weights)
        for weight in before.difference(weights):
            weight.unhide()
            weight.leave()
        self._unhook_gradients()
        self._take(weights)
        for weight in self._applied:
            if weight not in before:
                weight.check_alone_or_alike(self._mode.name)
                weight.join(self._mode.name)
        self._backend.owners_changed()
        self._hook_gradients()

    # ---- what a backend tells -------------------------------------------------------------------------------------

    def gradients_ready(self, owners: Sequence[Tensor], scale: Tensor | None) -> None:
        """Called by the backend once per step that will be applied, when the owners hold their final gradients."""
        self._on_gradients({id(owner) for owner in owners}, scale)
        if self._mode.masks_gradient_late:
            self._mode.mask_gradients([*self._of(owners)])

    def before_closure(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend before the first closure of a step: what was written until now is no optimizer's."""
        self._writers.before_update([*self._of(owners)])
        self._begun = True

    def before_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when gradients are ready and the update comes next.

        Raises:
            RuntimeError: The step is recorded into a CUDA graph.
        """
        if is_captured():
            raise RuntimeError(
                "an optimizer step of pruned weights is recorded into a CUDA graph: its replays would neither count "
                "steps nor refresh masks. Record forward and backward only, and call optimizer.step() itself"
            )
        weights = [*self._of(owners)]
        self._writers.before_update(weights, again=self._begun)  # all before the first is changed: see there
        self._begun = False
        if self._mode.masks_gradient:
            self._mode.mask_gradients([weight for weight in weights if not self._is_masked(weight)])
            self._masked.clear()
        self._mode.before_update(weights)

    def after_update(self, owners: Sequence[Tensor]) -> None:
        """Called by the backend when the update is done, before anything reads the weights."""
        weights = [*self._of(owners)]
        self._hide(weights)
        if self._revealed:
            self._reveal(weights)

    def _hide(self, weights: Sequence[MaskedWeight]) -> None:
        """Make the weights what forward sees; whoever writes them from here on is another."""
        self._mode.after_update(weights)
        if self._mode.keeps_zero:
            seal(weights)

    def _reveal(self, weights: Sequence[MaskedWeight]) -> None:
        self._mode.reveal(weights, in_place=self._read > 0)

    def _of(self, owners: Sequence[Tensor]) -> Iterator[MaskedWeight]:
        for owner in owners:
            yield from self._by_owner.get(id(owner), ())

    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        if is_captured():
            raise RuntimeError(
                "a backward pass of pruned weights is recorded into a CUDA graph: its replays would mask gradients by "
                "the masks of today after a refresh. Use torch.cuda.make_graphed_callables, which leaves that out"
            )
        weights = self._by_owner[id(parameter)]
        self._mode.mask_gradients(weights)
        if self._backend.world_size == 1:  # else ranks sum it into the same memory, which leaves no trace
            self._masked |= {weight: _trace(parameter.grad) for weight in weights}

    def _is_masked(self, weight: MaskedWeight) -> bool:
        """Whether nothing was written into a gradient since it was masked as it arrived."""
        return weight in self._masked and self._masked[weight] == _trace(weight.segment.owner.grad)

    # ---- who else writes ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def notice(self) -> None:
        """Let what something else wrote since the last update obey the masks: it becomes the dense values.

        In `freeze` values under the mask cannot stay; that they are lost is said once.
        """
        if self.attached:
            self._after_unmerging()
            self._writers.notice(self._unmerged())

    def _unmerged(self) -> Sequence[MaskedWeight]:
        """Return the weights without those into which PEFT has merged adapters, which are others until it unmerges."""
        merged = adapted_weights(self._backend.module)
        return [weight for weight in self._applied if not merged.get(id(weight.segment.owner))]

    @torch.no_grad()
    def _after_unmerging(self) -> None:
        """Zero what PEFT, when it unmerged, left under the masks of a frozen base: rounding errors, no dense values."""
        adapted = adapted_weights(self._backend.module) if self._mode.keeps_zero and not self._revealed else {}
        for weight in self._applied if adapted else ():
            owner = weight.segment.owner
            if weight.mask is not None and adapted.get(id(owner)) is False and not owner.requires_grad:
                zero_pruned(weight.weight, weight.mask)

    def _notice_load(self) -> None:
        if self.attached:
            self._writers.notice(self._applied, loaded=True)

    def restored(self) -> None:
        """A checkpoint's masks and the values behind them are in place."""
        self._writers.restored()
        self.notice()

    def masked(self) -> AbstractContextManager[None]:
        """Inside the block the weights obey the masks, for an evaluation, whoever wrote them; see `OtherWriters`."""
        return self._writers.masked(self._applied if self.attached else ())

    def replaced(self) -> list[str]:
        """Return the weights that something else replaced since the hooks are off; they become the dense values."""
        return self._writers.replaced(self._applied)

    # ---- what the pruner asks for ---------------------------------------------------------------------------------

    def mask_gradients(self) -> None:
        """Take the pruned entries out of all gradients now, in `freeze`."""
        if self._mode.masks_gradient:
            self._mode.mask_gradients(self.weights)

    @torch.no_grad()
    def count_zeros(self) -> tuple[int, int]:
        """Return how many of this rank's kept weights that train are 0, and of how many; what is all 0 is left out."""
        zeros = total = 0
        for weight in self.weights:
            nonzero = int(weight.weight.count_nonzero())
            if nonzero and weight.segment.owner.requires_grad:
                kept = int(weight.mask_or_ones.count_nonzero())
                zeros, total = zeros + kept - nonzero, total + kept
        return zeros, total

    def settle(self) -> None:
        """Bring every weight to what forward sees, also after an optimizer step that raised half-way."""
        self._hide(self._unmerged())
        self.notice()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside the block every weight is what forward sees, also within `dense_owners`.

        Unless the hooks are off: after `finalize()` the model is the user's alone.
        """
        if self.attached:
            self.settle()
        try:
            yield
        finally:
            if self._revealed:
                self._reveal(self.weights)

    @torch.no_grad()
    def install_again(self) -> None:
        """Put the masks as they are in place again, also where weights have grown back. Collective."""
        clears = self._mode.clears_states
        states = [self._backend.optimizer_states(weight.segment) if clears else [] for weight in self.weights]
        if clears:
            self._backend.forget_histories()
        for weight, of_weight in zip(self.weights, states, strict=True):
            self._mode.install(weight, weight.mask_or_ones, of_weight)
        self._backend.refresh_copies()

    @contextmanager
    @torch.no_grad()
    def dense_owners(self) -> Iterator[None]:
        """Inside the block the tensors that the optimizer updates hold the dense values."""
        if self.attached:
            self._after_unmerging()
            if len(self._unmerged()) < len(self._applied):
                raise RuntimeError(
                    "adapters are merged into the weights that are pruned (merge_adapter): a refresh needs the base as "
                    "it is without them; call unmerge_adapter() first"
                )
            self._writers.before_update(self._applied)
        self._reveal(self.weights)
        self._revealed += 1
        try:
            yield
        finally:
            self._revealed -= 1
            if self._revealed:  # a refresh has hidden some
                self._reveal(self.weights)
            else:
                self._hide([weight for weight in self.weights if not weight.is_sealed])

    @contextmanager
    def dense_copies(self) -> Iterator[None]:
        """Inside the block the model computes with its dense weights. Collective where parameters are sharded."""
        try:
            self._read += 1
            with self.dense_owners():
                self._backend.refresh_copies()
                yield
        finally:
            self._read -= 1
            self._backend.refresh_copies()


def _trace(gradient: Tensor | None) -> tuple[int, int]:
    """Return where a gradient lies and how often it was written."""
    if gradient is None or gradient.is_sparse:
        return 0, id(gradient)
    return gradient.data_ptr(), gradient._version


_AT_WORK: WeakSet[WeightKeeper] = WeakSet()

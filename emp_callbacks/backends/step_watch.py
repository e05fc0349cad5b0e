"""Every rewrite of the weights by an optimizer, whichever way it is called: seen before and after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, final
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from emp_callbacks.backends.optimizer_state import inner_optimizers, with_inner
from emp_callbacks.backends.wrapped import Wrapped

# Methods by which optimizers rewrite weights outside of step(): schedule-free ones before and after evaluation,
# sharpness-aware ones in two halves, Lookahead when told to.
REWRITES = ("train", "eval", "first_step", "second_step", "sync_lookahead")
# Their optimizers do nothing with the weights before they have called the closure.
_CLOSURE_FIRST = (
    "torch.",
    "timm.",
    "transformers.",
    "bitsandbytes.",
    "lightning.",
    "pytorch_lightning.",
    "accelerate.",
)


class UpdateListener(Protocol):
    """What is told of every rewrite."""

    @property
    def owners(self) -> Collection[int]:
        """Ids of the tensors that matter."""

    def before_closure(self, owners: Sequence[Tensor]) -> None:
        """A step of these tensors begins with forward and backward."""

    def before_update(self, owners: Sequence[Tensor]) -> None:
        """These tensors are rewritten next; may be told twice."""

    def gradients_ready(self, owners: Sequence[Tensor], scale: Tensor | None) -> None:
        """The tensors hold the gradients, times `scale` if given, that will be applied; told once per step."""

    def after_update(self, owners: Sequence[Tensor]) -> None:
        """These tensors were rewritten, or a new forward and backward begins; may be told twice."""


@final
class StepWatch:
    """Tells a listener of every step of the given optimizers, and of any other that updates the listener's tensors.

    Two mechanisms, because neither is enough. The methods of the given optimizers are wrapped: what a wrapper such as
    Lookahead does after its inner optimizer's step is seen, and a step that raises is followed up. torch's global step
    hooks say which of the steps inside are real, and find optimizers that nobody named: one that was made anew in
    the middle of a run, the inner one of a wrapper whose own `step` is never called.

    Args:
        optimizers: Those given; such that were found are appended.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._listener: UpdateListener | None = None
        self._handles: list[Any] = []
        self._strangers: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._depth, self._prepared, self._begun = 0, False, False
        self._announced: set[int] = set()
        self.applied = False

    def attach(self, listener: UpdateListener) -> None:
        """Tell `listener` from now on."""
        self._listener = _Untraced(listener) if self._optimizers else listener
        for optimizer in self._optimizers:
            self._wrap(optimizer)
        # Torch keeps its global hooks for ever: they must not keep a model that nobody else holds.
        self._handles.append(register_optimizer_step_pre_hook(_Weakly(self._before_real_step)))
        self._handles.append(register_optimizer_step_post_hook(_Weakly(self._after_real_step)))

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        while self._handles:
            self._handles.pop().remove()
        self._listener = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": [], "_strangers": None, "_listener": None}  # a copy watches nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_strangers": WeakKeyDictionary()})

    def look_again(self) -> None:
        """Forget which optimizers update none of the listener's tensors: they have become others."""
        self._strangers.clear()

    # ---- around a method ------------------------------------------------------------------------------------------

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        for name in ("step", *REWRITES):
            if callable(getattr(optimizer, name, None)):
                self._handles.append(Wrapped(optimizer, name, partial(self._around, optimizer, name)))

    def _around(
        self, optimizer: torch.optim.Optimizer, name: str, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        assert self._listener is not None
        closure = kwargs.get("closure", args[0] if args else None) if name == "step" else None
        outermost, unseen = self._depth == 0, name == "step" and _is_unseen(optimizer)
        if outermost:
            self._begin()
        self._depth += 1
        try:
            if closure is None or not type(optimizer).__module__.startswith(_CLOSURE_FIRST):
                # Weights that an optimizer saves or moves before it calls the closure must be the dense ones.
                self._prepare(optimizer)
            if unseen and closure is None:
                self._announce(optimizer)
            if unseen and closure is not None:
                args, kwargs = (), {**kwargs, "closure": self._on_masked_weights(optimizer, closure)}
            result = inner(*args, **kwargs)
            self.applied |= unseen
            return result
        finally:
            self._depth -= 1
            if outermost:
                self._settle(optimizer)

    # ---- the steps that torch knows -------------------------------------------------------------------------------

    def _before_real_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._concerns(optimizer):
            return None
        if self._depth == 0:  # nobody named it: the first of its steps, see below
            self._begin()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._announce(optimizer)
            return None
        if getattr(closure, "watched_by", None) is self:  # passed on by a wrapper
            return None
        further = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], self._on_masked_weights(optimizer, closure)), further

    def _after_real_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
    ) -> None:
        if not self._concerns(optimizer):
            return
        assert self._listener is not None
        self.applied |= not _will_skip(optimizer)
        if self._depth == 0:
            self._settle(optimizer)
            self._optimizers.append(optimizer)
            self._wrap(optimizer)

    def _on_masked_weights(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure for a step inside which forward and backward run (Lightning's automatic optimization)."""

        def on_masked_weights() -> Any:
            if not self._begun and self._listener is not None:  # else what was written since is the optimizer's
                self._begun = True
                self._listener.before_closure(_owners(optimizer))
            self._settle(optimizer)
            result = closure()
            self._announce(optimizer)
            return result

        on_masked_weights.watched_by = self  # type: ignore[attr-defined]
        return on_masked_weights

    def _begin(self) -> None:
        self._prepared = self._begun = False  # also after a step that nobody named, which raised
        self._announced.clear()

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._listener is not None
        if not self._prepared:  # else by the wrapper around it, whose tensors it updates
            self._prepared = self._begun = True
            self._listener.before_update(_owners(optimizer))

    def _settle(self, optimizer: torch.optim.Optimizer) -> None:
        self._prepared = False
        if self._listener is not None:
            self._listener.after_update(_owners(optimizer))

    def _announce(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._listener is not None
        self._prepare(optimizer)
        fresh = [owner for owner in _owners(optimizer) if id(owner) not in self._announced]
        if fresh and not _will_skip(optimizer):
            self._announced.update(map(id, fresh))
            self._listener.gradients_ready(fresh, getattr(optimizer, "grad_scale", None))

    def _concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer was given or found, or updates one of the listener's tensors."""
        if self._listener is None:
            return False
        if any(optimizer is known for known in with_inner(self._optimizers)):
            return True
        owners = _owners(optimizer)
        if self._strangers.get(optimizer) == len(owners):
            return False
        if any(id(owner) in self._listener.owners for owner in owners):
            return True
        self._strangers[optimizer] = len(owners)
        return False


class _Untraced:
    """A listener whose work a compiled optimizer step leaves to Python: it launches kernels by the tensors' addresses.

    torch.compiler.disable imports the compiler, which the making of any optimizer has done before.
    """

    def __init__(self, listener: UpdateListener) -> None:
        self._listener = listener
        self.before_closure = torch.compiler.disable(listener.before_closure)  # type: ignore[no-untyped-call]
        self.before_update = torch.compiler.disable(listener.before_update)  # type: ignore[no-untyped-call]
        self.gradients_ready = torch.compiler.disable(listener.gradients_ready)  # type: ignore[no-untyped-call]
        self.after_update = torch.compiler.disable(listener.after_update)  # type: ignore[no-untyped-call]

    @property
    def owners(self) -> Collection[int]:
        return self._listener.owners


class _Weakly:
    """A bound method that does not keep its object, and is nothing without it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args)


def _is_unseen(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's hooks see no step of it: of its own it is not hooked, and there is none inside."""
    return not getattr(type(optimizer).step, "hooked", False) and not inner_optimizers(optimizer)


def _will_skip(optimizer: torch.optim.Optimizer) -> bool:
    # Fused optimizers run their hooks even where GradScaler makes the step do nothing.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _owners(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    # At call time: ZeRO shows one parameter group after the other through the same optimizer.
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]

"""What every backend offers: segments, sums over ranks, and a word before and after each optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import WeightTarget


class UpdateListener(Protocol):
    """What a backend tells of every optimizer step."""

    def before_update(self, owners: Sequence[Tensor]) -> None:
        """The gradients of these tensors are ready, the update comes next; may be told twice."""

    def gradients_ready(self, owners: Sequence[Tensor], scale: Tensor | None) -> None:
        """The tensors hold the gradients, times `scale` if given, that will be applied; told once per step."""

    def after_update(self, owners: Sequence[Tensor]) -> None:
        """These tensors were updated, or a new forward and backward begins; may be told twice."""


class Backend(ABC):
    """One parallel strategy.

    Args:
        module: The user's own module.
        optimizers: The innermost torch optimizers, whose steps update the segments' owners; may be empty (a model
            that is pruned once, by hand).
    """

    name: str

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        self._handles: list[RemovableHandle] = []
        self._step_was_applied = False

    # ---- where the parameters are ---------------------------------------------------------------------------------

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape that the parameter has in the unsharded model."""
        return parameter.shape

    @abstractmethod
    def segments(self, targets: Sequence[WeightTarget]) -> list[Segment]:
        """Return this rank's part of every target, in order; a part may be empty."""

    def refresh_copies(self) -> None:
        """Make every tensor that forward reads equal to the owners. Collective."""

    def forward_copies(self, segment: Segment) -> list[Tensor]:  # noqa: ARG002
        """Return the tensors, other than the owner, from which forward reads the segment; layout of its weight."""
        return []

    # ---- ranks ----------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's number in the job, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes in the job."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, on its own device. Collective."""
        if self.world_size == 1:
            return value
        on_wire = value.cuda() if dist.get_backend() == "nccl" else value.clone()
        dist.all_reduce(on_wire)
        return on_wire.to(value.device)

    def from_all(self, value: Tensor) -> Tensor:
        """Return the `value` of every rank, shape (world_size, *value.shape), in order of rank. Collective."""
        rows = value.new_zeros(self.world_size, *value.shape)
        rows[self.rank] = value
        return self.all_sum(rows)

    # ---- optimizer steps ------------------------------------------------------------------------------------------

    def optimizer_states(self, segment: Segment) -> list[Tensor]:
        """Return the segment's part of the optimizers' per-weight tensors (momentum, second moment)."""
        owner = segment.owner
        states = [v for optimizer in self.optimizers for v in optimizer.state.get(owner, {}).values()]
        return [segment.view(v) for v in states if isinstance(v, Tensor) and v.shape == owner.shape]

    def attach(self, listener: UpdateListener) -> None:
        """Tell `listener` of every optimizer step from now on."""
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(_pre_hook(listener)))
            self._handles.append(optimizer.register_step_post_hook(self._post_hook(listener)))

    def detach(self) -> None:
        """Take every hook off the optimizers."""
        while self._handles:
            self._handles.pop().remove()

    def take_applied(self) -> bool:
        """Return whether an optimizer step was applied since the last call; a skipped one does not count."""
        applied, self._step_was_applied = self._step_was_applied, False
        return applied

    def _post_hook(self, listener: UpdateListener) -> Callable[..., None]:
        def post(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            listener.after_update(_owners(optimizer))
            if not _will_skip(optimizer):
                self._step_was_applied = True

        return post


def _will_skip(optimizer: torch.optim.Optimizer) -> bool:
    # Fused optimizers run their hooks even where GradScaler makes the step do nothing.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _announce(listener: UpdateListener, optimizer: torch.optim.Optimizer) -> None:
    owners = _owners(optimizer)
    listener.before_update(owners)
    if not _will_skip(optimizer):
        listener.gradients_ready(owners, getattr(optimizer, "grad_scale", None))


def _pre_hook(listener: UpdateListener) -> Callable[..., Any]:
    def pre(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            _announce(listener, optimizer)
            return None

        # With a closure (Lightning's automatic optimization, LBFGS) forward and backward run inside step().
        def closure_on_masked_weights() -> Any:
            listener.after_update(_owners(optimizer))
            result = closure()
            _announce(listener, optimizer)
            return result

        return (args[0], closure_on_masked_weights), {k: v for k, v in kwargs.items() if k != "closure"}

    return pre


def _owners(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    # At call time: ZeRO shows one parameter group after the other through the same optimizer.
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]

"""Whole parameters on every rank: one process, or DDP replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class UpdateListener(Protocol):
    """What a backend tells of every optimizer step."""

    def before_update(self, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients of these parameters are ready, the update comes next; may be told twice."""

    def after_update(self, parameters: Sequence[nn.Parameter]) -> None:
        """These parameters were updated, or a new forward and backward begins; may be told twice."""


class LocalBackend:
    """Parameters that every rank holds in full.

    Each rank counts its own chunk of every replica and the counts are summed, so the ranks decide from the same
    numbers and a refresh reads each weight once per job, not once per rank.

    Args:
        optimizers: The innermost torch optimizers; may be empty (a model that is pruned once, by hand).
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._handles: list[RemovableHandle] = []
        self._step_was_applied = False

    @property
    def rank(self) -> int:
        """This process's number in the job, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes in the job."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def counted(self, size: int) -> slice:
        """Return the part of a tensor of `size` elements that this rank counts; the ranks' parts cover it once."""
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, on its own device. Collective."""
        if self.world_size == 1:
            return value
        on_wire = value.cuda() if dist.get_backend() == "nccl" else value.clone()
        dist.all_reduce(on_wire)
        return on_wire.to(value.device)

    def optimizer_states(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the optimizers' per-weight tensors of a parameter (momentum, second moment), same shape."""
        states = [optimizer.state.get(parameter, {}) for optimizer in self.optimizers]
        return [v for state in states for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]

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
            listener.after_update(_parameters(optimizer))
            # Fused optimizers run their hooks even where GradScaler makes the step do nothing.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                self._step_was_applied = True

        return post


def _pre_hook(listener: UpdateListener) -> Callable[..., Any]:
    def pre(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            listener.before_update(_parameters(optimizer))
            return None

        # With a closure (Lightning's automatic optimization, LBFGS) forward and backward run inside step().
        def closure_on_masked_weights() -> Any:
            listener.after_update(_parameters(optimizer))
            result = closure()
            listener.before_update(_parameters(optimizer))
            return result

        return (args[0], closure_on_masked_weights), {k: v for k, v in kwargs.items() if k != "closure"}

    return pre


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

"""What every backend offers: segments, sums over ranks, and a word before and after each optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emp_callbacks.backends.group import Group, on_wire
from emp_callbacks.backends.optimizer_state import OptimizerState, forget_histories, states_of
from emp_callbacks.backends.step_watch import StepWatch, UpdateListener
from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import WeightTarget, anything


class Backend(ABC):
    """One parallel strategy.

    Args:
        module: The user's own module.
        optimizers: The innermost torch optimizers, whose steps update the segments' owners; may be empty (a model
            that is pruned once, by hand).
        group: The processes that train the model together; others of the job are not waited for. None: all.
    """

    name: str
    can_follow = False  # whether weights may be added and dropped while training runs
    scales_loss = False  # whether it multiplies the loss by itself, before backward

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], group: Group = None) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        self.group = group
        self._watch = StepWatch(self.optimizers)

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
        """This process's number among those that train the model, from 0."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes that train the model."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, on its own device. Collective."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def all_min(self, value: Tensor) -> Tensor:
        """Return the lowest `value` of any rank, element by element, on its own device. Collective."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return value
        sent = on_wire(value, self.group)
        try:
            dist.all_reduce(sent, how, group=self.group)
        except RuntimeError as error:  # a rank waited for others that never came
            raise RuntimeError(
                f"a sum over all ranks did not come about ({str(error).splitlines()[0]}). Collective: making a pruner, "
                "refresh(), save(), load(), scores(), audit() must be called on all ranks; masks, density and "
                "trajectory may be read on one"
            ) from error
        return sent.to(value.device)

    def from_all(self, value: Tensor) -> Tensor:
        """Return the `value` of every rank, shape (world_size, *value.shape), in order of rank. Collective."""
        rows = value.new_zeros(self.world_size, *value.shape)
        rows[self.rank] = value
        return self.all_sum(rows)

    def gathered(self, thing: Any) -> list[Any]:
        """Return what every rank gave, in order of rank: on rank 0, elsewhere []. Collective."""
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        first = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.gather_object(thing, found, dst=first, group=self.group)
        return found or []

    # ---- optimizer steps ------------------------------------------------------------------------------------------

    def updates(self) -> Callable[[nn.Parameter], bool]:
        """Return what says whether the optimizers, as they are now, update a parameter; without any, one may."""
        if not self.optimizers:
            return anything
        updated = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return lambda parameter: id(parameter) in updated

    def optimizer_states(self, segment: Segment) -> list[OptimizerState]:
        """Return the segment's part of the optimizers' per-weight tensors (momentum, second moment).

        Raises:
            TypeError: One is kept in a form in which a weight's part cannot be cleared.
        """
        return states_of(self.optimizers, segment)

    def forget_histories(self) -> None:
        """Clear what optimizers remember of all weights in one piece."""
        forget_histories(self.optimizers)

    def attach(self, listener: UpdateListener) -> None:
        """Tell `listener` of every optimizer step from now on."""
        self._watch.attach(listener)

    def owners_changed(self) -> None:
        """Take note that the listener masks other tensors than before."""
        self._watch.look_again()

    def detach(self) -> None:
        """Take every hook off the optimizers."""
        self._watch.detach()

    def take_applied(self) -> bool:
        """Return whether an optimizer step was applied since the last call; a skipped one does not count."""
        applied, self._watch.applied = self._watch.applied, False
        return applied

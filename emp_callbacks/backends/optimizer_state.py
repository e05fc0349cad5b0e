"""What an optimizer remembers of single weights, and the value that stands for "nothing yet"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.layer.segment import Segment


class OptimizerState(NamedTuple):
    """One per-weight tensor of an optimizer.

    Attributes:
        values: Layout of the segment's weight, in the optimizer's own memory.
        neutral: What it holds of a weight that was never updated: 0, but for codes and a few accumulators.
    """

    values: Tensor
    neutral: float


def states_of(optimizers: Sequence[torch.optim.Optimizer], segment: Segment) -> list[OptimizerState]:
    """Return the segment's part of every tensor that optimizers keep in the shape of the segment's owner.

    Those of the optimizers inside a wrapper (Lookahead, accelerate) count, once.

    Raises:
        TypeError: It is kept as codes without a table of what they stand for, or in a tensor class of its own.
    """
    owner, found = segment.owner, {}
    for optimizer in with_inner(optimizers):
        state = optimizer.state.get(owner, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == owner.shape and id(value) not in found:
                neutral = _neutral(optimizer, owner, key, value, state)
                found[id(value)] = OptimizerState(segment.view(value), neutral)
    return list(found.values())


def forget_histories(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let an LBFGS begin anew: it remembers all weights in one piece, of which no part can be cleared."""
    for optimizer in with_inner(optimizers):
        for state in optimizer.state.values() if isinstance(optimizer, torch.optim.LBFGS) else ():
            state["n_iter"] = 0


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that a wrapper holds."""
    return [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]


def with_inner(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Return the optimizers, and those that the wrappers among them hold."""
    return [*optimizers, *(inner for outer in optimizers for inner in inner_optimizers(outer))]


def _neutral(optimizer: torch.optim.Optimizer, owner: Tensor, key: str, value: Tensor, state: dict[str, Any]) -> float:
    kind = type(optimizer).__name__
    if type(value) not in (Tensor, torch.nn.Parameter, type(owner)):
        raise TypeError(_refusal(kind, key, type(value).__name__))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        group = next((g for g in optimizer.param_groups if any(p is owner for p in g["params"])), {})
        started = {
            ("Rprop", "step_size"): group.get("lr", 0.0),
            ("Adagrad", "sum"): group.get("initial_accumulator_value", 0.0),
            ("RMSpropTF", "square_avg"): 1.0,
        }
        return float(started.get((kind, key), 0.0))
    table = state.get(key.replace("state", "qmap"))  # bitsandbytes: code -> value in units of the block's largest
    if key.startswith("state") and isinstance(table, Tensor) and table.numel() == 256:
        return float(table.abs().argmin())
    raise TypeError(_refusal(kind, key, str(value.dtype)))


def _refusal(kind: str, key: str, form: str) -> str:
    return (
        f"{kind} keeps {key!r} of its weights as {form}, in which the part of pruned weights cannot be cleared: use "
        "mode='feedback', which clears nothing, or an optimizer with floating-point states"
    )

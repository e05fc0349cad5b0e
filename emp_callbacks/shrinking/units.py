"""The units of a masked model: which of them are pruned, and the layer behind a name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape

import torch
from torch import Tensor, nn

from emp_callbacks.targets.expert_units import experts
from emp_callbacks.targets.heads import attention_heads
from emp_callbacks.targets.neurons import neurons
from emp_callbacks.targets.units import UnitTarget

__all__ = ["alive_units", "pruned_units", "unit_layer", "unit_layers"]


def pruned_units(model: nn.Module) -> dict[str, Tensor]:
    """Return which heads, experts and neurons of a masked model are alive, for every layer that has dead ones.

    A head is dead if its columns of the output projection are zero; a neuron if its weights and bias are, and the
    scale and shift of its batch norm where it has one; an expert if all its weights are.

    Returns:
        Module name -> bool, shape (units,), True = alive, on the CPU.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> _ = model[0].weight.data[1].zero_()
        >>> pruned_units(model)
        {'0': tensor([ True, False,  True])}
    """
    found: dict[str, Tensor] = {}
    for target in unit_layers(model):
        if not (alive := alive_units(target)).all():
            found.setdefault(target.name, alive)  # of experts as a whole, or if none is dead of their neurons
    return found


def unit_layer(model: nn.Module, name: str, units: int) -> UnitTarget:
    """Return the layer called `name` that has so many units; where none has, one with another number.

    Raises:
        ValueError: There is no such layer.
    """
    named = [target for target in unit_layers(model, include=[escape(name)]) if target.name == name]
    for target in sorted(named, key=lambda target: target.units != units):
        return target
    raise ValueError(
        f"{type(model).__name__} has no layer {name!r} with heads, experts or neurons that can be taken out; "
        "pass the model that the masks belong to"
    )


def unit_layers(model: nn.Module, include: Sequence[str] | None = None) -> Iterator[UnitTarget]:
    """Yield the attentions, the mixtures of experts and the layers of neurons and channels of a model."""
    for finder in (attention_heads, experts, neurons):
        with suppress(ValueError):  # a model need not have both
            yield from finder(model, include=include)


def alive_units(target: UnitTarget) -> Tensor:
    """Return which units have a weight that is not zero among those that pruning zeroes; bool, shape (units,)."""
    alive = torch.zeros(target.units, dtype=torch.bool)
    for member in target.members:
        if member.masked:
            along = [*range(len(member.dims))]
            slices = member.weight.parameter.detach().movedim(member.dims, along).flatten(0, along[-1])
            live = (slices.reshape(len(slices), -1) != 0).any(1).cpu() & (member.unit_of >= 0)
            alive[member.unit_of[live]] = True
    return alive

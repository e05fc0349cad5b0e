"""Counts of units that are the same in all layers of a kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from emp_callbacks.shrinking.trial import Planned
from emp_callbacks.shrinking.units import unit_layers

__all__ = ["equal_counts"]


def equal_counts(model: nn.Module, plan: Callable[[Mapping[str, int]], Planned]) -> dict[str, int]:
    """Return how many units may go from each layer so that all layers of a kind keep the same number.

    Layers are of a kind if their names differ in numbers alone and they have as many units.

    Args:
        model: The model, not cut.
        plan: Gives the cut with at most so many units of each layer removed; {} for no limit.
    """
    kinds: dict[tuple[str, int], list[str]] = {}
    for target in unit_layers(model):
        kinds.setdefault((re.sub(r"\d+", "*", target.name), target.units), []).append(target.name)
    most: dict[str, int] = {}
    while True:
        removed = {name: layer.removed for name, layer in plan(most).layers.items()}
        least = {name: min(removed.get(other, 0) for other in kind) for kind in kinds.values() for name in kind}
        if all(removed[name] == least.get(name, count) for name, count in removed.items()):
            return {name: least.get(name, count) for name, count in removed.items()}
        most = {name: least.get(name, count) for name, count in removed.items()}

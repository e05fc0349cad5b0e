"""What is pruned of a model in a folder, and in which parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from typing import Any

from torch import nn

from emp_callbacks.config import EMPConfig
from emp_callbacks.folders.skeleton import Skeleton
from emp_callbacks.folders.units import Unit, find_units
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets.names import few
from emp_callbacks.targets.weights import WeightTarget, prunable_weights

__all__ = ["Plan", "without_output_embedding"]


class Plan:
    """What is pruned of a model, and what is in memory with it.

    Attributes:
        units: The units that hold something that is pruned.
        all_units: All of them.
        names: Unit -> name in the unit -> name in the model, of what is pruned there.
        notes: What a reader must know.
    """

    def __init__(self, skeleton: Skeleton, config: EMPConfig) -> None:
        self.skeleton, self.config = skeleton, config
        chosen, self.notes = _chosen_of(skeleton, config)
        self._chosen = {parameter: skeleton.own_names[parameter] for parameter in chosen}
        self.set_units(find_units(skeleton.model, set(self._chosen)))
        held = {name for names in self.names.values() for name in names.values()}
        if apart := [name for name in self._chosen.values() if name not in held]:
            self.notes.append(f"left out, as they lie beside blocks in one module: {few(apart)}")
        if config.include is None:  # what cannot be scored is told before anything is read
            EMPPruner(skeleton.model, config=replace(config, include=[escape(name) for name in held])).detach()

    def set_units(self, units: Sequence[Unit]) -> None:
        """Take the units as the model calls them."""
        self.all_units = list(units)
        self.names = {}
        for unit in units:
            own = {
                name: self._chosen[parameter]
                for name, parameter in self.skeleton.empty_parameters(unit.module).items()
                if parameter in self._chosen
            }
            if own:
                self.names[unit] = own

    def keep_called(self, called: Sequence[Unit]) -> None:
        """Take the units that the model calls, in that order; of what it does not call nothing can be said.

        Raises:
            ValueError: It calls nothing that is pruned.
        """
        before = {name for names in self.names.values() for name in names.values()}
        self.set_units(called)
        uncalled = sorted(before - {name for names in self.names.values() for name in names.values()})
        if uncalled:
            self.notes.append(f"left out: {few(uncalled)}, which the model does not call for these samples")
        if not self.names:
            raise ValueError(f"the model calls nothing that is to be pruned: {few(uncalled)}; choose other weights")

    @property
    def units(self) -> list[Unit]:
        return list(self.names)

    def prunes(self, unit: Unit) -> bool:
        """Return whether something in a unit is pruned."""
        empty = self.skeleton.empty_parameters(unit.module)
        return any(parameter in self._chosen for parameter in empty.values())

    def pruner(self, unit: Unit) -> EMPPruner:
        """Return what prunes a loaded unit."""
        include = [escape(name) for name in self.names[unit]]
        return EMPPruner(unit.module, config=replace(self.config, include=include, exclude=None))


def _chosen_of(skeleton: Skeleton, config: EMPConfig) -> tuple[list[nn.Parameter], list[str]]:
    targets = prunable_weights(skeleton.model, config.include, config.exclude)
    if config.include is not None:
        return [target.parameter for target in targets], []
    chosen, notes = without_output_embedding(skeleton.model, targets)
    return [target.parameter for target in chosen], notes


def without_output_embedding(model: nn.Module, targets: Sequence[WeightTarget]) -> tuple[list[WeightTarget], list[str]]:
    """Return weights without the layer that makes words of what the last block returned, and the note of that.

    Pruning once leaves it dense, as Wanda, SparseGPT and the EMP paper do: it is no block's, and each of its rows
    decides on one word.

    Args:
        model: Of transformers, or another, of which nothing is left out.
        targets: The weights.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)
    layer = head()
    words = set() if layer is None else {*layer.parameters()}
    apart = [target.name for target in targets if target.parameter in words]
    chosen = [target for target in targets if target.parameter not in words]
    if not apart or not chosen:
        return list(targets), []
    return chosen, [f"left out: {few(apart)}, the output embedding; --include names it"]

"""What is known of a model's channels before any is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from emp_callbacks.shrinking.links import channel_links
from emp_callbacks.shrinking.regroup import Axis, alike
from emp_callbacks.shrinking.surgery import axes_of, groups_of, mixes, passes
from emp_callbacks.shrinking.zero_inputs import zero_inputs
from emp_callbacks.targets.units import UnitTarget

__all__ = ["ChannelFacts", "unit_rows"]


class ChannelFacts:
    """What is known of a model's channels before any is removed.

    Args:
        model: The masked model, in evaluation mode.
        layers: Each layer with its pruned units, bool, shape (units,).
        cuttable: Modules that can be cut.
        run: Calls the model on the example, with other parameters if given `parameters`.

    Attributes:
        names: Module -> its name.
        cuttable: As given.
        pruned: Name of a layer -> its pruned units.
        rows: Name of a layer -> module -> unit of each of its outputs, int64; -1 for none.
        passing: Modules that act on each channel alone, and can be cut.
        zeros: Layer -> bool, shape (inputs,): inputs that are zero whatever the weights.
        links: Which outputs reach which inputs.
        grouped: Grouped convolutions whose channels can be put into another order, with all axes that have their
            inputs, and all that have their outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[UnitTarget, Tensor]],
        cuttable: set[nn.Module],
        run: Callable[..., Any],
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.cuttable = cuttable
        self.pruned = {target.name: pruned for target, pruned in layers}
        self.rows = {target.name: unit_rows(model, target) for target, _ in layers}
        owners = {module for rows in self.rows.values() for module in rows}
        self.passing = {module for module in cuttable if passes(module) and module not in owners}
        mixing = [m for m in model.modules() if (mixes(m) and m not in self.passing)]
        self.zeros = zero_inputs(model, run)
        self.links = channel_links(model, run, mixing, self.passing, owners)
        self.grouped = self._packable()

    def _packable(self) -> dict[nn.Module, tuple[set[Axis], set[Axis]]]:
        """Return grouped convolutions whose channels can be put into another order, with all axes that have them."""
        convolutions = {m for m in self.cuttable if groups_of(m) > 1 and "inputs" in axes_of(m)}
        readers = {read.module for read in self.links.reads}
        read = {layer for read in self.links.reads for layer in read.mixed}
        packable = {}
        for module in convolutions & readers & read:  # else it is not known what else has its channels
            inputs = alike(self.links.reads, (module, "inputs"), self.passing)
            outputs = alike(self.links.reads, (module, "outputs"), self.passing)
            if inputs and outputs and all(self._free(module, axes, convolutions) for axes in (inputs, outputs)):
                packable[module] = inputs, outputs
        return packable

    def _free(self, module: nn.Module, axes: set[Axis], grouped: set[nn.Module]) -> bool:
        """Return whether a grouped convolution is the only one on these axes, which the model does not give out."""
        alone = [other for other, _ in axes if other in grouped] == [module]
        return alone and not any((other, "outputs") in axes for other in self.links.given_out)

    def label(self, module: nn.Module) -> str:
        return f"{self.names[module]!r} ({type(module).__name__})"


def unit_rows(model: nn.Module, target: UnitTarget) -> dict[nn.Module, Tensor]:
    """Return the unit of each output of the target's layers; int64, shape (outputs,)."""
    owners = {p: module for module in model.modules() for p in module._parameters.values() if p is not None}
    return {owners[m.weight.parameter]: m.unit_of for m in target.members if m.role == "weight"}

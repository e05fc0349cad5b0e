"""What pruned neurons and channels take with them, and why some of them stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.links import Read, channel_links
from emp_callbacks.shrinking.report import FOR_EQUAL_SIZES, ShrunkLayer
from emp_callbacks.shrinking.surgery import Surgery, axes_of, axis_size, cut_of, groups_of, mixes, passes, why_whole
from emp_callbacks.shrinking.zero_inputs import zero_inputs
from emp_callbacks.targets.units import UnitTarget

__all__ = ["ChannelCuts"]

_GIVEN_OUT = "the model gives its output out"
_UNREAD = "no layer that can be cut reads it"

_LAST = "a layer keeps one unit"


class ChannelCuts:
    """Which channels of a model can go, for any choice of its pruned layers.

    An output of a layer goes if all that reads it goes; an input goes if it is zero whatever the weights and every
    output that reaches it goes, one of a pruned unit among them. What does not hold is taken back until all holds.

    Args:
        model: The masked model, in evaluation mode.
        layers: Each layer with its pruned units, bool, shape (units,).
        cuttable: Modules that can be cut.
        run: Calls the model on the example, with other parameters if given `parameters`.
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
        self.rows = {target.name: _rows(model, target) for target, _ in layers}
        owners = {module for rows in self.rows.values() for module in rows}
        self.passing = {module for module in cuttable if passes(module) and module not in owners}
        mixing = [m for m in model.modules() if (mixes(m) and m not in self.passing)]
        self.zeros = zero_inputs(model, run)
        self.links = channel_links(model, run, mixing, self.passing, owners)

    def plan(self, names: Sequence[str], surgery: Surgery, most: Mapping[str, int] | None = None) -> list[ShrunkLayer]:
        """Add to `surgery` what the pruned units of some layers take with them, and return what becomes of each.

        Args:
            names: The layers.
            surgery: Is changed.
            most: Layer -> how many of its units may go at most.
        """
        plan = _Plan(self, names, most or {})
        plan.settle()
        for module, axis, gone in plan.cuts():
            surgery.setdefault(self.names[module], {})[axis] = cut_of(~gone)
        return [plan.report(name) for name in names]

    def label(self, module: nn.Module) -> str:
        return f"{self.names[module]!r} ({type(module).__name__})"


class _Plan:
    """The channels that go, for some of the layers.

    Attributes:
        going: Layer -> bool, shape (outputs,).
        causes: Layer -> why outputs of pruned units stay, with their number.
    """

    def __init__(self, cuts: ChannelCuts, names: Sequence[str], most: Mapping[str, int]) -> None:
        self.of, self.names, self.most = cuts, names, most
        self.causes: dict[nn.Module, Counter[str]] = {}
        self.pruned = {
            module: (unit_of >= 0) & cuts.pruned[name][unit_of]
            for name in names
            for module, unit_of in cuts.rows[name].items()
        }
        self.going = {module: gone.clone() for module, gone in self.pruned.items()}
        self.read = {module: torch.zeros_like(gone) for module, gone in self.pruned.items()}
        others = {module for rows in cuts.rows.values() for module in rows}
        for read in cuts.links.reads:
            for layer, mixed in read.mixed.items():
                # What only serves pruned channels, such as their rows in an excitation, goes with them.
                free = layer in cuts.cuttable and layer not in others
                self.going.setdefault(layer, torch.full_like(mixed, free))
                reached = self.read.setdefault(layer, torch.zeros_like(mixed))
                if read.module not in cuts.passing:
                    reached |= mixed
                    reached[read.sources[layer][0]] = True
        self.reads: dict[nn.Module, list[Read]] = {}
        for read in cuts.links.reads:
            self.reads.setdefault(read.module, []).append(read)

    def settle(self) -> None:
        """Take back what cannot go until all of the rest can."""
        for module in self.pruned:
            if module not in self.of.cuttable or "outputs" not in axes_of(module):
                self._stay(module, True, why_whole(module))
        for layer, hit in self.of.links.given_out.items():
            self._stay(layer, hit, _GIVEN_OUT)
        for layer, read in self.read.items():
            self._stay(layer, ~read, _UNREAD)
        left = -1
        while left != (left := sum(int(gone.sum()) for gone in self.going.values())):
            for module in self.reads:
                self._input(module)
            for module in self.going:
                self._group_outputs(module)
            for name in self.names:
                self._whole_units(name)

    def _stay(self, layer: nn.Module, which: Tensor | bool, cause: str) -> None:
        if layer not in self.going:
            return
        back = self.going[layer] & which
        if back.any():
            self.going[layer] = self.going[layer] & ~back
            counted = int((back & self.pruned[layer]).sum()) if layer in self.pruned else 0
            self.causes.setdefault(layer, Counter())[cause] += counted

    # ---- what reads channels ---------------------------------------------------------------------------------------

    def gone_inputs(self, module: nn.Module) -> Tensor:
        """Return which inputs of a module go; bool, shape (inputs,)."""
        gone = ~self._kept(module)
        if groups_of(module) > 1 and module not in self.of.passing:
            gone &= ~self._uneven(gone, self._group_whole(module, gone), groups_of(module))
        return gone

    def _kept(self, module: nn.Module) -> Tensor:
        """Return which inputs of a module cannot go, whatever its groups."""
        reads = self.reads[module]
        kept = torch.zeros(reads[0].inputs, dtype=torch.bool)
        if len(reads) < self.of.links.calls[module] or self._whole(module):
            return ~kept
        if module not in self.of.passing:
            kept |= ~self.of.zeros[module]
        for read in reads:
            kept |= self._held_in(read) | self._alive(read) | ~self._reached(read)
        return kept

    def _whole(self, module: nn.Module) -> bool:
        passing = module in self.of.passing
        return not passing and (module not in self.of.cuttable or "inputs" not in axes_of(module))

    def _held_in(self, read: Read) -> Tensor:
        held = torch.zeros(read.inputs, dtype=torch.bool)
        for reached in read.held.values():
            held |= reached
        return held

    def _alive(self, read: Read) -> Tensor:
        """Return which inputs an output that stays reaches; bool, shape (inputs,)."""
        alive = torch.zeros(read.inputs, dtype=torch.bool)
        for layer, (outputs, inputs) in read.sources.items():
            alive[inputs[~self.going[layer][outputs]]] = True
        return alive | any(bool(mixed.any()) for mixed in read.mixed.values())

    def _reached(self, read: Read) -> Tensor:
        """Return which inputs an output of a pruned unit reaches; of what passes channels, any output."""
        reached = torch.zeros(read.inputs, dtype=torch.bool)
        for layer, (outputs, inputs) in read.sources.items():
            if read.module in self.of.passing:
                reached[inputs] = True
            elif layer in self.pruned:
                reached[inputs[self.pruned[layer][outputs]]] = True
        return reached

    def _input(self, module: nn.Module) -> None:
        """Take back the outputs that reach an input which stays."""
        kept, gone = self._kept(module), self.gone_inputs(module)
        for read in self.reads[module]:
            held = self._held_in(read)
            for layer, (outputs, inputs) in read.sources.items():

                def back(
                    which: Tensor, cause: str, layer: nn.Module = layer, at: Tensor = inputs, of: Tensor = outputs
                ) -> None:
                    hit = torch.zeros_like(self.going[layer])
                    hit[of[which[at]]] = True
                    self._stay(layer, hit, cause)

                if bool(held.any()):
                    back(held, self._passed(read))
                if bool((mixed := read.mixed[layer]).any()):
                    self._stay(layer, mixed, f"its channels are mixed before {self.of.label(module)} reads them")
                if self._whole(module):
                    back(kept, f"{self.of.label(module)} reads it: {why_whole(module)}")
                for other in read.sources:
                    if other is not layer:
                        alive = torch.zeros_like(kept)
                        theirs, at = read.sources[other]
                        alive[at[~self.going[other][theirs]]] = True
                        back(alive, f"joined with {self.of.label(other)}, which keeps these channels")
                if module not in self.of.passing and not self._whole(module):
                    back(~self.of.zeros[module], f"its zeros are other values where {self.of.label(module)} reads them")
                back(kept, f"{self.of.label(module)} reads it together with channels that stay")
                back(~gone, f"{groups_of(module)} groups in {self.of.label(module)} need equal counts")

    def _passed(self, read: Read) -> str:
        name = next(iter(read.held))
        owner = name.rpartition(".")[0]
        module = next((m for m, known in self.of.names.items() if known == owner), None)
        kind = type(module).__name__
        return f"its output passes {owner!r} ({kind}), which cannot be cut"

    # ---- groups and units ------------------------------------------------------------------------------------------

    def _group_whole(self, module: nn.Module, gone: Tensor | None) -> Tensor:
        """Return which groups of a convolution go as a whole, inputs and outputs; bool, shape (groups,)."""
        groups = groups_of(module)
        if gone is None or module not in self.going:
            return torch.zeros(groups, dtype=torch.bool)
        whole = gone.reshape(groups, -1).all(1) & self.going[module].reshape(groups, -1).all(1)
        if whole.all():
            whole[0] = False
        return whole

    @staticmethod
    def _uneven(gone: Tensor, whole: Tensor, groups: int) -> Tensor:
        """Return what goes beyond the count that all groups share, but for whole groups; bool, shape (channels,)."""
        by_group = gone.reshape(groups, -1)
        shared = min(int(by_group[~whole].sum(1).min()), by_group.shape[1] - 1)
        return (by_group & (by_group.cumsum(1) > shared) & ~whole[:, None]).flatten()

    def _group_outputs(self, module: nn.Module) -> None:
        groups = groups_of(module)
        if groups > 1 and module not in self.of.passing:
            gone = self.gone_inputs(module) if module in self.reads else None
            uneven = self._uneven(self.going[module], self._group_whole(module, gone), groups)
            self._stay(module, uneven, f"its {groups} groups need equal counts")

    def _whole_units(self, name: str) -> None:
        """Take back units of which a part stays, a layer's last unit, and what is more than may go."""
        rows = self.of.rows[name]
        gone = self._gone_units(name)
        if gone.all():
            self._keep(rows, torch.arange(len(gone)) == 0, _LAST)
        if name in self.most and (excess := gone & (gone.cumsum(0) > self.most[name])).any():
            self._keep(rows, excess, FOR_EQUAL_SIZES)
        self._keep(rows, ~self._gone_units(name), "a part of its unit stays")

    def _gone_units(self, name: str) -> Tensor:
        gone = self.of.pruned[name].clone()
        for module, unit_of in self.of.rows[name].items():
            gone[unit_of[(unit_of >= 0) & ~self.going[module]]] = False
        return gone

    def _keep(self, rows: Mapping[nn.Module, Tensor], units: Tensor, cause: str) -> None:
        for module, unit_of in rows.items():
            self._stay(module, (unit_of < 0) | units[unit_of], cause)

    # ---- the result ------------------------------------------------------------------------------------------------

    def cuts(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Yield modules with the axis along which they are cut, and bool what goes, shape (size of the axis,)."""
        for layer, gone in self.going.items():
            if gone.any():
                yield layer, "outputs", gone
        for module in self.reads:
            if (gone := self.gone_inputs(module)).any():
                yield module, "outputs" if module in self.of.passing else "inputs", gone

    def report(self, name: str) -> ShrunkLayer:
        pruned, gone = self.of.pruned[name], self._gone_units(name)
        causes: Counter[str] = Counter()
        for module in self.of.rows[name]:
            causes += self.causes.get(module, Counter())
        reason = "; ".join(cause for cause, _ in causes.most_common(2)) if int(gone.sum()) < int(pruned.sum()) else None
        return ShrunkLayer(name, len(pruned), int(pruned.sum()), int(gone.sum()), reason)


def _rows(model: nn.Module, target: UnitTarget) -> dict[nn.Module, Tensor]:
    """Return the unit of each output of the target's layers; int64, shape (outputs,)."""
    return {
        model.get_submodule(member.weight.name.rpartition(".")[0]): member.unit_of
        for member in target.members
        if member.role == "weight"
    }

"""What pruned neurons and channels take with them, and why some of them stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.channel_facts import ChannelFacts
from emp_callbacks.shrinking.links import Read
from emp_callbacks.shrinking.regroup import Axis, Packing, packed
from emp_callbacks.shrinking.report import FOR_EQUAL_SIZES, ShrunkLayer
from emp_callbacks.shrinking.surgery import Cut, Surgery, axes_of, axis_size, cut_of, groups_of, why_whole

__all__ = ["cut_channels"]

_GIVEN_OUT = "the model gives its output out"
_UNREAD = "no layer that can be cut reads it"
_LAST = "a layer keeps one unit"


def cut_channels(
    facts: ChannelFacts, names: Sequence[str], surgery: Surgery, most: Mapping[str, int] | None = None
) -> list[ShrunkLayer]:
    """Add to `surgery` what the pruned units of some layers take with them, and return what becomes of each layer.

    An output of a layer goes if all that reads it goes; an input goes if it is zero whatever the weights and every
    output that reaches it goes, one of a pruned unit among them. What does not hold is taken back until all holds.

    Args:
        facts: What is known of the model's channels.
        names: The layers.
        surgery: Is changed.
        most: Layer -> how many of its units may go at most.
    """
    search = _Search(facts, names, most or {})
    search.settle()
    for module, axis, cut in search.cuts():
        surgery.setdefault(facts.names[module], {})[axis] = cut
    return [search.report(name) for name in names]


class _Search:
    """The channels that go, for some of the layers.

    Attributes:
        going: Layer -> bool, shape (outputs,).
        packings: Grouped convolution -> its new groups.
        filled: Grouped convolution -> bool, shape (inputs,): inputs that are alive or fill its groups up.
        causes: Layer -> why outputs of pruned units stay, with their number.
    """

    def __init__(self, facts: ChannelFacts, names: Sequence[str], most: Mapping[str, int]) -> None:
        self.of, self.names, self.most = facts, names, most
        self.causes: dict[nn.Module, Counter[str]] = {}
        self.pruned = {
            module: (unit_of >= 0) & facts.pruned[name][unit_of]
            for name in names
            for module, unit_of in facts.rows[name].items()
        }
        self.going = {module: gone.clone() for module, gone in self.pruned.items()}
        self.read = {module: torch.zeros_like(gone) for module, gone in self.pruned.items()}
        others = {module for rows in facts.rows.values() for module in rows}
        for read in facts.links.reads:
            for layer, mixed in read.mixed.items():
                # What only serves pruned channels, such as their rows in an excitation, goes with them.
                free = layer in facts.cuttable and layer not in others
                self.going.setdefault(layer, torch.full_like(mixed, free))
                reached = self.read.setdefault(layer, torch.zeros_like(mixed))
                if read.module not in facts.passing:
                    reached |= mixed
                    reached[read.sources[layer][0]] = True
        self.packings: dict[nn.Module, Packing] = {}
        self.filled: dict[nn.Module, Tensor] = {}
        self.reads: dict[nn.Module, list[Read]] = {}
        for read in facts.links.reads:
            self.reads.setdefault(read.module, []).append(read)

    def settle(self) -> None:
        """Take back what cannot go until all of the rest can."""
        for module in self.going:
            if module not in self.of.cuttable or "outputs" not in axes_of(module):
                self._stay(module, True, f"{self.of.label(module)} cannot be cut: {why_whole(module)}")
        for layer, hit in self.of.links.given_out.items():
            self._stay(layer, hit, _GIVEN_OUT)
        for layer, read in self.read.items():
            self._stay(layer, ~read, _UNREAD)
        grouped = [m for m in {**self.going, **self.reads} if groups_of(m) > 1]
        grouped = [m for m in grouped if m in self.of.cuttable and m not in self.of.passing]
        self._take_back()
        while [module for module in grouped if self._pack(module)]:
            self._take_back()

    def _left(self) -> int:
        return sum(int(gone.sum()) for gone in self.going.values())

    def _take_back(self) -> None:
        left = -1
        while left != (left := self._left()):
            for module in self.reads:
                self._input(module)
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

    def _kept(self, module: nn.Module) -> Tensor:
        """Return which inputs of a module cannot go, whatever its groups."""
        reads = self.reads[module]
        kept = torch.zeros(reads[0].inputs, dtype=torch.bool)
        if len(reads) < self.of.links.calls[module] or self._whole(module):
            return ~kept
        if module not in self.of.passing:
            kept |= ~self.of.zeros[module] | self.filled.get(module, torch.tensor(False))
        for read in reads:
            kept |= self._held_in(read) | self._alive(read) | ~self._reached(read)
        return kept

    def _whole(self, module: nn.Module) -> bool:
        if module in self.of.passing:
            return False
        return module not in self.of.cuttable or "inputs" not in axes_of(module)

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
        kept = self._kept(module)
        for read in self.reads[module]:
            for layer, mixed in read.mixed.items():
                if (mixed & self.going[layer]).any():
                    self._stay(layer, mixed, self._why_mixed(read))
            for layer, (outputs, inputs) in read.sources.items():
                if not (self.going[layer][outputs] & kept[inputs]).any():
                    continue
                for which, cause in self._why_kept(module, read, layer):
                    hit = torch.zeros_like(self.going[layer])
                    hit[outputs[(which & kept)[inputs]]] = True
                    self._stay(layer, hit, cause)

    def _why_kept(self, module: nn.Module, read: Read, layer: nn.Module) -> Iterator[tuple[Tensor, str]]:
        """Yield which inputs stay, and why, said of a layer that reaches them: the first that holds counts."""
        label, everything = self.of.label(module), torch.ones(read.inputs, dtype=torch.bool)
        for name, reached in read.held.items():
            yield reached, self._passed(name)
        if self._whole(module):
            yield everything, f"{label} reads it: {why_whole(module)}"
        for other, (outputs, inputs) in read.sources.items():
            alive = torch.zeros(read.inputs, dtype=torch.bool)
            alive[inputs[~self.going[other][outputs]]] = True
            if other is not layer:
                yield alive, f"joined with {self.of.label(other)}, which keeps these channels"
        if module in self.filled:
            yield self.filled[module], self._uneven(module)
        if module in self.of.zeros:
            behind = self._behind(read, layer)
            yield ~self.of.zeros[module], f"its zeros are other values where {label} reads them{behind}"
        yield everything, f"{label} reads it together with channels that stay"

    def _behind(self, read: Read, layer: nn.Module) -> str:
        """Return what a layer's outputs pass last on their way, and what else reaches the same inputs."""
        before = takewhile(lambda other: other is not read, self.of.links.reads)
        passed = [other.module for other in before if other.module in self.of.passing and layer in other.sources]
        joined = [other for other in read.sources if other is not layer and other not in self.pruned]
        behind = f", behind {self.of.label(passed[-1])}" if passed else ""
        return behind + (f", joined with {self.of.label(joined[0])}" if joined else "")

    def _why_mixed(self, read: Read) -> str:
        if read.held:
            return self._passed(next(iter(read.held)))
        return f"its channels are mixed before {self.of.label(read.module)} reads them"

    def _passed(self, parameter: str) -> str:
        owner = parameter.rpartition(".")[0]
        kind = next(type(module).__name__ for module, name in self.of.names.items() if name == owner)
        return f"its output passes {owner!r} ({kind}), which needs all of its channels"

    # ---- groups and units ------------------------------------------------------------------------------------------

    def _pack(self, module: nn.Module) -> bool:
        """Choose new groups of a convolution, take back the outputs that fill them up, and return whether any did."""
        groups, inputs = groups_of(module), int(module.in_channels)  # type: ignore[arg-type]
        kept = self._kept(module) if module in self.reads else torch.ones(inputs, dtype=torch.bool)
        alive = kept, ~self.going.get(module, torch.zeros(axis_size(module, "outputs"), dtype=torch.bool))
        if all(bool(side.all()) for side in alive):
            self.packings.pop(module, None)
            return False
        if (old := self.packings.get(module)) and _as_packed(old, alive):
            return False
        own_inputs, own_outputs = (
            sum(_weights(other) / axis_size(other, axis) for other, axis in axes if other is not module)
            for axes in self.of.grouped.get(module, ((), ()))
        )

        def cost(count: int, ins: int, outs: int) -> float:
            pairs = ins * outs * groups / (count * inputs * len(alive[1]))
            return pairs * _weights(module) + ins * own_inputs + outs * own_outputs

        by_group = [side.reshape(groups, -1) for side in alive]
        packing = packed(by_group[0], by_group[1], cost, join=module in self.of.grouped)
        self.packings[module] = packing
        self.filled[module] = kept.index_fill(0, torch.tensor(packing.inputs), True)
        filling = torch.zeros_like(alive[1]).index_fill(0, torch.tensor(packing.outputs), True)
        self._stay(module, filling, self._uneven(module))
        return True

    def _uneven(self, module: nn.Module) -> str:
        return f"the {groups_of(module)} groups of {self.of.label(module)} need equal counts"

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

    def cuts(self) -> Iterator[tuple[nn.Module, str, Cut]]:
        """Yield modules with the axis along which they are cut, and what is left of it."""
        order: dict[Axis, list[int]] = {}
        for module, packing in self.packings.items():
            inputs, outputs = self.of.grouped.get(module, ((), ()))
            order |= dict.fromkeys(inputs, packing.inputs) | dict.fromkeys(outputs, packing.outputs)
            yield module, "groups", Cut(groups_of(module), list(range(packing.groups)))
        gone: dict[Axis, Tensor] = {(layer, "outputs"): going for layer, going in self.going.items()}
        for module in self.reads:
            gone[module, "outputs" if module in self.of.passing else "inputs"] = ~self._kept(module)
        for axis, lost in gone.items():
            if lost.any() or axis in order:
                yield *axis, Cut(len(lost), order[axis]) if axis in order else cut_of(~lost)

    def report(self, name: str) -> ShrunkLayer:
        pruned, gone = self.of.pruned[name], self._gone_units(name)
        causes: Counter[str] = Counter()
        for module in self.of.rows[name]:
            causes += self.causes.get(module, Counter())
        reason = "; ".join(cause for cause, _ in causes.most_common(2)) if int(gone.sum()) < int(pruned.sum()) else None
        return ShrunkLayer(name, len(pruned), int(pruned.sum()), int(gone.sum()), reason)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _as_packed(packing: Packing, alive: tuple[Tensor, Tensor]) -> bool:
    left = packing.inputs, packing.outputs
    return all(sorted(own) == kept.nonzero().flatten().tolist() for own, kept in zip(left, alive, strict=True))

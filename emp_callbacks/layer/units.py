"""Heads, neurons, nodes: units that are made of slices of several parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.layer.base import Batches, Layer, PerWeight, check_gathered, no_gradient
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.layer.observers import Observer
from emp_callbacks.layer.segment import Segment, Span
from emp_callbacks.layer.shared_sums import Parts, Ranks
from emp_callbacks.targets.units import Role


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """This rank's part of a parameter that has slices in the units of a layer; see `targets.units.MemberTarget`."""

    segment: Segment
    dims: tuple[int, ...]
    unit_of: Tensor
    masked: bool
    scored: bool
    role: Role
    _unit_there: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def sums(self, values: Tensor, units: int, rank: int) -> Tensor:
        """Return the part of this rank in the sum of `values` over each unit, shape (units,), float64, on their device.

        Args:
            values: Layout of `segment.weight`.
            units: Number of units.
            rank: Where every rank holds the parameter, rank 0 alone counts it.
        """
        total = torch.zeros(units + 1, dtype=torch.float64, device=values.device)
        unit_of = self._unit_on(values.device, units)
        if not self.segment.replicated:
            part = self.segment.counted
            along = self.segment.indices_along(*self.dims)[part]
            total.index_add_(0, unit_of[along], values.reshape(-1)[part].double())
        elif rank == 0:
            others = [dim for dim in range(values.ndim) if dim not in self.dims]
            slices = (values.sum(others, dtype=torch.float64) if others else values.double()).reshape(-1)
            total.index_add_(0, unit_of, slices)
        return total[:units]

    def _unit_on(self, device: torch.device, units: int) -> Tensor:
        """Return the unit of each slice, `units` for none, on a device; it stays there, or every step would send it."""
        if device not in self._unit_there:
            self._unit_there[device] = to_device(torch.where(self.unit_of < 0, units, self.unit_of), device)
        return self._unit_there[device]

    def sizes(self, units: int) -> Tensor:
        """Return how many weights of the full parameter each unit has, shape (units,), float64."""
        per_slice = self.segment.size // len(self.unit_of)
        return per_slice * torch.bincount(self.unit_of[self.unit_of >= 0], minlength=units).double()

    def mask(self, kept: Tensor) -> Tensor:
        """Return the mask of the segment, its layout, where a mask over units, shape (units,), says what stays."""
        weight = self.segment.weight
        and_none = torch.cat([to_device(kept, weight.device), torch.ones(1, dtype=torch.bool, device=weight.device)])
        along = and_none[self._unit_on(weight.device, len(kept))]
        mask = torch.empty_like(weight, dtype=torch.bool)
        if weight.shape != self.segment.shape:
            return mask.copy_(along[self.segment.indices_along(*self.dims)])
        return mask.copy_(along.view([size if dim in self.dims else 1 for dim, size in enumerate(weight.shape)]))


Chosen = Callable[[Member], bool]


def _scored(member: Member) -> bool:
    return member.scored


@final
class UnitLayer(Layer):
    """Heads, neurons or nodes of one module: units made of slices of several parameters.

    Args:
        name: Name of the module.
        units: Number of units.
        members: This rank's parts of the parameters.
        ranks: The job's processes.
        activations: Observer of the units' activations, for criteria that ask for it.
        least: Units that stay in any case.
    """

    def __init__(
        self,
        name: str,
        units: int,
        members: Sequence[Member],
        ranks: Ranks,
        activations: Observer | None = None,
        least: int = 1,
    ) -> None:
        super().__init__(ranks)
        self.units, self.members, self.least = units, list(members), least
        self.activations = activations
        self.sites = [activations] if activations is not None else []
        self._masking = [member for member in self.members if member.masked]
        self.weights = [MaskedWeight(member.segment) for member in self._masking]
        chunk = slice(units * ranks.rank // ranks.world_size, units * (ranks.rank + 1) // ranks.world_size)
        self._span = Span(
            name=name,
            shape=torch.Size([units]),
            output_dim=0,
            positions=0,
            replicated=True,
            counted=chunk,
            is_summed=True,
        )
        self._mask: Tensor | None = None
        self._batches: dict[int, Tensor] = {}
        self._folded: Tensor | None = None

    @property
    def span(self) -> Span:
        return self._span

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        self._mask = mask
        return [member.mask(mask) for member in self._masking]

    def put_back(self, mask: Tensor | None, mean: Tensor | None) -> None:  # noqa: ARG002
        self._mask = mask

    def _ones(self) -> Tensor:
        return torch.ones(self.units, dtype=torch.bool)

    def unit_sums(self, per_weight: Callable[[Tensor], Tensor], of: Chosen = _scored) -> Tensor:
        """Return the sum of `per_weight` over each unit, shape (units,), float64. Collective.

        Args:
            per_weight: Takes a parameter's values and returns a tensor of the same shape.
            of: Which members; default: those that are scored.
        """

        def parts() -> Parts:
            own = [m.sums(per_weight(m.segment.weight), self.units, self.ranks.rank) for m in self.members if of(m)]
            nothing = torch.zeros(self.units, dtype=torch.float64, device=self.members[0].segment.weight.device)
            return {"sums": sum((to_device(part, nothing.device) for part in own), nothing)}

        return self.asking.sums(parts)["sums"]

    def unit_sizes(self, of: Chosen = _scored) -> Tensor:
        """Return how many weights `unit_sums` adds up for each unit, shape (units,), float64."""
        sizes = [member.sizes(self.units) for member in self.members if of(member)]
        return sum(sizes, torch.zeros(self.units, dtype=torch.float64))

    def gather(self, owners: Collection[int], batch: int, per_weight: PerWeight) -> None:
        for member in self._masking:
            gradient = member.segment.gradient
            if id(member.segment.owner) in owners and gradient is not None:
                values = per_weight(member.segment.weight, gradient)
                part = member.sums(values, self.units, self.ranks.rank)
                self._batches[batch] = self._batches[batch] + part if batch in self._batches else part

    def evidence(self, batches: Batches) -> Tensor:
        """Return mean over batches of |sum of per_weight over what pruning the unit zeroes|, or the mean |a|."""
        if self.activations is not None:
            sizes, count = self._observed(self.activations, "activations")
            return sizes / count.clamp(min=1.0)  # 0 of an expert that no token reached
        sizes = self._sums(batches)[0]
        if not bool(sizes.any()):
            raise no_gradient(self.name)
        return sizes / batches.total

    def signed_mean(self, batches: Batches) -> Tensor:
        """Return the mean over batches of the sum of per_weight over what pruning each unit zeroes. Collective.

        Shape (units,), float64; `evidence` is the mean of its size.

        Raises:
            MissingEvidence: No batch was gathered.
        """
        return self._sums(batches)[1] / batches.total

    def _sums(self, batches: Batches) -> Tensor:
        """Return the sums over batches of each unit's |sum| and of its signed sum, shape (2, units). Collective."""
        check_gathered(self.name, batches)
        kept_apart = self._over_ranks(batches.steps).cpu()
        return kept_apart if self._folded is None else self._folded.cpu() + kept_apart

    def _over_ranks(self, steps: Sequence[int]) -> Tensor:
        device = self._masking[0].segment.weight.device
        nothing = torch.zeros(self.units, dtype=torch.float64, device=device)
        parts = [self._batches.get(step, nothing).to(device) for step in steps]
        if not parts:
            return torch.zeros(2, self.units, dtype=torch.float64, device=device)
        # abs after the sum over ranks: a unit whose slices lie on several ranks has one sum per batch
        signed = self.asking.sums(lambda: {"signed": torch.stack(parts)})["signed"]
        return torch.stack([signed.abs().sum(0), signed.sum(0)])

    def fold(self, batches: Sequence[int]) -> None:
        sums = self._over_ranks(batches)
        self._folded = sums if self._folded is None else self._folded.to(sums.device) + sums
        self._batches = {step: part for step, part in self._batches.items() if step not in batches}

    def release(self) -> None:
        self._batches, self._folded = {}, None

    @property
    def gathered(self) -> dict[int, Tensor]:
        """Optimizer step -> this rank's part of the sums of `gather`."""
        return self._batches

    @gathered.setter
    def gathered(self, value: dict[int, Tensor]) -> None:
        self._batches = value

    @property
    def folded(self) -> Tensor | None:
        """Sums over the folded batches of |sum| and of the signed sum, shape (2, units), the same on every rank."""
        return self._folded

    @folded.setter
    def folded(self, value: Tensor | None) -> None:
        self._folded = value

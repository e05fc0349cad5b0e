"""What one row of the layer table is about: the components of a parameter, of an attention, of a module's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from emp_callbacks.mask_mode import MaskedWeight
from emp_callbacks.observers import ActivationSizes, InputSquares, Observer
from emp_callbacks.segment import Segment, Span
from emp_callbacks.targets.features import FeatureSite
from emp_callbacks.targets.forward_site import ForwardSite

PerWeight = Callable[[Tensor, Tensor], Tensor]
"""What a gradient criterion makes of a weight and its gradient in one batch; same shape."""


class Ranks(Protocol):
    """What a decision needs to know of the job's processes; every backend offers it."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks. Collective."""

    def from_all(self, value: Tensor) -> Tensor:
        """Return the `value` of every rank, shape (world_size, *value.shape). Collective."""


class Layer(ABC):
    """Components that are scored together and compete with those of other layers.

    Attributes:
        weights: The masked parameters that the layer's mask decides on; none where a module's output is masked.
        sites: Hooks on modules that gather evidence for this layer, or mask its module's output.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.weights: list[MaskedWeight] = []
        self.sites: list[ForwardSite] = []

    @property
    @abstractmethod
    def span(self) -> Span:
        """Where this rank's components lie in the layer."""

    @property
    @abstractmethod
    def mask(self) -> Tensor | None:
        """This rank's part of the mask, bool, True = kept; None before the first refresh."""

    @abstractmethod
    def put_mask(self, mask: Tensor) -> list[Tensor]:
        """Take a new mask and return what it means for each of `weights`, in their layouts."""

    def put_back(self, mask: Tensor, mean: Tensor | None) -> None:  # noqa: ARG002
        """Take a mask, and what pruned features become, as a checkpoint held them; `weights` get theirs elsewhere."""
        self.put_mask(mask)

    @property
    def name(self) -> str:
        """Name of the layer in the user's model."""
        return self.span.name

    @property
    def is_known(self) -> bool:
        """Whether the number of components is known: that of a module's features only once it was called."""
        return True

    @property
    def mask_or_ones(self) -> Tensor:
        """The mask; all True before the first refresh."""
        return self._ones() if self.mask is None else self.mask

    @abstractmethod
    def _ones(self) -> Tensor: ...

    # ---- evidence -------------------------------------------------------------------------------------------------

    def gather(self, owners: Collection[int], batch: int, per_weight: PerWeight) -> None:
        """Add what the gradients of one batch say.

        Args:
            owners: Ids of the tensors whose gradients are ready.
            batch: The optimizer step that they belong to.
            per_weight: Made of each weight and its gradient, then summed over the component.
        """

    @abstractmethod
    def evidence(self, batches: Sequence[int]) -> Tensor:
        """Return what was gathered, over all ranks: a number per component, same layout as `mask`. Collective.

        Args:
            batches: The optimizer steps whose gradients were gathered, the same on every rank.

        Raises:
            RuntimeError: Nothing was gathered.
        """

    def release(self) -> None:
        """Forget what was gathered."""
        for site in self.sites:
            site.reset()

    def _observed(self, observer: Observer, unseen: str) -> tuple[Tensor, float]:
        """Return an observer's sums and how many values went into each, over all ranks. Collective."""
        sums = self._summed(observer)
        if not bool(sums["count"] > 0):
            raise RuntimeError(
                f"nothing passed {observer.name!r} while {unseen} were gathered; no mask was changed. Run training "
                "steps before the refresh, make the pruner before a compiled model's first call, and exclude the "
                "module if it is never called as such"
            )
        return sums["total"], float(sums["count"])

    def _summed(self, site: ForwardSite) -> dict[str, Tensor]:
        """Return a site's statistics over all ranks, on the CPU. Collective."""
        return {key: self.ranks.all_sum(value).cpu() for key, value in sorted(site.statistics().items())}


@final
class WeightLayer(Layer):
    """Single weights of one parameter.

    Args:
        segment: This rank's part of the parameter.
        ranks: The job's processes.
        inputs: Observer of the inputs that the weights multiply, for criteria that ask for it.
    """

    def __init__(self, segment: Segment, ranks: Ranks, inputs: InputSquares | None = None) -> None:
        super().__init__(ranks)
        self.segment = segment
        self.weights = [MaskedWeight(segment)]
        self.inputs = inputs
        self.sites = [inputs] if inputs is not None else []
        self._sum: Tensor | None = None

    @property
    def span(self) -> Span:
        return self.segment

    @property
    def weight(self) -> Tensor:
        """The values outside autograd, dense while scores are taken; the full parameter's shape, a shard flat."""
        return self.segment.weight

    @property
    def mask(self) -> Tensor | None:
        return self.weights[0].mask

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        return [mask]

    def _ones(self) -> Tensor:
        return self.weights[0].mask_or_ones

    def gather(self, owners: Collection[int], batch: int, per_weight: PerWeight) -> None:  # noqa: ARG002
        gradient = self.segment.gradient
        if id(self.segment.owner) in owners and gradient is not None:
            values = per_weight(self.weight, gradient).abs()
            values = values if values.dtype == torch.float64 else values.float()
            self._sum = values if self._sum is None else self._sum.add_(values)

    def evidence(self, batches: Sequence[int]) -> Tensor:
        """Return mean over batches of |per_weight|, or the l2 norm of the input that each weight multiplies."""
        if self.inputs is not None:
            squares, _ = self._observed(self.inputs, "inputs")
            return self._spread(squares.sqrt().to(self.weight.device))
        _check_gathered(self.name, batches)
        if self._sum is None:  # this rank holds nothing of it, or no loss depends on it
            return torch.zeros_like(self.weight, dtype=torch.float32)
        return self._sum / len(batches)

    def release(self) -> None:
        super().release()
        self._sum = None

    @property
    def gathered(self) -> Tensor | None:
        """Sum over batches of what gradients said, layout of `weight`; None if there is nothing."""
        return self._sum

    @gathered.setter
    def gathered(self, value: Tensor | None) -> None:
        self._sum = value

    def _spread(self, norms: Tensor) -> Tensor:
        """Return for each weight the norm of its input, layout of `weight`."""
        segment = self.segment
        if segment.output_dim == 1:  # (input, output)
            return norms[segment.indices_along(0)].view(self.weight.shape)
        index = segment.indices_along(1)
        if norms.numel() != segment.shape[1]:  # grouped convolution: its rows read different channels
            per_group = segment.shape[0] // (norms.numel() // segment.shape[1])
            index = index + segment.indices_along(0) // per_group * segment.shape[1]
        return norms[index].view(self.weight.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """This rank's part of a parameter that has slices in the units of a layer; see `targets.units.MemberTarget`."""

    segment: Segment
    dim: int
    unit_of: Tensor
    masked: bool
    scored: bool
    role: Literal["weight", "bias", "scale", "shift", "input", "output"]

    def sums(self, values: Tensor, units: int, rank: int) -> Tensor:
        """Return the part of this rank in the sum of `values` over each unit, shape (units,), float64.

        Args:
            values: Layout of `segment.weight`.
            units: Number of units.
            rank: Where every rank holds the parameter, rank 0 alone counts it.
        """
        total = torch.zeros(units + 1, dtype=torch.float64, device=values.device)
        unit_of = torch.where(self.unit_of < 0, units, self.unit_of).to(values.device)
        if not self.segment.replicated:
            part = self.segment.counted
            along = self.segment.indices_along(self.dim)[part]
            total.index_add_(0, unit_of[along], values.reshape(-1)[part].double())
        elif rank == 0:
            others = [dim for dim in range(values.ndim) if dim != self.dim]
            slices = values.sum(others, dtype=torch.float64) if others else values.double()
            total.index_add_(0, unit_of, slices)
        return total[:units].cpu()

    def sizes(self, units: int) -> Tensor:
        """Return how many weights of the full parameter each unit has, shape (units,), float64."""
        per_slice = self.segment.size // self.segment.shape[self.dim]
        return per_slice * torch.bincount(self.unit_of[self.unit_of >= 0], minlength=units).double()

    def mask(self, kept: Tensor) -> Tensor:
        """Return the mask of the segment, its layout, where a mask over units, shape (units,), says what stays."""
        weight = self.segment.weight
        along = torch.cat([kept.cpu(), torch.ones(1, dtype=torch.bool)])[self.unit_of].to(weight.device)
        mask = torch.empty_like(weight, dtype=torch.bool)
        if weight.shape != self.segment.shape:
            return mask.copy_(along[self.segment.indices_along(self.dim)])
        return mask.copy_(along.view([-1 if dim == self.dim else 1 for dim in range(weight.ndim)]))


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
    """

    def __init__(
        self, name: str, units: int, members: Sequence[Member], ranks: Ranks, activations: ActivationSizes | None = None
    ) -> None:
        super().__init__(ranks)
        self.units, self.members = units, list(members)
        self.activations = activations
        self.sites = [activations] if activations is not None else []
        self._masking = [member for member in self.members if member.masked]
        self.weights = [MaskedWeight(member.segment) for member in self._masking]
        chunk = slice(units * ranks.rank // ranks.world_size, units * (ranks.rank + 1) // ranks.world_size)
        self._span = Span(
            name=name, shape=torch.Size([units]), output_dim=0, positions=0, replicated=True, counted=chunk
        )
        self._mask: Tensor | None = None
        self._batches: dict[int, Tensor] = {}

    @property
    def span(self) -> Span:
        return self._span

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        self._mask = mask
        return [member.mask(mask) for member in self._masking]

    def _ones(self) -> Tensor:
        return torch.ones(self.units, dtype=torch.bool)

    def unit_sums(self, per_weight: Callable[[Tensor], Tensor], of: Chosen = _scored) -> Tensor:
        """Return the sum of `per_weight` over each unit, shape (units,), float64. Collective.

        Args:
            per_weight: Takes a parameter's values and returns a tensor of the same shape.
            of: Which members; default: those that are scored.
        """
        parts = [m.sums(per_weight(m.segment.weight), self.units, self.ranks.rank) for m in self.members if of(m)]
        return self.ranks.all_sum(sum(parts, torch.zeros(self.units, dtype=torch.float64)))

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

    def evidence(self, batches: Sequence[int]) -> Tensor:
        """Return mean over batches of |sum of per_weight over what pruning the unit zeroes|, or the mean |a|."""
        if self.activations is not None:
            sizes, count = self._observed(self.activations, "activations")
            return sizes / count
        _check_gathered(self.name, batches)
        nothing = torch.zeros(self.units, dtype=torch.float64)
        # abs after the sum over ranks: a unit whose slices lie on several ranks has one sum per batch
        return self.ranks.all_sum(torch.stack([self._batches.get(b, nothing) for b in batches])).abs().mean(0)

    def release(self) -> None:
        super().release()
        self._batches = {}

    @property
    def gathered(self) -> dict[int, Tensor]:
        """Optimizer step -> this rank's part of the sums of `gather`."""
        return self._batches

    @gathered.setter
    def gathered(self, value: dict[int, Tensor]) -> None:
        self._batches = value


@final
class FeatureLayer(Layer):
    """Features of one module's output, masked in the forward pass.

    Args:
        site: The module and its hooks.
        ranks: The job's processes.
        applied: Whether masks reach the forward pass; False to measure only.
    """

    def __init__(self, site: FeatureSite, ranks: Ranks, *, applied: bool) -> None:
        super().__init__(ranks)
        self.site, self._applied = site, applied
        self.sites = [site]
        self._mask: Tensor | None = None
        self._mean: Tensor | None = None
        self._found_mean: Tensor | None = None

    @property
    def span(self) -> Span:
        size, rank, ranks = self.site.size, self.ranks.rank, self.ranks.world_size
        if size is None:
            raise RuntimeError(
                f"module {self.site.name!r} has not been called, so its features are not known; run training steps "
                "before the refresh, make the pruner before a compiled model's first call, or exclude the module"
            )
        counted = slice(size * rank // ranks, size * (rank + 1) // ranks)
        shape = torch.Size([size])
        return Span(name=self.site.name, shape=shape, output_dim=0, positions=0, replicated=True, counted=counted)

    @property
    def is_known(self) -> bool:
        return self.site.size is not None or self._mask is not None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    @property
    def mean(self) -> Tensor | None:
        """What pruned features become with `center="mean"`, shape (size,), float64; else None."""
        return self._mean

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        self.put_back(mask, self._found_mean)
        return []

    def put_back(self, mask: Tensor, mean: Tensor | None) -> None:
        self._mask, self._mean = mask, mean
        if self._applied:
            self.site.install(mask, mean)

    def _ones(self) -> Tensor:
        return torch.ones(self.span.size, dtype=torch.bool)

    def evidence(self, batches: Sequence[int]) -> Tensor:  # noqa: ARG002
        sums = self._summed(self.site)
        if not bool(sums["samples"] > 0):
            raise RuntimeError(
                f"nothing passed {self.name!r} since the last refresh; no mask was changed. Run training steps before "
                "the refresh (for taylor and saliency with backward), or exclude the module"
            )
        self._found_mean = self.site.means(sums) if self.site.form.center == "mean" else None
        return self.site.scores(sums)


def _check_gathered(name: str, batches: Sequence[int]) -> None:
    if not batches:
        raise RuntimeError(
            f"no gradients of {name!r} were gathered; no mask was changed. Run optimizer steps before the refresh; "
            "without an optimizer call collect() after each backward()"
        )

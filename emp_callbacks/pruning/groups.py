"""What a decision is made of: the scores of each layer, the rule of how many stay; and what it says of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, keep_counts
from emp_callbacks.core.group_pattern import GroupPattern
from emp_callbacks.core.row_parts import RowCuts
from emp_callbacks.core.threshold import ScoredPart, Threshold
from emp_callbacks.layer import Ranks
from emp_callbacks.layer.segment import Span


class Scored(NamedTuple):
    """The scores of one layer: this rank's components in their layout, either sign."""

    span: Span
    scores: Tensor

    @property
    def counted(self) -> ScoredPart:
        """The part of the scores that this rank counts, flat, and its place in the layer."""
        part = self.span.counted
        return ScoredPart(self.scores.reshape(-1)[part], self.span.positions_of(part))

    @property
    def all(self) -> ScoredPart:
        """All of this rank's scores, flat, and their place in the layer."""
        return ScoredPart(self.scores.reshape(-1), self.span.positions)


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """How many components of a group stay: floor(beta * N_eff), or a fixed fraction.

    Attributes:
        beta: Factor on N_eff.
        density: Fixed fraction instead.
        min_density: Fraction of a group that stays in any case.
        min_units: Components of each layer that stay in any case, where layers compete with each other.
        least: Components of a group that stay in any case.
        tolerance: Added to beta * N_eff before the floor, in components.
        densities: Fixed fraction of single groups, by name, in place of `density`.
        pattern: N of every M instead, each M a group of its own.
        found: Whether all stay that are not 0, and nothing else counts.
        floors: Components of single layers that stay in any case, by name.
    """

    beta: float = 1.0
    density: float | None = None
    min_density: float = 0.0
    min_units: int = 0
    least: int = 1
    tolerance: float = 0.0
    densities: Mapping[str, float] = field(default_factory=dict)
    pattern: GroupPattern | None = None
    found: bool = False
    floors: Mapping[str, int] = field(default_factory=dict)

    def of_group(self, name: str) -> KeepRule:
        """Return the rule of one group."""
        density = self.densities.get(name, self.density)
        return replace(self, density=density, least=self.floors.get(name, self.least))

    def floor(self, name: str) -> int:
        """Return how many components of a layer stay in any case, where layers compete with each other."""
        return max(self.min_units, self.floors.get(name, 0))

    def share(self, fraction: Tensor) -> Tensor:
        """Return about which fraction of a group stays, whose N_eff is a `fraction` of its size."""
        share = self.beta * fraction if self.density is None else torch.full_like(fraction, self.density)
        return share.clamp(min=self.min_density, max=1.0)

    def counts(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        """Return the keep counts of G groups of `size` components, shape (G,), int64.

        Zeros are never kept to fill a quota; a group whose scores are all 0 says nothing and is kept whole, unless
        zeros are what is looked for.
        """
        if self.found:
            return nonzero.long()
        wanted, beta = (n_eff, self.beta) if self.density is None else (torch.full_like(n_eff, size), self.density)
        least = max(self.least, math.ceil(self.min_density * size * (1 - 1e-12)))
        wanted = wanted + (self.tolerance / beta if beta else 0.0)  # a layer may have a share of 0
        return keep_counts(wanted, nonzero, beta, least).masked_fill(nonzero == 0, size)


class LayerSums(NamedTuple):
    """N_eff of one layer's scores, in components, and their mass, in units of the score; over all ranks."""

    n_eff: float
    mass: float


class Cut(NamedTuple):
    """What alone decides a layer's mask: a threshold on the scores of its part of the group."""

    threshold: Threshold
    part: ScoredPart


@dataclass(frozen=True)
class Decision:
    """What one group keeps.

    Attributes:
        group: "global" or the name of the layer.
        members: Indices of the group's layers in the list that was decided on.
        n: Components in the group.
        n_eff: Effective number, in components; with `scope="row"` the sum over rows.
        keep: Keep count, with `scope="row"` the sum over rows.
        threshold: Lowest kept score.
        layer_sums: Each member's own.
        digest: Of what decides the masks; every rank must have the same.
        note: What was out of the ordinary; empty if nothing.
        is_top: Whether exactly the `keep` highest are kept; False where a layer's guard changed that.
        mass_floor: Lower bound on the share of the score mass that is kept; None where none holds.
        mask: Member index -> mask, layout of that layer's scores, bool, True = kept.
        cut: Member index -> what alone decides that mask; None where more does.
    """

    group: str
    members: tuple[int, ...]
    n: int
    n_eff: float
    keep: int
    threshold: float
    layer_sums: tuple[LayerSums, ...]
    digest: int
    note: str
    is_top: bool
    mass_floor: float | None
    mask: Callable[[int], Tensor]
    cut: Callable[[int], Cut | RowCuts] | None = None


def sums_of_layers(moments: ScoreMoments) -> list[LayerSums]:
    """Return N_eff and mass of each layer from its moments over all ranks, shape (L,)."""
    return [LayerSums(*sums) for sums in torch.stack([effective_numbers(moments), moments.total], 1).tolist()]


def check_finite(local: Tensor, sums: Tensor, layers: Sequence[Scored], ranks: Ranks, step: int) -> None:
    """Raise FloatingPointError, on all ranks, where a layer's moments, shape (L, 3), show a score that is not finite.

    Args:
        local: The moments of what this rank counts of each layer.
        sums: The same over all ranks.
        layers: The scores.
        ranks: Asked, where there is something to tell, which of them has it.
        step: Optimizer step, for the message.
    """
    broken = ~torch.isfinite(sums[:, 0])
    if bool(broken.any()):
        seen = ranks.from_all((~torch.isfinite(local[:, 0])).long().cpu())
        where = "; ".join(
            f"{layers[i].span.name!r} (rank {', '.join(map(str, seen[:, i].nonzero().flatten().tolist()))})"
            for i in broken.nonzero().flatten().tolist()
        )
        raise FloatingPointError(
            f"NaN or Inf in the scores of {where} at step {step}; no mask was changed. The run has diverged: lower the "
            "learning rate, clip gradients, or go back to the last checkpoint; or a criterion of your own divides by 0"
        )

"""From scores to masks: moments, N_eff, keep counts and thresholds of every group, before anything is changed."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import tight_mass_bound, tight_mass_bounds
from emp_callbacks.core.effective_number import (
    ScoreMoments,
    effective_numbers,
    keep_counts,
    key_dtype,
)
from emp_callbacks.core.row_selection import find_rows, row_sums, top_rows
from emp_callbacks.core.search import Search, search_of
from emp_callbacks.core.threshold import Group, ScoredPart, Threshold, find_thresholds, local_sum
from emp_callbacks.layer import Ranks
from emp_callbacks.layer.row_layout import row_layout
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
        tolerance: Added to beta * N_eff before the floor, in components.
        densities: Fixed fraction of single groups, by name, in place of `density`.
    """

    beta: float = 1.0
    density: float | None = None
    min_density: float = 0.0
    min_units: int = 0
    tolerance: float = 0.0
    densities: Mapping[str, float] = field(default_factory=dict)

    def of_group(self, name: str) -> KeepRule:
        """Return the rule of one group."""
        return replace(self, density=self.densities[name]) if name in self.densities else self

    def share(self, fraction: Tensor) -> Tensor:
        """Return about which fraction of a group stays, whose N_eff is a `fraction` of its size."""
        share = self.beta * fraction if self.density is None else torch.full_like(fraction, self.density)
        return share.clamp(min=self.min_density, max=1.0)

    def counts(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        """Return the keep counts of G groups of `size` components, shape (G,), int64.

        Zeros are never kept to fill a quota; a group whose scores are all 0 says nothing and is kept whole.
        """
        wanted, beta = (n_eff, self.beta) if self.density is None else (torch.full_like(n_eff, size), self.density)
        least = max(1, math.ceil(self.min_density * size * (1 - 1e-12)))
        wanted = wanted + (self.tolerance / beta if beta else 0.0)  # a layer may have a share of 0
        return keep_counts(wanted, nonzero, beta, least).masked_fill(nonzero == 0, size)


class LayerSums(NamedTuple):
    """N_eff of one layer's scores, in components, and their mass, in units of the score; over all ranks."""

    n_eff: float
    mass: float


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


def decide(layers: Sequence[Scored], scope: str, rule: KeepRule, ranks: Ranks, step: int) -> list[Decision]:
    """Return one decision per group. Collective; changes nothing.

    Args:
        layers: The scores of every layer, in the same order on every rank.
        scope: "global": one group; "tensor" or "row": one group per layer.
        rule: How many to keep.
        ranks: Who counts what.
        step: Optimizer step, for error messages.

    Raises:
        FloatingPointError: A score is NaN or Inf, on any rank; names layer, step and ranks.
    """
    if scope == "row":
        rows = [_local_row_sums(layer) for layer in layers]
        moments = _layer_moments(torch.stack([of_layer.sum(0) for of_layer in rows]), layers, ranks, step)
        own = _layer_sums(moments)
        return [_decide_rows(i, layer, rule, rows[i], own[i], ranks) for i, layer in enumerate(layers)]
    return _decide_pooled(layers, scope, rule, ranks, step)


def _layer_sums(moments: ScoreMoments) -> list[LayerSums]:
    return [LayerSums(*sums) for sums in torch.stack([effective_numbers(moments), moments.total], 1).tolist()]


def _layer_moments(local: Tensor, layers: Sequence[Scored], ranks: Ranks, step: int) -> ScoreMoments:
    """Return the moments of each layer, shape (L,), over all ranks from those of this rank, (L, 3). Collective."""
    sums = ranks.all_sum(local).cpu()
    broken = ~torch.isfinite(sums[:, 0])
    if bool(broken.any()):
        seen = ranks.from_all((~torch.isfinite(local[:, 0])).long().cpu())
        where = "; ".join(
            f"{layers[i].span.name!r} (rank {', '.join(map(str, seen[:, i].nonzero().flatten().tolist()))})"
            for i in broken.nonzero().flatten().tolist()
        )
        raise FloatingPointError(
            f"NaN or Inf in the scores of {where} at step {step}; no mask was changed. The run has diverged: lower the "
            "learning rate, clip gradients, or go back to the last checkpoint"
        )
    return ScoreMoments.unstack(sums)


def _decide_pooled(layers: Sequence[Scored], scope: str, rule: KeepRule, ranks: Ranks, step: int) -> list[Decision]:
    """Decide on groups whose members' components compete with each other: all layers, or each alone. Collective."""
    pools = _pools(layers, scope)
    rules = [rule.of_group(pool.name) for pool in pools]
    search = _search(pools, ranks)
    local = search.look(lambda fraction: torch.stack([rules[g].share(one) for g, one in enumerate(fraction)]))
    moments = _layer_moments(local, layers, ranks, step)
    own = _layer_sums(moments)
    sums = moments.stack()
    keeps, n_effs = [], []
    for pool, of_pool in zip(pools, rules, strict=True):
        together = ScoreMoments.unstack(sums[list(pool.members)].sum(0, keepdim=True))
        n_eff = effective_numbers(together)
        keeps.append(int(of_pool.counts(n_eff, pool.size, together.nonzero)[0]) if together.nonzero[0] else 0)
        n_effs.append(float(n_eff[0]))
    thresholds = search.thresholds(keeps)
    found = []
    for pool, of_pool, keep, effective, threshold in zip(pools, rules, keeps, n_effs, thresholds, strict=True):
        of_layers = tuple(own[i] for i in pool.members)
        if threshold is None:
            found.append(_nothing_known(pool, of_layers))
        else:
            found.append(_decision(pool, keep, effective, threshold, of_layers, of_pool, ranks))
    return found


def _pools(layers: Sequence[Scored], scope: str) -> list[_Pool]:
    everything = range(len(layers))
    members = {"global": tuple(everything)} if scope == "global" else {layers[i].span.name: (i,) for i in everything}
    pools = []
    for name, of_pool in members.items():
        starts = dict(zip(of_pool, itertools.accumulate([0, *(layers[i].span.size for i in of_pool)]), strict=False))
        pools.append(_Pool(name, layers, {i: layers[i].scores for i in of_pool}, starts))
    return pools


def _search(pools: Sequence[_Pool], ranks: Ranks) -> Search:
    """Return the search for the thresholds of some pools, the parts of all of them in the order of the layers."""
    group_of = {i: g for g, pool in enumerate(pools) for i in pool.members}
    dtype = key_dtype([scores.dtype for pool in pools for scores in pool.scores.values()])
    parts = [pools[group_of[i]].part(i, counted=True) for i in sorted(group_of)]
    all_sum = ranks.all_sum if ranks.world_size > 1 else local_sum
    return search_of(parts, [group_of[i] for i in sorted(group_of)], [pool.size for pool in pools], dtype, all_sum)


def _nothing_known(pool: _Pool, own: tuple[LayerSums, ...]) -> Decision:
    note = "every score is 0: no information, nothing more is pruned"
    size = pool.size
    return Decision(
        pool.name, pool.members, size, 0.0, size, 0.0, own, 0, note, False, None, lambda i: _all_kept(pool.layers[i])
    )


def _decision(
    pool: _Pool,
    keep: int,
    n_eff: float,
    threshold: Threshold,
    own: tuple[LayerSums, ...],
    rule: KeepRule,
    ranks: Ranks,
) -> Decision:
    """Decide on one group of known threshold; collective where a layer would fall below its guard."""
    members, lowest, note = pool.members, threshold.value, ""
    short = [i for i in members if rule.min_units and len(members) > 1 and _is_short(pool.mask(i, threshold), rule)]
    if short:
        best = {i: _best_units(pool.layers[i], rule.min_units) for i in members}
        keep = max(keep, sum(int(chosen.sum()) for chosen in best.values()))
        lifted = {i: scores.masked_fill(best[i], torch.inf) for i, scores in pool.scores.items()}
        pool = pool._replace(scores=lifted)
        threshold = _threshold(pool, keep, ranks)
        kept = [pool.layers[i].scores.abs()[pool.mask(i, threshold)] for i in members]
        lowest = min(float(scores.min()) for scores in kept)
        names = ", ".join(pool.layers[i].span.name for i in short)
        note = f"kept so that no layer falls below min_units={rule.min_units}: {names}"
    digest = zlib.crc32(f"{keep} {threshold.key} {threshold.last_tie}".encode())
    chosen = partial(pool.mask, threshold=threshold)
    floor = None if short else tight_mass_bound(keep, pool.size, n_eff)
    return Decision(pool.name, members, pool.size, n_eff, keep, lowest, own, digest, note, not short, floor, chosen)


class _Pool(NamedTuple):
    """The scores of layers that compete with each other, by their index, and each layer's place in the group."""

    name: str
    layers: Sequence[Scored]
    scores: dict[int, Tensor]
    starts: dict[int, int]

    @property
    def members(self) -> tuple[int, ...]:
        """The indices of the layers."""
        return tuple(self.scores)

    @property
    def size(self) -> int:
        """Components of all layers."""
        return sum(self.layers[i].span.size for i in self.scores)

    def mask(self, i: int, threshold: Threshold) -> Tensor:
        """Return the mask of a layer, layout of its scores."""
        return threshold.mask(self.part(i, counted=False)).view(self.scores[i].shape)

    def part(self, i: int, *, counted: bool) -> ScoredPart:
        """Return this rank's part of a layer, or what it counts of it, and where it lies in the group."""
        scored = Scored(self.layers[i].span, self.scores[i])
        part = scored.counted if counted else scored.all
        return ScoredPart(part.scores, part.positions + self.starts[i])


def _threshold(pool: _Pool, keep: int, ranks: Ranks) -> Threshold:
    """Return what keeps exactly `keep` of a pool, on the host's path: its infinite scores have no moments."""
    dtype = key_dtype([scores.dtype for scores in pool.scores.values()])
    group = Group([pool.part(i, counted=True) for i in pool.members], pool.size, keep)
    return find_thresholds([group], dtype, ranks.all_sum if ranks.world_size > 1 else local_sum)[0]


def _mean_floor(keep: Tensor, n: int, n_eff: Tensor, mass: Tensor) -> float | None:
    """Return the lower bound on what all rows keep of their mass together; None if there is none."""
    total = float(mass.sum())
    return float((tight_mass_bounds(keep, n, n_eff) * mass).sum()) / total if total else None


def _is_short(mask: Tensor, rule: KeepRule) -> bool:
    return int(mask.sum()) < min(rule.min_units, mask.numel())


def _best_units(layer: Scored, count: int) -> Tensor:
    """Return the mask of the best few units of one layer, which every rank holds whole."""
    keep = torch.tensor([min(count, layer.span.size)])
    return top_rows(layer.scores.reshape(1, -1), keep).view(layer.scores.shape)


def _all_kept(layer: Scored) -> Tensor:
    return torch.ones_like(layer.scores, dtype=torch.bool)


def _local_row_sums(layer: Scored) -> Tensor:
    """Return the moments of each row over what this rank counts of it, shape (G, 3)."""
    parts = row_layout(layer.span, layer.scores.reshape(-1), layer.span.counted).parts
    return row_sums(parts, layer.span.shape[layer.span.output_dim])


def _decide_rows(
    member: int, layer: Scored, rule: KeepRule, local_sums: Tensor, layer_sums: LayerSums, ranks: Ranks
) -> Decision:
    """Decide on each output unit of one parameter by itself. Collective."""
    span, scores = layer.span, layer.scores.reshape(-1)
    layout = row_layout(span, scores, slice(0, scores.numel()))
    counted = row_layout(span, scores, span.counted).parts
    units = len(local_sums)
    moments = ScoreMoments.unstack(ranks.all_sum(local_sums))
    n_eff = effective_numbers(moments)
    keep = rule.of_group(span.name).counts(n_eff, span.size // units, moments.nonzero)
    thresholds = find_rows(layout.parts, counted, keep, moments, span.size // units, scores.dtype, ranks.all_sum)
    lowest = torch.tensor([min(thresholds.lowest_kept(part) for part in layout.parts)], dtype=torch.float64)
    silent = int((moments.nonzero == 0).sum())
    return Decision(
        group=span.name,
        members=(member,),
        n=span.size,
        n_eff=float(n_eff.sum()),
        keep=int(keep.sum()),
        threshold=float(ranks.from_all(lowest).min()),
        layer_sums=(layer_sums,),
        digest=zlib.crc32(keep.numpy().tobytes()),
        note=f"{silent} rows whose scores are all 0 are kept whole" if silent else "",
        is_top=False,
        mass_floor=_mean_floor(keep, span.size // units, n_eff, moments.total),
        mask=lambda _: layout.flat([thresholds.mask(part) for part in layout.parts]).view(layer.scores.shape),
    )

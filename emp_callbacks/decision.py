"""From scores to masks: moments, N_eff, keep counts and thresholds of every group, before anything is changed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, keep_counts, score_moments
from emp_callbacks.core.row_selection import top_rows, top_rows_sharded
from emp_callbacks.core.selection import (
    ScoredPart,
    Threshold,
    find_threshold,
    key_dtype,
)
from emp_callbacks.layer import Ranks
from emp_callbacks.segment import Span


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
    """

    beta: float = 1.0
    density: float | None = None
    min_density: float = 0.0
    min_units: int = 0
    tolerance: float = 0.0

    def counts(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        """Return the keep counts of G groups of `size` components, shape (G,), int64.

        Zeros are never kept to fill a quota; a group whose scores are all 0 says nothing and is kept whole.
        """
        wanted, beta = (n_eff, self.beta) if self.density is None else (torch.full_like(n_eff, size), self.density)
        least = max(1, math.ceil(self.min_density * size * (1 - 1e-12)))
        wanted = wanted + self.tolerance / beta
        return keep_counts(wanted, nonzero, beta, least).masked_fill(nonzero == 0, size)


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
        layer_n_eff: Each member's own N_eff, in components.
        digest: Of what decides the masks; every rank must have the same.
        note: What was out of the ordinary; empty if nothing.
        is_top: Whether exactly the `keep` highest are kept; False where a layer's guard changed that.
        mask: Member index -> mask, layout of that layer's scores, bool, True = kept.
    """

    group: str
    members: tuple[int, ...]
    n: int
    n_eff: float
    keep: int
    threshold: float
    layer_n_eff: tuple[float, ...]
    digest: int
    note: str
    is_top: bool
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
    moments = _layer_moments(layers, ranks, step)
    layer_n_eff = effective_numbers(moments).tolist()
    if scope == "row":
        return [_decide_rows(i, layer, rule, layer_n_eff[i], ranks) for i, layer in enumerate(layers)]
    if scope == "global":
        everything = tuple(range(len(layers)))
        return [_decide_pooled("global", everything, layers, moments.sum(), layer_n_eff, rule, ranks)]
    own = [ScoreMoments.unstack(row[None]) for row in moments.stack()]
    return [
        _decide_pooled(layer.span.name, (i,), layers, own[i], layer_n_eff, rule, ranks)
        for i, layer in enumerate(layers)
    ]


def _layer_moments(layers: Sequence[Scored], ranks: Ranks, step: int) -> ScoreMoments:
    """Return the moments of each layer, shape (L,), over all ranks. Collective."""
    local = torch.cat([score_moments(layer.counted.scores[None]).stack().cpu() for layer in layers])
    sums = ranks.all_sum(local)
    broken = ~torch.isfinite(sums[:, 0])
    if bool(broken.any()):
        seen = ranks.from_all((~torch.isfinite(local[:, 0])).long())
        where = "; ".join(
            f"{layers[i].span.name!r} (rank {', '.join(map(str, seen[:, i].nonzero().flatten().tolist()))})"
            for i in broken.nonzero().flatten().tolist()
        )
        raise FloatingPointError(
            f"NaN or Inf in the scores of {where} at step {step}; no mask was changed. The run has diverged: lower the "
            "learning rate, clip gradients, or go back to the last checkpoint"
        )
    return ScoreMoments.unstack(sums)


def _decide_pooled(
    group: str,
    members: tuple[int, ...],
    layers: Sequence[Scored],
    moments: ScoreMoments,
    layer_n_eff: list[float],
    rule: KeepRule,
    ranks: Ranks,
) -> Decision:
    """Decide on one group whose members' components compete with each other. Collective."""
    starts, size = {}, 0
    for i in members:
        starts[i] = size
        size += layers[i].span.size
    n_eff = effective_numbers(moments)
    keep = int(rule.counts(n_eff, size, moments.nonzero)[0])
    own = tuple(layer_n_eff[i] for i in members)
    if not int(moments.nonzero[0]):
        note = "every score is 0: no information, everything is kept"
        return Decision(group, members, size, 0.0, size, 0.0, own, 0, note, False, lambda i: _all_kept(layers[i]))
    scores = {i: layers[i].scores for i in members}
    pool = _Pool(layers, scores, starts)
    threshold = pool.threshold(keep, ranks)
    lowest, note = threshold.value, ""
    short = [i for i in members if rule.min_units and len(members) > 1 and _is_short(pool.mask(i, threshold), rule)]
    if short:
        best = {i: _best_units(layers[i], rule.min_units) for i in members}
        keep = max(keep, sum(int(chosen.sum()) for chosen in best.values()))
        pool = _Pool(layers, {i: scores[i].masked_fill(best[i], torch.inf) for i in members}, starts)
        threshold = pool.threshold(keep, ranks)
        lowest = min(float(scores[i].abs()[pool.mask(i, threshold)].min()) for i in members)
        names = ", ".join(layers[i].span.name for i in short)
        note = f"kept so that no layer falls below min_units={rule.min_units}: {names}"
    digest = zlib.crc32(f"{keep} {threshold.key} {threshold.last_tie}".encode())
    chosen = partial(pool.mask, threshold=threshold)
    return Decision(group, members, size, float(n_eff[0]), keep, lowest, own, digest, note, not short, chosen)


class _Pool(NamedTuple):
    """The scores of layers that compete with each other, by their index, and each layer's place in the group."""

    layers: Sequence[Scored]
    scores: dict[int, Tensor]
    starts: dict[int, int]

    def threshold(self, keep: int, ranks: Ranks) -> Threshold:
        """Return what keeps exactly `keep` of the group. Collective."""
        dtype = key_dtype([scores.dtype for scores in self.scores.values()])
        return find_threshold([self._part(i, counted=True) for i in self.scores], keep, dtype, ranks.all_sum)

    def mask(self, i: int, threshold: Threshold) -> Tensor:
        """Return the mask of a layer, layout of its scores."""
        return threshold.mask(self._part(i, counted=False)).view(self.scores[i].shape)

    def _part(self, i: int, *, counted: bool) -> ScoredPart:
        scored = Scored(self.layers[i].span, self.scores[i])
        part = scored.counted if counted else scored.all
        return ScoredPart(part.scores, part.positions + self.starts[i])


def _is_short(mask: Tensor, rule: KeepRule) -> bool:
    return int(mask.sum()) < min(rule.min_units, mask.numel())


def _best_units(layer: Scored, count: int) -> Tensor:
    """Return the mask of the best few units of one layer, which every rank holds whole."""
    keep = torch.tensor([min(count, layer.span.size)])
    return top_rows(layer.scores.reshape(1, -1), keep).view(layer.scores.shape)


def _all_kept(layer: Scored) -> Tensor:
    return torch.ones_like(layer.scores, dtype=torch.bool)


def _decide_rows(member: int, layer: Scored, rule: KeepRule, layer_n_eff: float, ranks: Ranks) -> Decision:
    """Decide on each output unit of one parameter by itself. Collective where the parameter is sharded."""
    span = layer.span
    decide_rows = _whole_rows if span.replicated else _sharded_rows
    rows = decide_rows(layer, rule, ranks)
    silent = int((rows.moments.nonzero == 0).sum())
    return Decision(
        group=span.name,
        members=(member,),
        n=span.size,
        n_eff=float(rows.n_eff.sum()),
        keep=int(rows.keep.sum()),
        threshold=rows.threshold,
        layer_n_eff=(layer_n_eff,),
        digest=zlib.crc32(rows.keep.numpy().tobytes()),
        note=f"{silent} rows whose scores are all 0 are kept whole" if silent else "",
        is_top=False,
        mask=lambda _: rows.mask,
    )


class _Rows(NamedTuple):
    """What is kept of the G rows of one parameter; `mask` has the layout of its scores."""

    moments: ScoreMoments
    n_eff: Tensor
    keep: Tensor
    threshold: float
    mask: Tensor


def _whole_rows(layer: Scored, rule: KeepRule, ranks: Ranks) -> _Rows:  # noqa: ARG001
    """Every rank reads the whole parameter, and reads the same."""
    dim = layer.span.output_dim
    moved = layer.scores.movedim(dim, 0)
    rows = moved.reshape(moved.shape[0], -1)
    moments = ScoreMoments.unstack(score_moments(rows).stack().cpu())
    n_eff = effective_numbers(moments)
    keep = rule.counts(n_eff, rows.shape[1], moments.nonzero)
    mask = top_rows(rows, keep)
    threshold = float(rows.detach().double().abs().masked_fill(~mask, torch.inf).min())
    return _Rows(moments, n_eff, keep, threshold, mask.view(moved.shape).movedim(0, dim).contiguous())


def _sharded_rows(layer: Scored, rule: KeepRule, ranks: Ranks) -> _Rows:
    """Rows begin on one rank and end on another: their sums and counts are reduced. Collective."""
    span, scores = layer.span, layer.scores.reshape(-1)
    units = span.shape[span.output_dim]
    row, column = _row_and_column(span, scores)
    wide = scores.detach().double().abs()
    sums = torch.zeros(units, 3, dtype=torch.float64, device=scores.device)
    part = span.counted
    sums.index_add_(0, row[part], torch.stack([wide, wide.square(), (wide > 0).double()], dim=1)[part])
    moments = ScoreMoments.unstack(ranks.all_sum(sums.cpu()))
    n_eff = effective_numbers(moments)
    keep = rule.counts(n_eff, span.size // units, moments.nonzero)
    mask, key = top_rows_sharded(scores, row, column, keep, ranks.all_sum)
    lowest = Threshold(int(key.min()), 0, key_dtype([scores.dtype])).value
    return _Rows(moments, n_eff, keep, lowest, mask)


def _row_and_column(span: Span, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each component of a span its output unit and its place among the unit's components."""
    count, device = scores.numel(), scores.device
    at = span.positions
    flat = torch.arange(at, at + count, device=device) if isinstance(at, int) else at.to(device)
    inner = math.prod(span.shape[span.output_dim + 1 :])
    units = span.shape[span.output_dim]
    return (flat // inner) % units, flat // (inner * units) * inner + flat % inner

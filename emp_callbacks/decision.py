"""From scores to masks: moments, N_eff, keep counts and thresholds of every group, before anything is changed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
from emp_callbacks.segment import Segment


class ScoredWeight(NamedTuple):
    """The scores of one segment: layout of `segment.weight`, either sign."""

    segment: Segment
    scores: Tensor

    @property
    def counted(self) -> ScoredPart:
        """The part of the scores that this rank counts, flat, and its place in the parameter."""
        part = self.segment.counted
        return ScoredPart(self.scores.reshape(-1)[part], self.segment.positions_of(part))

    @property
    def all(self) -> ScoredPart:
        """All of this rank's scores, flat, and their place in the parameter."""
        return ScoredPart(self.scores.reshape(-1), self.segment.positions)


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


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """How many components of a group stay: floor(beta * N_eff), or a fixed fraction."""

    beta: float = 1.0
    density: float | None = None
    min_density: float = 0.0

    def counts(self, n_eff: Tensor, size: int, nonzero: Tensor) -> Tensor:
        """Return the keep counts of G groups of `size` components, shape (G,), int64.

        Zeros are never kept to fill a quota; a group whose scores are all 0 says nothing and is kept whole.
        """
        wanted, beta = (n_eff, self.beta) if self.density is None else (torch.full_like(n_eff, size), self.density)
        least = max(1, math.ceil(self.min_density * size * (1 - 1e-12)))
        return keep_counts(wanted, nonzero, beta, least).masked_fill(nonzero == 0, size)


@dataclass(frozen=True)
class Decision:
    """What one group keeps.

    Attributes:
        group: "global" or the name of the parameter.
        members: Indices of the group's parameters in the list that was decided on.
        n: Components in the group.
        n_eff: Effective number, in components; with `scope="row"` the sum over rows.
        keep: Keep count, with `scope="row"` the sum over rows.
        threshold: Lowest kept score.
        layer_n_eff: Each member's own N_eff, in components.
        digest: Of what decides the masks; every rank must have the same.
        note: What was out of the ordinary; empty if nothing.
        mask: Member index -> mask, shape of that parameter, bool, True = kept.
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
    mask: Callable[[int], Tensor]


def decide(weights: Sequence[ScoredWeight], scope: str, rule: KeepRule, ranks: Ranks, step: int) -> list[Decision]:
    """Return one decision per group. Collective; changes nothing.

    Args:
        weights: Every scored parameter, in the same order on every rank.
        scope: "global": one group; "tensor" or "row": one group per parameter.
        rule: How many to keep.
        ranks: Who counts what.
        step: Optimizer step, for error messages.

    Raises:
        FloatingPointError: A score is NaN or Inf, on any rank; names parameter, step and ranks.
    """
    layers = _layer_moments(weights, ranks, step)
    layer_n_eff = effective_numbers(layers).tolist()
    if scope == "row":
        return [_decide_rows(i, weight, rule, layer_n_eff[i], ranks) for i, weight in enumerate(weights)]
    if scope == "global":
        return [_decide_pooled("global", tuple(range(len(weights))), weights, layers.sum(), layer_n_eff, rule, ranks)]
    moments = [ScoreMoments.unstack(row[None]) for row in layers.stack()]
    return [
        _decide_pooled(weight.segment.name, (i,), weights, moments[i], layer_n_eff, rule, ranks)
        for i, weight in enumerate(weights)
    ]


def _layer_moments(weights: Sequence[ScoredWeight], ranks: Ranks, step: int) -> ScoreMoments:
    """Return the moments of each parameter, shape (P,), over all ranks. Collective."""
    local = torch.cat([score_moments(weight.counted.scores[None]).stack().cpu() for weight in weights])
    sums = ranks.all_sum(local)
    broken = ~torch.isfinite(sums[:, 0])
    if bool(broken.any()):
        seen = ranks.from_all((~torch.isfinite(local[:, 0])).long())
        where = "; ".join(
            f"{weights[i].segment.name!r} (rank {', '.join(map(str, seen[:, i].nonzero().flatten().tolist()))})"
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
    weights: Sequence[ScoredWeight],
    moments: ScoreMoments,
    layer_n_eff: list[float],
    rule: KeepRule,
    ranks: Ranks,
) -> Decision:
    """Decide on one group whose members' components compete with each other. Collective."""
    starts, size = {}, 0
    for i in members:
        starts[i] = size
        size += weights[i].segment.size
    n_eff = effective_numbers(moments)
    keep = int(rule.counts(n_eff, size, moments.nonzero)[0])
    own = tuple(layer_n_eff[i] for i in members)
    if not int(moments.nonzero[0]):
        note = "every score is 0: no information, everything is kept"
        return Decision(group, members, size, 0.0, size, 0.0, own, 0, note, lambda i: _all_kept(weights[i]))
    parts = [ScoredPart(part.scores, part.positions + starts[i]) for i in members for part in [weights[i].counted]]
    threshold = find_threshold(parts, keep, key_dtype([weights[i].scores.dtype for i in members]), ranks.all_sum)

    def mask(i: int) -> Tensor:
        part = weights[i].all
        return threshold.mask(ScoredPart(part.scores, part.positions + starts[i])).view(weights[i].scores.shape)

    digest = zlib.crc32(f"{keep} {threshold.key} {threshold.last_tie}".encode())
    return Decision(group, members, size, float(n_eff[0]), keep, threshold.value, own, digest, "", mask)


def _all_kept(weight: ScoredWeight) -> Tensor:
    return torch.ones_like(weight.scores, dtype=torch.bool)


def _decide_rows(member: int, weight: ScoredWeight, rule: KeepRule, layer_n_eff: float, ranks: Ranks) -> Decision:
    """Decide on each output unit of one parameter by itself. Collective where the parameter is sharded."""
    segment = weight.segment
    decide_rows = _whole_rows if segment.replicated else _sharded_rows
    rows = decide_rows(weight, rule, ranks)
    silent = int((rows.moments.nonzero == 0).sum())
    return Decision(
        group=segment.name,
        members=(member,),
        n=segment.size,
        n_eff=float(rows.n_eff.sum()),
        keep=int(rows.keep.sum()),
        threshold=rows.threshold,
        layer_n_eff=(layer_n_eff,),
        digest=zlib.crc32(rows.keep.numpy().tobytes()),
        note=f"{silent} rows whose scores are all 0 are kept whole" if silent else "",
        mask=lambda _: rows.mask,
    )


class _Rows(NamedTuple):
    """What is kept of the G rows of one parameter; `mask` has the layout of its scores."""

    moments: ScoreMoments
    n_eff: Tensor
    keep: Tensor
    threshold: float
    mask: Tensor


def _whole_rows(weight: ScoredWeight, rule: KeepRule, ranks: Ranks) -> _Rows:  # noqa: ARG001
    """Every rank reads the whole parameter, and reads the same."""
    dim = weight.segment.output_dim
    moved = weight.scores.movedim(dim, 0)
    rows = moved.reshape(moved.shape[0], -1)
    moments = ScoreMoments.unstack(score_moments(rows).stack().cpu())
    n_eff = effective_numbers(moments)
    keep = rule.counts(n_eff, rows.shape[1], moments.nonzero)
    mask = top_rows(rows, keep)
    threshold = float(rows.detach().double().abs().masked_fill(~mask, torch.inf).min())
    return _Rows(moments, n_eff, keep, threshold, mask.view(moved.shape).movedim(0, dim).contiguous())


def _sharded_rows(weight: ScoredWeight, rule: KeepRule, ranks: Ranks) -> _Rows:
    """Rows begin on one rank and end on another: their sums and counts are reduced. Collective."""
    segment, scores = weight.segment, weight.scores.reshape(-1)
    units = segment.shape[segment.output_dim]
    row, column = _row_and_column(segment)
    wide = scores.detach().double().abs()
    sums = torch.zeros(units, 3, dtype=torch.float64, device=scores.device)
    part = segment.counted
    sums.index_add_(0, row[part], torch.stack([wide, wide.square(), (wide > 0).double()], dim=1)[part])
    moments = ScoreMoments.unstack(ranks.all_sum(sums.cpu()))
    n_eff = effective_numbers(moments)
    keep = rule.counts(n_eff, segment.size // units, moments.nonzero)
    mask, key = top_rows_sharded(scores, row, column, keep, ranks.all_sum)
    lowest = Threshold(int(key.min()), 0, key_dtype([scores.dtype])).value
    return _Rows(moments, n_eff, keep, lowest, mask)


def _row_and_column(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return for each element of a segment its output unit and its place among the unit's weights."""
    count, device = segment.weight.numel(), segment.weight.device
    at = segment.positions
    flat = torch.arange(at, at + count, device=device) if isinstance(at, int) else at.to(device)
    inner = math.prod(segment.shape[segment.output_dim + 1 :])
    units = segment.shape[segment.output_dim]
    return (flat // inner) % units, flat // (inner * units) * inner + flat % inner

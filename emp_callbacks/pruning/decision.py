"""From scores to masks: moments, N_eff, keep counts and thresholds of every group, before anything is changed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import tight_mass_bound
from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, key_dtype, score_moments
from emp_callbacks.core.row_selection import top_rows
from emp_callbacks.core.threshold import ScoredPart, Threshold, find_threshold, local_sum
from emp_callbacks.layer import Ranks
from emp_callbacks.pruning.groups import Decision, KeepRule, LayerSums, Scored, check_finite, sums_of_layers
from emp_callbacks.pruning.row_decision import decide_rows


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
        return decide_rows(layers, rule, ranks, step)
    local = gather_rows([score_moments(layer.counted.scores[None]).stack()[0] for layer in layers])
    moments = _layer_moments(local, layers, ranks, step)
    own = sums_of_layers(moments)
    if scope == "global":
        everything = tuple(range(len(layers)))
        return [_decide_pooled("global", everything, layers, moments.sum(), own, rule, ranks)]
    alone = [ScoreMoments.unstack(row[None]) for row in moments.stack()]
    return [_decide_pooled(layer.span.name, (i,), layers, alone[i], own, rule, ranks) for i, layer in enumerate(layers)]


def _layer_moments(local: Tensor, layers: Sequence[Scored], ranks: Ranks, step: int) -> ScoreMoments:
    """Return the moments of each layer, shape (L,), over all ranks from those of this rank, (L, 3). Collective."""
    sums = ranks.all_sum(local)
    check_finite(local, sums, layers, ranks, step)
    return ScoreMoments.unstack(sums)


def _decide_pooled(
    group: str,
    members: tuple[int, ...],
    layers: Sequence[Scored],
    moments: ScoreMoments,
    layer_sums: list[LayerSums],
    rule: KeepRule,
    ranks: Ranks,
) -> Decision:
    """Decide on one group whose members' components compete with each other. Collective."""
    starts, size = {}, 0
    for i in members:
        starts[i] = size
        size += layers[i].span.size
    n_eff = effective_numbers(moments)
    rule = rule.of_group(group)
    keep = int(rule.counts(n_eff, size, moments.nonzero)[0])
    own = tuple(layer_sums[i] for i in members)
    if not int(moments.nonzero[0]):
        note = "every score is 0: no information, nothing more is pruned"
        return Decision(group, members, size, 0.0, size, 0.0, own, 0, note, False, None, lambda i: _all_kept(layers[i]))
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
    chosen, total = partial(pool.mask, threshold=threshold), float(n_eff[0])
    floor = None if short else tight_mass_bound(keep, size, total)
    return Decision(group, members, size, total, keep, lowest, own, digest, note, not short, floor, chosen)


class _Pool(NamedTuple):
    """The scores of layers that compete with each other, by their index, and each layer's place in the group."""

    layers: Sequence[Scored]
    scores: dict[int, Tensor]
    starts: dict[int, int]

    def threshold(self, keep: int, ranks: Ranks) -> Threshold:
        """Return what keeps exactly `keep` of the group. Collective, unless every rank has the same scores already."""
        dtype = key_dtype([scores.dtype for scores in self.scores.values()])
        alone = all(self.layers[i].span.is_summed for i in self.scores)
        parts = [self._part(i, counted=not alone) for i in self.scores]
        return find_threshold(parts, keep, dtype, local_sum if alone else ranks.all_sum)

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

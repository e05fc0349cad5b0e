"""From scores to masks: moments, N_eff, keep counts and thresholds of every group, before anything is changed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import tight_mass_bounds
from emp_callbacks.core.chunks import count_true, gather_rows
from emp_callbacks.core.effective_number import (
    ScoreMoments,
    effective_numbers,
    key_dtype,
)
from emp_callbacks.core.row_selection import top_rows
from emp_callbacks.core.search import Search, search_of
from emp_callbacks.core.threshold import AllSum, ScoredPart, Threshold, local_sum
from emp_callbacks.layer import Ranks
from emp_callbacks.layer.segment import Span
from emp_callbacks.pruning.groups import Cut, Decision, KeepRule, LayerSums, Scored, check_finite, sums_of_layers
from emp_callbacks.pruning.pattern_decision import decide_pattern
from emp_callbacks.pruning.row_decision import decide_rows

NOTHING_KNOWN = "every score is 0: no information, nothing more is pruned"


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
    if rule.pattern is not None:
        return decide_pattern(layers, rule.pattern, ranks, step)
    if scope == "row":
        return decide_rows(layers, rule, ranks, step)
    return _decide_pooled(layers, scope, rule, ranks, step)


def _decide_pooled(layers: Sequence[Scored], scope: str, rule: KeepRule, ranks: Ranks, step: int) -> list[Decision]:
    """Decide on groups whose members' components compete with each other: all layers, or each alone. Collective."""
    pools = _pools(layers, scope)
    rules = [rule.of_group(pool.name) for pool in pools]
    search = _search(pools, ranks)
    local = search.look(lambda fraction: torch.stack([rules[g].share(one) for g, one in enumerate(fraction)]))
    sums = ranks.all_sum(local).cpu()
    check_finite(local, sums, layers, ranks, step)
    sums = local.cpu() if all(pool.is_summed for pool in pools) else sums
    own = sums_of_layers(ScoreMoments.unstack(sums))
    together = ScoreMoments.unstack(sums.sum(0, keepdim=True) if scope == "global" else sums)
    n_eff, nonzero = effective_numbers(together), together.nonzero
    keeps = [
        int(of_pool.counts(n_eff[g : g + 1], pool.size, nonzero[g : g + 1])) if nonzero[g] else 0
        for g, (pool, of_pool) in enumerate(zip(pools, rules, strict=True))
    ]
    floors = tight_mass_bounds(torch.tensor(keeps), torch.tensor([pool.size for pool in pools]), n_eff).tolist()
    found = []
    for g, threshold in enumerate(search.thresholds(keeps)):
        of_layers = tuple(own[i] for i in pools[g].members)
        if threshold is None:
            found.append(_nothing_known(pools[g], of_layers, kept=not rules[g].found))
        else:
            keep = _Keep(keeps[g], float(n_eff[g]), floors[g])
            found.append(_decision(pools[g], keep, threshold, of_layers, rules[g], ranks))
    return found


class _Keep(NamedTuple):
    """How many components of a group stay, its N_eff, and the least share of the score mass that they hold."""

    kept: int
    n_eff: float
    mass_floor: float


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
    parts = [pools[group_of[i]].searched(i) for i in sorted(group_of)]
    sizes = [pool.size for pool in pools]
    return search_of(parts, [group_of[i] for i in sorted(group_of)], sizes, dtype, _all_sum(pools, ranks))


def _all_sum(pools: Sequence[_Pool], ranks: Ranks) -> AllSum:
    """Return what adds over ranks what `searched` says on each."""
    alone = ranks.world_size == 1 or all(pool.is_summed for pool in pools)
    return local_sum if alone else ranks.all_sum


def _nothing_known(pool: _Pool, own: tuple[LayerSums, ...], *, kept: bool) -> Decision:
    note = NOTHING_KNOWN if kept else "every weight is 0 and stays so"
    size = pool.size

    def mask(i: int) -> Tensor:
        return torch.full_like(pool.layers[i].scores, kept, dtype=torch.bool)

    return Decision(pool.name, pool.members, size, 0.0, size if kept else 0, 0.0, own, 0, note, False, None, mask)


def _decision(
    pool: _Pool,
    wanted: _Keep,
    threshold: Threshold,
    own: tuple[LayerSums, ...],
    rule: KeepRule,
    ranks: Ranks,
) -> Decision:
    """Decide on one group of known threshold; collective where a layer would fall below its guard."""
    members, keep, lowest, note = pool.members, wanted.kept, threshold.value, ""
    short = _short(pool, threshold, rule)
    if short:
        best = {i: _stays_anyway(pool.layers[i], rule) for i in members}
        keep = max(keep, sum(gather_rows([count_true(mask) for mask in best.values()]).tolist()))
        lifted = {i: scores.masked_fill(best[i], torch.inf) for i, scores in pool.scores.items()}
        pool = pool._replace(scores=lifted)
        threshold = _threshold(pool, keep, ranks)
        kept = [pool.layers[i].scores.abs().masked_fill(~pool.mask(i, threshold), torch.inf) for i in members]
        lowest = float(gather_rows([scores.min() for scores in kept]).min())
        names = ", ".join(pool.layers[i].span.name for i in short)
        note = f"kept so that {_guard(rule)}: {names}"
    digest = zlib.crc32(f"{keep} {threshold.key} {threshold.last_tie}".encode())
    chosen = partial(pool.mask, threshold=threshold)
    cut = None if short else partial(pool.cut, threshold=threshold)
    floor = None if short else wanted.mass_floor
    return Decision(
        pool.name, members, pool.size, wanted.n_eff, keep, lowest, own, digest, note, not short, floor, chosen, cut
    )


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

    @property
    def is_summed(self) -> bool:
        """Whether every rank has the same scores already, so that each can search them alone."""
        return all(self.layers[i].span.is_summed for i in self.scores)

    def mask(self, i: int, threshold: Threshold) -> Tensor:
        """Return the mask of a layer, layout of its scores."""
        return threshold.mask(self._placed(i, self._scored(i).all)).view(self.scores[i].shape)

    def cut(self, i: int, threshold: Threshold) -> Cut:
        """Return what decides a layer's mask."""
        return Cut(threshold, self._placed(i, self._scored(i).all))

    def searched(self, i: int) -> ScoredPart:
        """Return what this rank searches of a layer, and where it lies in the group: what it counts, or all of it."""
        return self._placed(i, self._scored(i).all if self.is_summed else self._scored(i).counted)

    def _scored(self, i: int) -> Scored:
        return Scored(self.layers[i].span, self.scores[i])

    def _placed(self, i: int, part: ScoredPart) -> ScoredPart:
        return ScoredPart(part.scores, part.positions + self.starts[i])


def _threshold(pool: _Pool, keep: int, ranks: Ranks) -> Threshold:
    """Return what keeps exactly `keep` of a pool. Collective."""
    search = _search([pool], ranks)
    search.look(lambda _: torch.full((1,), keep / pool.size, dtype=torch.float64))  # infinite scores have no moments
    (threshold,) = search.thresholds([keep])
    assert threshold is not None
    return threshold


def _guard(rule: KeepRule) -> str:
    if rule.floors:
        return "each layer has as many experts as a token is sent to"
    return f"no layer falls below min_units={rule.min_units}" if rule.min_units else "no slice of a norm is empty"


def _short(pool: _Pool, threshold: Threshold, rule: KeepRule) -> list[int]:
    """Return the layers that would keep fewer of their units than the rule says they do in any case."""
    if not (rule.min_units or rule.floors) or len(pool.members) == 1:
        guarded = [i for i in pool.members if pool.layers[i].span.never_empty is not None]
        kept = {i: _slices(pool.layers[i].span, pool.mask(i, threshold)) for i in guarded}
        return [i for i, rows in kept.items() if not bool(rows.any(1).all())]
    counts = gather_rows([count_true(pool.mask(i, threshold)) for i in pool.members]).tolist()
    spans = [pool.layers[i].span for i in pool.members]
    least = [min(rule.floor(span.name), span.size) for span in spans]
    return [i for i, count, own in zip(pool.members, counts, least, strict=True) if count < own]


def _stays_anyway(layer: Scored, rule: KeepRule) -> Tensor:
    """Return the mask of what one layer, which every rank holds whole, keeps whatever the others have."""
    mask = torch.zeros_like(layer.scores, dtype=torch.bool)
    if layer.span.never_empty is not None:
        best = _slices(layer.span, layer.scores.abs()).argmax(1)
        places = _slices(layer.span, torch.arange(mask.numel(), device=mask.device).view(mask.shape))
        mask.view(-1)[places.gather(1, best[:, None])] = True
    elif rule.floor(layer.span.name):
        count = torch.tensor([min(rule.floor(layer.span.name), layer.span.size)])
        mask = top_rows(layer.scores.reshape(1, -1), count).view(mask.shape)
    return mask


def _slices(span: Span, values: Tensor) -> Tensor:
    """Return the slices of a layer that is held whole of which none may be empty, shape (slices, -1)."""
    assert span.never_empty is not None
    return values.reshape(1, -1) if span.never_empty < 0 else values.movedim(span.never_empty, 0).flatten(1)

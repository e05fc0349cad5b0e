"""What a refresh did: counts over all ranks, the digest they must share, and the rows made of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import mass_bound
from emp_callbacks.core.effective_number import keep_count
from emp_callbacks.core.packing import pack_bits
from emp_callbacks.core.selection import kept_mass
from emp_callbacks.decision import Decision, Ranks, ScoredWeight
from emp_callbacks.mask_mode import MaskedWeight
from emp_callbacks.trajectory import LayerStats, PruneEvent


class MaskCounts(NamedTuple):
    """Sums over one parameter, on all ranks.

    `kept`, `flipped` and `regrown` count components; `kept_mass` and `mass` are in units of the score.
    """

    kept: float
    kept_mass: float
    mass: float
    flipped: float
    regrown: float


def count_masks(
    weights: Sequence[MaskedWeight], scored: Sequence[ScoredWeight], masks: Sequence[Tensor], ranks: Ranks
) -> list[MaskCounts]:
    """Return the counts of every parameter's new mask, against its scores and its old mask. Collective."""
    rows = []
    for weight, (segment, scores), mask in zip(weights, scored, masks, strict=True):
        part = segment.counted
        new, flat = mask.reshape(-1)[part], scores.reshape(-1)[part]
        old = weight.mask_or_ones.reshape(-1)[part]
        mass = kept_mass(flat, torch.ones_like(new))
        flipped, regrown = int((new != old).sum()), int((new & ~old).sum())
        rows.append([int(new.sum()), kept_mass(flat, new), mass, flipped, regrown])
    return [MaskCounts(*row) for row in ranks.all_sum(torch.tensor(rows, dtype=torch.float64)).tolist()]


def check_ranks_agree(
    decisions: Sequence[Decision], masks: Sequence[Tensor], weights: Sequence[MaskedWeight], ranks: Ranks, step: int
) -> None:
    """Raise unless every rank came to the same masks: by their bits where all hold them, else by what decides them.

    Collective.

    Raises:
        RuntimeError: Names the parameter and the ranks; no mask was changed.
    """
    if ranks.world_size == 1:
        return
    own = []
    of_decision = {i: decision.digest for decision in decisions for i in decision.members}
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        bits = zlib.crc32(pack_bits(mask).numpy().tobytes()) if weight.segment.replicated else 0
        own.append(bits ^ of_decision[i])
    for weight, column in zip(weights, ranks.from_all(torch.tensor(own)).unbind(1), strict=True):
        differ = (column != column[0]).nonzero().flatten().tolist()
        if differ:
            raise RuntimeError(
                f"ranks {differ} computed another mask than rank 0 for {weight.name!r} at step {step}; no mask was "
                "changed. The replicas' weights have drifted apart, or random scores were seeded differently: call "
                "seed_everything on every rank"
            )


def prune_event(
    decision: Decision, scored: Sequence[ScoredWeight], counts: Sequence[MaskCounts], common: dict[str, Any]
) -> PruneEvent:
    """Return the row of one group.

    Args:
        decision: What the group keeps.
        scored: Every scored parameter, as `decide` was given them.
        counts: Of every parameter.
        common: The fields that all rows of a refresh share: step, epoch, mode, criterion, scope, beta, seconds.
    """
    own = [counts[i] for i in decision.members]
    layers = tuple(
        LayerStats(
            name=scored[i].segment.name,
            n=scored[i].segment.size,
            n_eff=n_eff,
            keep=int(counts[i].kept),
            density=counts[i].kept / scored[i].segment.size,
            preserved_mass=_share(counts[i].kept_mass, counts[i].mass),
        )
        for i, n_eff in zip(decision.members, decision.layer_n_eff, strict=True)
    )
    keep = int(sum(count.kept for count in own))
    return PruneEvent(
        **common,
        group=decision.group,
        n=decision.n,
        n_eff=decision.n_eff,
        n_eff_fraction=decision.n_eff / decision.n,
        keep=keep,
        threshold=decision.threshold,
        density=keep / decision.n,
        preserved_mass=_share(sum(count.kept_mass for count in own), sum(count.mass for count in own)),
        mass_bound=_bound(decision, keep, common),
        churn=sum(count.flipped for count in own) / decision.n,
        regrown=int(sum(count.regrown for count in own)),
        note=decision.note,
        layers=layers,
    )


def _bound(decision: Decision, keep: int, common: dict[str, Any]) -> float | None:
    """Return the mass bound where it holds: one vector of scores, of which exactly floor(N_eff) are kept."""
    if common["scope"] == "row" or common["beta"] != 1.0 or not 2 <= keep <= decision.n - 1:
        return None
    return mass_bound(keep, decision.n) if keep == keep_count(decision.n_eff, decision.n) else None


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0

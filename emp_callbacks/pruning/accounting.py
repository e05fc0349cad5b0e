"""What a refresh did: counts over all ranks, the digest they must share, and the rows made of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import mass_bound
from emp_callbacks.core.chunks import chunks, count_true, gather_rows, longest_chunk, scratch
from emp_callbacks.core.effective_number import keep_count
from emp_callbacks.core.mask_digest import mask_digest
from emp_callbacks.core.selection import kept_mass
from emp_callbacks.layer import Layer, MissingEvidence, Ranks
from emp_callbacks.pruning.assembly import DynamicSite
from emp_callbacks.pruning.certificates import Certificates
from emp_callbacks.pruning.groups import Decision, Scored
from emp_callbacks.targets.attention_edges import EdgeSite
from emp_callbacks.trajectory import LayerStats, PruneEvent


class MaskCounts(NamedTuple):
    """Sums over one layer, on all ranks.

    `kept`, `flipped` and `regrown` count components; `kept_mass` is in units of the score.
    """

    kept: float
    kept_mass: float
    flipped: float
    regrown: float


def count_mask(before: Tensor | None, scored: Scored, mask: Tensor) -> Tensor:
    """Return what this rank counts for MaskCounts of a layer's new mask after the one before it, shape (4,)."""
    part = scored.span.counted
    new, old = mask.reshape(-1)[part], None if before is None else before.reshape(-1)[part]
    kept = count_true(new)
    if old is None:  # all were kept
        flipped, regrown = new.numel() - kept, torch.zeros_like(kept)
    else:
        with scratch(longest_chunk(new), torch.bool, new.device) as buffer:
            differ = (torch.bitwise_xor(new[at], old[at], out=buffer[: at.stop - at.start]) for at in chunks(new))
            flipped = sum(map(count_true, differ), torch.zeros_like(kept))
        regrown = (flipped + kept - count_true(old)) // 2  # flipped are those regrown and those dropped
    mass = kept_mass(scored.scores.reshape(-1)[part], new)
    return torch.stack([kept.double(), mass, flipped.double(), regrown.double()])


def check_ranks_agree(
    decisions: Sequence[Decision],
    new_mask: Callable[[Decision, int], Tensor],
    layers: Sequence[Layer],
    ranks: Ranks,
    step: int,
) -> None:
    """Raise unless every rank came to the same masks: by their bits where all hold them, else by what decides them.

    Collective. Makes one mask at a time.

    Raises:
        RuntimeError: Names the layer and the ranks; no mask was changed.
    """
    if ranks.world_size == 1:
        return
    order = [(decision, i) for decision in decisions for i in decision.members]
    bits = [
        mask_digest(new_mask(decision, i)) if layers[i].span.replicated else torch.tensor(0) for decision, i in order
    ]
    own = torch.zeros(len(layers), dtype=torch.int64)
    own[[i for _, i in order]] = gather_rows(bits) ^ torch.tensor([decision.digest for decision, _ in order])
    # Of all layers one number is compared, with rank 0's; which layer it was is looked up on the way to an error.
    digest = torch.tensor(zlib.crc32(own.numpy().tobytes()))
    first = ranks.all_sum(digest if ranks.rank == 0 else torch.zeros_like(digest))
    if not bool(ranks.all_sum((digest != first).long())):
        return
    for layer, column in zip(layers, ranks.from_all(own).unbind(1), strict=True):
        differ = (column != column[0]).nonzero().flatten().tolist()
        if differ:
            raise RuntimeError(
                f"ranks {differ} computed another mask than rank 0 for {layer.name!r} at step {step}; no mask was "
                "changed. The replicas' weights have drifted apart, or random scores were seeded differently: call "
                "seed_everything on every rank"
            )


def prune_event(
    decision: Decision,
    scored: Sequence[Scored],
    counts: Sequence[MaskCounts],
    certificates: Certificates,
    common: dict[str, Any],
) -> PruneEvent:
    """Return the row of one group.

    Args:
        decision: What the group keeps.
        scored: The scores of every layer, as `decide` was given them.
        counts: Of every layer.
        certificates: Of layers and groups, where asked for.
        common: The fields that all rows of a refresh share: step, epoch, mode, criterion, scope, beta.
    """
    own = [counts[i] for i in decision.members]
    layers = tuple(
        LayerStats(
            name=scored[i].span.name,
            n=scored[i].span.size,
            n_eff=sums.n_eff,
            keep=int(counts[i].kept),
            density=counts[i].kept / scored[i].span.size,
            preserved_mass=_share(counts[i].kept_mass, sums.mass),
            certificate=certificates.layers.get(i),
        )
        for i, sums in zip(decision.members, decision.layer_sums, strict=True)
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
        preserved_mass=_share(sum(count.kept_mass for count in own), sum(sums.mass for sums in decision.layer_sums)),
        mass_bound=_bound(decision, keep, common),
        tight_mass_bound=decision.mass_floor,
        churn=sum(count.flipped for count in own) / decision.n,
        regrown=int(sum(count.regrown for count in own)),
        seconds=0.0,
        note=decision.note,
        layers=layers,
        certificate=certificates.groups.get(decision.group),
    )


def unscored_event(layer: Layer, kept: int, error: MissingEvidence, common: dict[str, Any]) -> PruneEvent:
    """Return the row of a group whose one layer had no evidence: it tells how its mask stands.

    Args:
        layer: The layer.
        kept: Components that its mask keeps, over all ranks.
        error: What was missing.
        common: As for `prune_event`.
    """
    n = layer.span.size if layer.is_known else 0
    density = kept / n if n else 1.0
    stands = LayerStats(name=layer.name, n=n, n_eff=0.0, keep=kept, density=density, preserved_mass=1.0)
    return PruneEvent(
        **common,
        group=layer.name,
        n=n,
        n_eff=0.0,
        n_eff_fraction=0.0,
        keep=kept,
        threshold=0.0,
        density=density,
        preserved_mass=1.0,
        mass_bound=None,
        churn=0.0,
        regrown=0,
        seconds=0.0,
        note=unscored_note([error]),
        layers=(stands,) if n else (),
    )


def unscored_note(errors: Sequence[MissingEvidence], so: str = "") -> str:
    """Return what a row says of layers without evidence, the first few by name, and what came of it."""
    told = ", ".join(f"{error.layer!r} ({error.reason})" for error in errors[:3])
    told += f" and {len(errors) - 3} more" * (len(errors) > 3)
    return f"no evidence for {told}: {so or ('its mask stays' if len(errors) == 1 else 'their masks stay')}"


def with_note(event: PruneEvent, note: str) -> PruneEvent:
    """Return a row that says this, too."""
    return replace(event, note="; ".join(filter(None, [event.note, note])))


def dynamic_event(sites: Sequence[DynamicSite], sums: Sequence[dict[str, float]], common: dict[str, Any]) -> PruneEvent:
    """Return the row of masks that every sample, or query row, makes for itself: means since the last refresh.

    Args:
        sites: Where they are made, those that something passed.
        sums: Each site's statistics over all ranks.
        common: As for `prune_event`.

    Raises:
        FloatingPointError: Nothing without NaN or Inf passed a site.
    """
    layers = tuple(_dynamic_layer(site, found) for site, found in zip(sites, sums, strict=True))
    n, n_eff = sum(layer.n for layer in layers), sum(layer.n_eff for layer in layers)
    exact = sum(_mean_size(site, found) for site, found in zip(sites, sums, strict=True))
    kept = sum(layer.density * layer.n for layer in layers)
    skipped = int(sum(found["not_finite"] for found in sums))
    return PruneEvent(
        **common,
        group="global",
        n=n,
        n_eff=n_eff,
        n_eff_fraction=n_eff / exact,
        keep=round(kept),
        threshold=0.0,
        density=kept / n,
        preserved_mass=sum(layer.preserved_mass * layer.n for layer in layers) / n,
        mass_bound=None,
        churn=0.0,
        regrown=0,
        seconds=0.0,
        note=f"{skipped} rows with NaN or Inf were kept whole and not counted" if skipped else "",
        layers=layers,
    )


def _mean_size(site: DynamicSite, sums: dict[str, float]) -> float:
    """Return of how many components a mask is made: of edges the mean number of keys that a query row may read."""
    return sums["allowed"] / sums["rows"] if isinstance(site, EdgeSite) else float(site.size or 0)


def _dynamic_layer(site: DynamicSite, sums: dict[str, float]) -> LayerStats:
    """Return a site's means per sample, or per query row: its components are then the keys that the row may read."""
    rows = sums.get("samples", sums.get("rows", 0.0))
    if not rows:
        raise FloatingPointError(
            f"NaN or Inf in everything that passed {site.name!r} since the last refresh; no mask was changed. The run "
            "has diverged: lower the learning rate, clip gradients, or go back to the last checkpoint"
        )
    n = _mean_size(site, sums)
    several = sums.get("first_token_rows", 0.0)
    return LayerStats(
        name=site.name,
        n=round(n),
        n_eff=sums["n_eff"] / rows,
        keep=round(sums["keep"] / rows),
        density=sums["keep"] / rows / n,
        preserved_mass=sums["mass"] / rows,
        first_token=sums["first_token"] / several if several else None,
    )


def _bound(decision: Decision, keep: int, common: dict[str, Any]) -> float | None:
    """Return the mass bound where it holds: one vector of scores, of which exactly floor(N_eff) are kept."""
    if not decision.is_top or common["beta"] != 1.0 or not 2 <= keep <= decision.n - 1:
        return None
    return mass_bound(keep, decision.n) if keep == keep_count(decision.n_eff, decision.n) else None


def _share(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole else 1.0  # two sums of all scores can differ by rounding

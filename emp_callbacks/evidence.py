"""What was gathered since the last refresh, as tensors: for checkpoints, and so that one rank can hold it for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emp_callbacks.layer import Layer, Ranks, UnitLayer, WeightLayer
from emp_callbacks.targets.forward_site import ForwardSite

Tensors = dict[str, Tensor]


def share_evidence(layers: Sequence[Layer], sites: Sequence[ForwardSite], batches: Sequence[int], ranks: Ranks) -> None:
    """Move to rank 0 what the ranks have each gathered a part of; the sum over ranks stays what it was. Collective.

    What gradients say of single weights lies where the weights lie, and stays there.
    """
    if ranks.world_size == 1:
        return
    for layer in layers:
        if isinstance(layer, UnitLayer):
            zeros = torch.zeros(layer.units, dtype=torch.float64)
            sums = {batch: ranks.all_sum(layer.gathered.get(batch, zeros)) for batch in batches}
            layer.gathered = sums if ranks.rank == 0 else {}
    for site in sites:
        # A rank that saw nothing of a module holds no sums of it; whether any holds some must be agreed first.
        seen = ranks.all_sum(torch.tensor(len(site.sums)))
        sums_of_site = {k: ranks.all_sum(v) for k, v in sorted(site.statistics().items())} if bool(seen) else {}
        site.sums = sums_of_site if ranks.rank == 0 else {}


def pack_evidence(layers: Sequence[Layer], sites: Sequence[ForwardSite]) -> Tensors:
    """Return what this rank has gathered, by name; `unpack_evidence` reads it."""
    tensors: Tensors = {}
    for layer in layers:
        if isinstance(layer, WeightLayer) and layer.gathered is not None:
            tensors[f"weight:{layer.name}"] = layer.gathered.cpu().clone()
        if isinstance(layer, UnitLayer):
            tensors |= {f"units:{layer.name}:{batch}": sums.cpu().clone() for batch, sums in layer.gathered.items()}
    for site in sites:
        tensors |= {f"site:{site.name}:{key}": value.cpu().clone() for key, value in site.sums.items()}
    return tensors


def unpack_evidence(tensors: Tensors, layers: Sequence[Layer], sites: Sequence[ForwardSite], rank: int) -> None:
    """Go on from what was gathered before a checkpoint was saved by rank 0.

    Args:
        tensors: Of `pack_evidence`.
        layers: As they were packed.
        sites: As they were packed.
        rank: Rank 0 takes the sums over ranks, the others start anew: added up they are what they were.
    """
    for layer in layers:
        if isinstance(layer, WeightLayer):
            found = tensors.get(f"weight:{layer.name}")
            layer.gathered = None if found is None else found.to(layer.weight.device, copy=True)
        if isinstance(layer, UnitLayer):
            sums = _below(tensors, f"units:{layer.name}:") if rank == 0 else {}
            layer.gathered = {int(batch): value for batch, value in sums.items()}
    for site in sites:
        site.sums = _below(tensors, f"site:{site.name}:") if rank == 0 else {}


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}

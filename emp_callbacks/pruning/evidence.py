"""What criteria need besides the weights: gathered in a window before a refresh, kept by checkpoints, then released."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, Ranks, UnitLayer, WeightLayer
from emp_callbacks.targets.forward_site import ForwardSite

Tensors = dict[str, Tensor]


class Evidence:
    """The evidence of all layers on this rank, and the hooks that gather it.

    Args:
        layers: What is scored.
        sites: Hooks on modules.
        criterion: Says what it needs.
        ranks: The job's processes.

    Attributes:
        batches: The optimizer steps whose gradients were gathered, the same on every rank.
    """

    def __init__(
        self, layers: Sequence[Layer], sites: Sequence[ForwardSite], criterion: Criterion, ranks: Ranks
    ) -> None:
        self._layers, self._sites, self._criterion, self._ranks = layers, sites, criterion, ranks
        self._reads_gradients = False
        self.batches: list[int] = []

    # ---- gathering ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on modules in place, again where another tool cleared them."""
        for site in self._sites:
            site.attach()

    def detach(self) -> None:
        """Take the hooks off."""
        self.observe(False, in_eval=False)
        for site in self._sites:
            site.detach()

    def replace_sites(self, sites: Sequence[ForwardSite]) -> None:
        """Gather at these modules from now on; those that stay keep what they have gathered."""
        for site in self._sites:
            if site not in sites:
                site.detach()
        self._sites = list(sites)
        self.attach()

    def observe(self, near: bool, *, in_eval: bool) -> None:
        """Gather from now on, or no more.

        Args:
            near: Whether to gather.
            in_eval: Whether to do so in evaluation mode as well.
        """
        self._reads_gradients = near and self._criterion.needs == "gradients"
        for site in self._sites:
            site.observing, site.in_eval = near, in_eval

    def gradients_ready(self, owners: Collection[int], step: int, scale: Tensor | None) -> None:
        """Take the gradients of these owners, by id, as part of the batch of an optimizer step, if they are needed."""
        if self._reads_gradients:
            self._gather(owners, step, scale)

    def collect(self, owners: Collection[int]) -> None:
        """Take the gradients that are there now as a batch of their own."""
        self._gather(owners, -1 - len(self.batches), None)

    @torch.no_grad()
    def _gather(self, owners: Collection[int], batch: int, scale: Tensor | None) -> None:
        def per_weight(weight: Tensor, gradient: Tensor) -> Tensor:
            wide = torch.promote_types(weight.dtype, torch.float32)  # a product of two fp16 numbers may vanish
            given = gradient.to(wide) if scale is None else gradient.to(wide) / scale
            return self._criterion.of_batch(weight.to(wide), given)

        for layer in self._layers:
            layer.gather(owners, batch, per_weight)
        if not self.batches or self.batches[-1] != batch:
            self.batches.append(batch)

    def release(self) -> None:
        """Forget what was gathered."""
        self.batches.clear()
        for site in self._sites:
            site.reset()
        for layer in self._layers:
            layer.release()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def share(self) -> None:
        """Move to rank 0 what the ranks have each gathered a part of; the sum over ranks stays. Collective.

        What gradients say of single weights lies where the weights lie, and stays there.
        """
        if self._ranks.world_size == 1:
            return
        for layer in self._layers:
            if isinstance(layer, UnitLayer):
                zeros = torch.zeros(layer.units, dtype=torch.float64)
                sums = {batch: self._ranks.all_sum(layer.gathered.get(batch, zeros)) for batch in self.batches}
                layer.gathered = sums if self._ranks.rank == 0 else {}
        for site in self._sites:
            # A rank that saw nothing of a module holds no sums of it; whether any holds some must be agreed first.
            seen = bool(self._ranks.all_sum(torch.tensor(len(site.sums))))
            sums_of_site = site.statistics() if seen else {}
            total = {key: self._ranks.all_sum(value) for key, value in sorted(sums_of_site.items())}
            site.sums = total if self._ranks.rank == 0 else {}

    def tensors(self) -> Tensors:
        """Return what this rank has gathered, by name; `restore` reads it."""
        found: Tensors = {}
        for layer in self._layers:
            if isinstance(layer, WeightLayer) and layer.gathered is not None:
                found[f"weight:{layer.name}"] = layer.gathered.cpu().clone()
            if isinstance(layer, UnitLayer):
                found |= {f"units:{layer.name}:{batch}": sums.cpu().clone() for batch, sums in layer.gathered.items()}
        for site in self._sites:
            found |= {f"site:{site.name}:{key}": value.cpu().clone() for key, value in site.sums.items()}
        return found

    def restore(self, batches: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `batches` and `tensors()` held on rank 0 after `share()`.

        Rank 0 takes the sums over ranks, the others start anew: added up they are what they were.
        """
        self.batches = list(batches)
        first = self._ranks.rank == 0
        for layer in self._layers:
            if isinstance(layer, WeightLayer):
                found = tensors.get(f"weight:{layer.name}")
                layer.gathered = None if found is None else found.to(layer.weight.device, copy=True)
            if isinstance(layer, UnitLayer):
                sums = _below(tensors, f"units:{layer.name}:") if first else {}
                layer.gathered = {int(batch): value for batch, value in sums.items()}
        for site in self._sites:
            site.sums = _below(tensors, f"site:{site.name}:") if first else {}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}

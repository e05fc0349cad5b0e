"""What criteria need besides the weights: gathered in a window before a refresh, kept by checkpoints, then released."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Batches, Layer, Ranks, UnitLayer, WeightLayer
from emp_callbacks.layer.features import agree_on_size, known_size
from emp_callbacks.layer.shared_sums import sum_together, together
from emp_callbacks.targets.features import FeatureSite
from emp_callbacks.targets.forward_site import ForwardSite
from emp_callbacks.targets.positions import check_positions

Tensors = dict[str, Tensor]

# So many batches are kept apart; older ones are folded into sums, so that long windows take no more memory.
KEPT_APART = 64
_APART, _FOLDED = "apart", "folded"


class Evidence:
    """The evidence of all layers on this rank, and the hooks that gather it.

    Args:
        layers: What is scored.
        sites: Hooks on modules.
        criterion: Says what it needs.
        ranks: The job's processes.

    Attributes:
        batches: The optimizer steps whose gradients were gathered and are kept apart, the same on every rank.
        folded: How many batches there were before these, of which only sums are kept.
    """

    def __init__(
        self, layers: Sequence[Layer], sites: Sequence[ForwardSite], criterion: Criterion, ranks: Ranks
    ) -> None:
        self._layers, self._sites, self._criterion, self._ranks = layers, sites, criterion, ranks
        self._reads_gradients = False
        self.batches: list[int] = []
        self.folded = 0
        self._gathered: set[int] = set()  # owners whose gradients of the last batch are taken

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

    @property
    def reads_positions(self) -> bool:
        """Whether what is gathered now depends on which positions of the batch count."""
        return any(site.observing and site.reads_positions for site in self._sites)

    def count_positions(self, mask: Tensor | None) -> None:
        """Let only some positions of the next batch be evidence, until the next call.

        Args:
            mask: Shape (B, T), nonzero where a position counts, as a tokenizer's attention mask; None: all do.

        Raises:
            TypeError: It is no tensor.
            ValueError: It is not of shape (B, T).
        """
        counted = None if mask is None else check_positions(mask, "the mask of positions") != 0
        for site in self._sites:
            site.positions = counted

    def gradients_ready(self, owners: Collection[int], step: int, scale: Tensor | None) -> None:
        """Take the gradients of these owners, by id, as part of the batch of an optimizer step, if they are needed.

        Those of one owner are taken once per step: not again when a closure is called again, or a step that raised is
        repeated.
        """
        if self._reads_gradients:
            self._gather(owners, step, scale)

    def collect(self, owners: Collection[int]) -> None:
        """Take the gradients that are there now as a batch of their own."""
        self._gather(owners, -1 - self.folded - len(self.batches), None)

    def gathered(self) -> Batches:
        """Return the batches whose gradients were gathered."""
        return Batches(tuple(self.batches), self.folded)

    @torch.no_grad()
    def _gather(self, owners: Collection[int], batch: int, scale: Tensor | None) -> None:
        def per_weight(weight: Tensor, gradient: Tensor) -> Tensor:
            wide = torch.promote_types(weight.dtype, torch.float32)  # a product of two fp16 numbers may vanish
            whole = gradient.to_dense() if gradient.is_sparse else gradient  # of an embedding's rows
            given = whole.to(wide) if scale is None else whole.to(wide) / scale
            return self._criterion.of_batch(weight.to(wide), given)

        if not self.batches or self.batches[-1] != batch:
            self._begin(batch)
        new = set(owners) - self._gathered
        self._gathered |= new
        for layer in self._layers:
            layer.gather(new, batch, per_weight)

    def _begin(self, batch: int) -> None:
        """Open a batch; the others are over on every rank, so that old ones can be folded. Collective now and then."""
        if len(self.batches) >= KEPT_APART:
            self._fold()
            self.folded += len(self.batches)
            self.batches.clear()
        self.batches.append(batch)
        self._gathered.clear()

    def _fold(self) -> None:
        def work(i: int) -> None:
            self._layers[i].fold(self.batches)

        together([layer.asking for layer in self._layers], work, self._ranks)

    def release(self) -> None:
        """Forget what was gathered."""
        self.batches.clear()
        self.folded = 0
        self._gathered.clear()
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
        first = self._ranks.rank == 0
        units = [layer for layer in self._layers if isinstance(layer, UnitLayer)]
        for layer, sums in zip(units, sum_together([self._apart(layer) for layer in units], self._ranks), strict=True):
            layer.gathered = {batch: sums[str(batch)] for batch in self.batches} if first else {}
        # A rank that saw nothing of a module holds no sums of it; whether any holds some must be agreed first.
        known = [known_size(site) if isinstance(site, FeatureSite) else {} for site in self._sites]
        seen = [{"seen": torch.tensor(len(site.sums)), **size} for site, size in zip(self._sites, known, strict=True)]
        agreed = sum_together(seen, self._ranks)
        for site, sums in zip(self._sites, agreed, strict=True):
            if isinstance(site, FeatureSite):
                agree_on_size(site, sums, self._ranks)
        own = [site.statistics() if sums["seen"] else {} for site, sums in zip(self._sites, agreed, strict=True)]
        for site, total in zip(self._sites, sum_together(own, self._ranks), strict=True):
            site.sums = total if first else {}

    def _apart(self, layer: UnitLayer) -> Tensors:
        """Return this rank's sums of every batch, by its number."""
        zeros = torch.zeros(layer.units, dtype=torch.float64)
        return {str(batch): layer.gathered.get(batch, zeros).cpu() for batch in self.batches}

    def tensors(self) -> Tensors:
        """Return what this rank has gathered, by name; `restore` reads it."""
        found: Tensors = {_FOLDED: torch.tensor(self.folded)} if self.folded else {}
        for layer in self._layers:
            if isinstance(layer, WeightLayer) and layer.gathered is not None:
                found[f"weight:{layer.name}"] = layer.gathered.cpu().clone()
            if isinstance(layer, UnitLayer):
                if layer.gathered:
                    nothing = torch.zeros(layer.units, dtype=torch.float64)
                    parts = [layer.gathered.get(batch, nothing) for batch in self.batches]
                    found[f"units:{layer.name}:{_APART}"] = torch.stack([part.cpu() for part in parts])
                if layer.folded is not None:
                    found[f"units:{layer.name}:{_FOLDED}"] = layer.folded.cpu().clone()
        for site in self._sites:
            found |= {f"site:{site.name}:{key}": value.cpu().clone() for key, value in site.sums.items()}
        return found

    def restore(self, batches: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `batches` and `tensors()` held on rank 0 after `share()`.

        Rank 0 takes the sums over ranks, the others start anew: added up they are what they were. Of folded batches
        every rank knows the sums over ranks.
        """
        self.batches, self._gathered = list(batches), set()
        self.folded = int(tensors[_FOLDED]) if _FOLDED in tensors else 0
        first = self._ranks.rank == 0
        for layer in self._layers:
            if isinstance(layer, WeightLayer):
                found = tensors.get(f"weight:{layer.name}")
                layer.gathered = None if found is None else found.to(layer.weight.device, copy=True)
            if isinstance(layer, UnitLayer):
                sums = _below(tensors, f"units:{layer.name}:")
                layer.folded = sums.pop(_FOLDED, None)
                parts = sums.pop(_APART, torch.zeros(0, layer.units)).unbind()
                earlier = {int(batch): value for batch, value in sums.items()}  # each by itself, in older states
                layer.gathered = {**earlier, **dict(zip(batches, parts, strict=False))} if first else {}
        for site in self._sites:
            site.sums = _below(tensors, f"site:{site.name}:") if first else {}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}

"""What every layer offers: components that are scored together, their mask, the evidence gathered about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from torch import Tensor

from emp_callbacks.layer.mask_mode import MaskedWeight
from emp_callbacks.layer.observers import Observer
from emp_callbacks.layer.segment import Span
from emp_callbacks.targets.forward_site import ForwardSite

PerWeight = Callable[[Tensor, Tensor], Tensor]
"""What a gradient criterion makes of a weight and its gradient in one batch; same shape."""


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


class Layer(ABC):
    """Components that are scored together and compete with those of other layers.

    Attributes:
        weights: The masked parameters that the layer's mask decides on; none where a module's output is masked.
        sites: Hooks on modules that gather evidence for this layer, or mask its module's output.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.weights: list[MaskedWeight] = []
        self.sites: list[ForwardSite] = []

    @property
    @abstractmethod
    def span(self) -> Span:
        """Where this rank's components lie in the layer."""

    @property
    @abstractmethod
    def mask(self) -> Tensor | None:
        """This rank's part of the mask, bool, True = kept; None before the first refresh."""

    @abstractmethod
    def put_mask(self, mask: Tensor) -> list[Tensor]:
        """Take a new mask and return what it means for each of `weights`, in their layouts."""

    def put_back(self, mask: Tensor, mean: Tensor | None) -> None:  # noqa: ARG002
        """Take a mask, and what pruned features become, as a checkpoint held them; `weights` get theirs elsewhere."""
        self.put_mask(mask)

    @property
    def name(self) -> str:
        """Name of the layer in the user's model."""
        return self.span.name

    @property
    def is_known(self) -> bool:
        """Whether the number of components is known: that of a module's features only once it was called."""
        return True

    @property
    def mask_or_ones(self) -> Tensor:
        """The mask; all True before the first refresh."""
        return self._ones() if self.mask is None else self.mask

    @abstractmethod
    def _ones(self) -> Tensor: ...

    # ---- evidence -------------------------------------------------------------------------------------------------

    def gather(self, owners: Collection[int], batch: int, per_weight: PerWeight) -> None:
        """Add what the gradients of one batch say.

        Args:
            owners: Ids of the tensors whose gradients are ready.
            batch: The optimizer step that they belong to.
            per_weight: Made of each weight and its gradient, then summed over the component.
        """

    @abstractmethod
    def evidence(self, batches: Sequence[int]) -> Tensor:
        """Return what was gathered, over all ranks: a number per component, same layout as `mask`. Collective.

        Args:
            batches: The optimizer steps whose gradients were gathered, the same on every rank.

        Raises:
            RuntimeError: Nothing was gathered.
        """

    def release(self) -> None:
        """Forget what gradients said; `sites` are reset by whoever attached them."""

    def _observed(self, observer: Observer, unseen: str) -> tuple[Tensor, float]:
        """Return an observer's sums and how many values went into each, over all ranks. Collective."""
        sums = self._summed(observer)
        if not bool(sums["count"] > 0):
            raise RuntimeError(
                f"nothing passed {observer.name!r} while {unseen} were gathered; no mask was changed. Run training "
                "steps before the refresh, make the pruner before a compiled model's first call, and exclude the "
                "module if it is never called as such"
            )
        return sums["total"], float(sums["count"])

    def _summed(self, site: ForwardSite) -> dict[str, Tensor]:
        """Return a site's statistics over all ranks, on the CPU. Collective."""
        return {key: self.ranks.all_sum(value).cpu() for key, value in sorted(site.statistics().items())}


def check_gathered(name: str, batches: Sequence[int]) -> None:
    """Raise RuntimeError, which says how to gather them, unless there are batches of gradients."""
    if not batches:
        raise RuntimeError(
            f"no gradients of {name!r} were gathered; no mask was changed. Run optimizer steps before the refresh; "
            "without an optimizer call collect() after each backward()"
        )

"""What every layer offers: components that are scored together, their mask, the evidence gathered about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.layer.observers import Observer
from emp_callbacks.layer.segment import Span
from emp_callbacks.layer.shared_sums import Asking, Parts, Ranks
from emp_callbacks.targets.forward_site import ForwardSite

PASSED_IN_EVAL = "passed_in_eval"
PerWeight = Callable[[Tensor, Tensor], Tensor]
"""What a gradient criterion makes of a weight and its gradient in one batch; same shape."""


class MissingEvidence(RuntimeError):  # noqa: N818
    """Nothing is known of a layer since the last refresh, on any rank: all ranks raise it together.

    Attributes:
        layer: Name of the layer.
        reason: What was missing, in words that fit into a row.
    """

    def __init__(self, layer: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.layer, self.reason = layer, reason

    def __reduce__(self) -> tuple[type[MissingEvidence], tuple[str, str, str]]:
        return type(self), (self.layer, self.reason, str(self))


@dataclass(frozen=True)
class Batches:
    """The batches whose gradients were gathered, the same on every rank.

    Attributes:
        steps: The optimizer steps of those that are kept apart.
        folded: How many there were before these, of which layers keep only sums.
    """

    steps: tuple[int, ...] = ()
    folded: int = 0

    @property
    def total(self) -> int:
        """Number of all batches."""
        return self.folded + len(self.steps)


class Layer(ABC):
    """Components that are scored together and compete with those of other layers.

    Attributes:
        ranks: The processes that train the model.
        asking: By which everything about this layer is summed over ranks; see `layer.shared_sums`.
        weights: The masked parameters that the layer's mask decides on; none where a module's output is masked.
        sites: Hooks on modules that gather evidence for this layer, or mask its module's output.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asking = Asking(ranks)
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

    def put_back(self, mask: Tensor | None, mean: Tensor | None) -> None:
        """Take a mask, and what pruned features become, as a checkpoint held them; `weights` get theirs elsewhere.

        None: the checkpoint is of before the first refresh.
        """

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

    def meet(self) -> None:
        """Agree over ranks on what only some of them have seen of the layer. Collective.

        Raises:
            MissingEvidence: No rank has seen what is needed to know its components.
        """

    @abstractmethod
    def evidence(self, batches: Batches) -> Tensor:
        """Return what was gathered, over all ranks: a number per component, same layout as `mask`. Collective.

        Args:
            batches: Of gradients.

        Raises:
            MissingEvidence: Nothing was gathered, on any rank.
        """

    def fold(self, batches: Sequence[int]) -> None:
        """Keep of these batches, which are over on every rank, no more than their sums. Collective."""

    def release(self) -> None:
        """Forget what gradients said; `sites` are reset by whoever attached them."""

    def _observed(self, observer: Observer, unseen: str) -> tuple[Tensor, Tensor]:
        """Return an observer's sums and how many values went into each, float64, over all ranks. Collective."""
        sums = self.asking.sums(lambda: seen_by(observer))
        if not bool(sums["count"].any()):
            what = f"nothing passed {observer.name!r} while {unseen} were gathered"
            raise nothing_passed(self.name, sums, what)
        return sums["total"], sums["count"]


def seen_by(site: ForwardSite, *, called: bool = True) -> Parts:
    """Return a site's statistics on this rank and, by `PASSED_IN_EVAL`, whether it was called in evaluation mode.

    `called` is False where no rank called the module: it may not know then what its statistics are.
    """
    passed = {PASSED_IN_EVAL: torch.tensor(float(site.passed_in_eval), dtype=torch.float64)}
    return {**site.statistics(), **passed} if called else passed


def nothing_passed(layer: str, sums: Mapping[str, Tensor], what: str) -> MissingEvidence:
    """Return the error of a layer whose site saw nothing on any rank.

    Args:
        layer: Name of the layer.
        sums: What `seen_by` says of its hooks, over all ranks.
        what: How the message begins.
    """
    if bool(sums[PASSED_IN_EVAL] > 0):
        return MissingEvidence(
            layer,
            "it was called in evaluation mode only",
            f"{what}: it was called in evaluation mode only; no mask was changed. Evidence is gathered in training: "
            "call train() on the model, or refresh without a schedule",
        )
    return MissingEvidence(
        layer,
        "nothing passed it",
        f"{what}; no mask was changed. Run training steps before the refresh (criteria that read gradients also need "
        "backward), or pass batches through a finished model, and exclude the module if it is never called as such",
    )


def check_gathered(name: str, batches: Batches) -> None:
    """Raise MissingEvidence, which says how to gather them, unless there are batches of gradients."""
    if not batches.total:
        raise MissingEvidence(
            name,
            "no gradients were gathered",
            f"no gradients of {name!r} were gathered; no mask was changed. Run optimizer steps before the refresh; "
            "without an optimizer call collect() after each backward()",
        )


def no_gradient(name: str) -> MissingEvidence:
    """Return the error of a layer of which the gathered batches say nothing, on any rank."""
    return MissingEvidence(
        name,
        "no gradient reached it",
        f"no gradient reached {name!r} in the gathered batches, or all that they say of it is 0; no mask was changed. "
        "Run more optimizer steps before the refresh, or exclude it",
    )

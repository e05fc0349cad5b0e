"""Features of a module's output, masked in the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from emp_callbacks.layer.base import Batches, Layer, MissingEvidence, nothing_passed, seen_by
from emp_callbacks.layer.segment import Span
from emp_callbacks.layer.shared_sums import Parts, Ranks
from emp_callbacks.targets.features import FeatureSite


@final
class FeatureLayer(Layer):
    """Features of one module's output, masked in the forward pass.

    Args:
        site: The module and its hooks.
        ranks: The job's processes.
        applied: Whether masks reach the forward pass; False to measure only.
    """

    def __init__(self, site: FeatureSite, ranks: Ranks, *, applied: bool) -> None:
        super().__init__(ranks)
        self.site, self._applied = site, applied
        self.sites = [site]
        self._mask: Tensor | None = None
        self._mean: Tensor | None = None
        self._found_mean: Tensor | None = None

    @property
    def span(self) -> Span:
        rank, ranks = self.ranks.rank, self.ranks.world_size
        size = self.site.size if self._mask is None else self._mask.numel()
        if size is None:
            raise _not_called(self.site.name)
        counted = slice(size * rank // ranks, size * (rank + 1) // ranks)
        shape = torch.Size([size])
        return Span(
            name=self.site.name,
            shape=shape,
            output_dim=0,
            positions=0,
            replicated=True,
            counted=counted,
            is_summed=True,
        )

    @property
    def is_known(self) -> bool:
        return self.site.size is not None or self._mask is not None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    @property
    def mean(self) -> Tensor | None:
        """What pruned features become with `center="mean"`, shape (size,), float64; else None."""
        return self._mean

    def put_mask(self, mask: Tensor) -> list[Tensor]:
        self.put_back(mask, self._found_mean)
        return []

    def put_back(self, mask: Tensor | None, mean: Tensor | None) -> None:
        self._mask, self._mean = mask, mean
        if mask is None:
            self.site.mask = None
        elif self._applied:
            self.site.install(mask, mean)

    def _ones(self) -> Tensor:
        return torch.ones(self.span.size, dtype=torch.bool)

    def meet(self) -> None:
        if agree_on_size(self.site, self.asking.sums(lambda: known_size(self.site)), self.ranks) is None:
            raise _not_called(self.name)

    def evidence(self, batches: Batches) -> Tensor:  # noqa: ARG002
        sums = self.asking.sums(lambda: seen_by(self.site))
        if not bool(sums["samples"] > 0):
            raise nothing_passed(self.name, sums, f"nothing passed {self.name!r} since the last refresh")
        self._found_mean = self.site.means(sums) if self.site.form.center == "mean" else None
        return self.site.scores(sums)


def known_size(site: FeatureSite) -> Parts:
    """Return whether this rank knows how many features there are, their number and its square, int64."""
    size = site.size or 0
    return {"size": torch.tensor([int(size > 0), size, size * size])}


def agree_on_size(site: FeatureSite, sums: Mapping[str, Tensor], ranks: Ranks) -> int | None:
    """Tell a rank that never called the module how many features it has; return it, None if none did.

    Args:
        site: The module.
        sums: What `known_size` says, over all ranks.
        ranks: Asked for all numbers where they differ.

    Raises:
        ValueError: Ranks have seen different numbers.
    """
    knowing, total, squares = sums["size"].tolist()
    if knowing * squares != total * total:  # equal for equal numbers only
        seen = {int(size) for size in ranks.from_all(torch.tensor(site.size or 0)).tolist()} - {0}
        raise ValueError(
            f"module {site.name!r} gave {' and '.join(map(str, sorted(seen)))} features on different ranks; one mask "
            "cannot serve them all: exclude it, and include modules whose outputs keep one size"
        )
    site.size = total // knowing if knowing else None
    return site.size


def _not_called(name: str) -> MissingEvidence:
    return MissingEvidence(
        name,
        "it was not called",
        f"module {name!r} has not been called, so its features are not known; no mask was changed. Run training steps "
        "before the refresh, or exclude the module",
    )

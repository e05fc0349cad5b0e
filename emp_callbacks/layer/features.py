"""Features of a module's output, masked in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from emp_callbacks.layer.base import Layer, Ranks
from emp_callbacks.layer.segment import Span
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
        size, rank, ranks = self.site.size, self.ranks.rank, self.ranks.world_size
        if size is None:
            raise RuntimeError(
                f"module {self.site.name!r} has not been called, so its features are not known; run training steps "
                "before the refresh, make the pruner before a compiled model's first call, or exclude the module"
            )
        counted = slice(size * rank // ranks, size * (rank + 1) // ranks)
        shape = torch.Size([size])
        return Span(name=self.site.name, shape=shape, output_dim=0, positions=0, replicated=True, counted=counted)

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

    def put_back(self, mask: Tensor, mean: Tensor | None) -> None:
        self._mask, self._mean = mask, mean
        if self._applied:
            self.site.install(mask, mean)

    def _ones(self) -> Tensor:
        return torch.ones(self.span.size, dtype=torch.bool)

    def evidence(self, batches: Sequence[int]) -> Tensor:  # noqa: ARG002
        sums = self._summed(self.site)
        if not bool(sums["samples"] > 0):
            raise RuntimeError(
                f"nothing passed {self.name!r} since the last refresh; no mask was changed. Run training steps before "
                "the refresh (for taylor and saliency with backward), or exclude the module"
            )
        self._found_mean = self.site.means(sums) if self.site.form.center == "mean" else None
        return self.site.scores(sums)

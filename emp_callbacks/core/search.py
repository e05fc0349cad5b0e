"""The moments and thresholds of many groups of scores; the one place that chooses how they are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.effective_number import score_moments
from emp_callbacks.core.kernels.choice import kernels_serve
from emp_callbacks.core.threshold import AllSum, Group, ScoredPart, Threshold, find_thresholds


class Search(Protocol):
    """Scores of many groups."""

    def look(self, share: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's moments of each part, shape (T, 3), float64. Collective.

        Args:
            share: Takes each group's effective number as a fraction of its size, shape (G,), float64, and returns the
                fraction that will be kept of it; a guess is enough.
        """

    def thresholds(self, keep: Sequence[int]) -> list[Threshold | None]:
        """Return the threshold that keeps exactly so many of each group. Collective, after `look`.

        Args:
            keep: Of each group, between 1 and the number of its scores that are not 0; 0: no threshold is asked for.
        """


@final
class HostSearch:
    """Scores that are looked at chunk by chunk; see `kernels.search.DeviceSearch` for the arguments."""

    def __init__(
        self,
        parts: Sequence[ScoredPart],
        group_of: Sequence[int],
        sizes: Sequence[int],
        dtype: torch.dtype,
        all_sum: AllSum,
    ) -> None:
        self._parts, self._group_of, self._sizes = parts, group_of, sizes
        self._dtype, self._all_sum = dtype, all_sum

    def look(self, share: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        return gather_rows([score_moments(part.scores[None]).stack()[0] for part in self._parts])

    def thresholds(self, keep: Sequence[int]) -> list[Threshold | None]:
        asked = [g for g, count in enumerate(keep) if count]
        parts: dict[int, list[ScoredPart]] = {g: [] for g in asked}
        for part, g in zip(self._parts, self._group_of, strict=True):
            if g in parts:
                parts[g].append(part)
        groups = [Group(parts[g], self._sizes[g], keep[g]) for g in asked]
        found: list[Threshold | None] = [None] * len(keep)
        for g, threshold in zip(asked, find_thresholds(groups, self._dtype, self._all_sum), strict=True):
            found[g] = threshold
        return found


def search_of(
    parts: Sequence[ScoredPart], group_of: Sequence[int], sizes: Sequence[int], dtype: torch.dtype, all_sum: AllSum
) -> Search:
    """Return the search through some parts; see `kernels.search.DeviceSearch` for the arguments."""
    if kernels_serve([part.scores for part in parts]):
        from emp_callbacks.core.kernels.search import DeviceSearch

        return DeviceSearch(parts, group_of, sizes, dtype, all_sum)
    return HostSearch(parts, group_of, sizes, dtype, all_sum)

"""What stays of a model whose weights all compete with each other, and do not fit memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import effective_numbers, key_dtype
from emp_callbacks.core.selection import kept_mass
from emp_callbacks.core.streamed_threshold import StreamedScores
from emp_callbacks.core.threshold import ScoredPart
from emp_callbacks.folders.layer_row import LayerRow
from emp_callbacks.pruning.groups import KeepRule

__all__ = ["GlobalChoice"]

NamedScores = Iterable[tuple[str, Tensor]]


class GlobalChoice:
    """The floor(beta * N_eff) highest scores of a whole model, one tensor of which is in memory at a time.

    Args:
        scores: Gives the name and the scores of each weight, the same at each call; it is called a few times.
        rule: How many stay.
        dtype: Of the scores.

    Raises:
        FloatingPointError: A score is NaN or Inf.
    """

    def __init__(self, scores: Callable[[], NamedScores], rule: KeepRule, dtype: torch.dtype) -> None:
        found = _Scores(scores)
        streamed = StreamedScores(found, key_dtype([dtype]))
        self._moments = dict(zip(found.sizes, torch.split(streamed.moments.stack(), 1), strict=True))
        for name, sums in self._moments.items():
            if not bool(torch.isfinite(sums).all()):
                raise FloatingPointError(f"{name} holds NaN or Inf; EMP needs finite weights: look for a diverged run")
        starts = torch.tensor([0, *found.sizes.values()]).cumsum(0).tolist()
        self._starts = dict(zip(found.sizes, starts, strict=False))
        together, size = streamed.moments.sum(), starts[-1]
        keep = int(rule.counts(effective_numbers(together), size, together.nonzero))
        self._threshold = streamed.threshold(keep) if int(together.nonzero) else None

    def of(self, name: str, scores: Tensor) -> tuple[Tensor, LayerRow]:
        """Return the mask of one weight, shape of its scores, True = kept, and what to tell of it."""
        flat = scores.reshape(-1)
        if self._threshold is None:
            mask, note = torch.ones_like(flat, dtype=torch.bool), "every score is 0: no information, nothing is pruned"
        else:
            mask, note = self._threshold.mask(ScoredPart(flat, self._starts[name])), ""
        total, total_sq, _ = self._moments[name][0].tolist()
        row = LayerRow(
            name=name,
            n=math.prod(scores.shape),
            n_eff=total * total / total_sq if total else 0.0,
            keep=int(mask.sum()),
            preserved_mass=float(kept_mass(flat, mask)) / total if total else 1.0,
            note=note,
        )
        return mask.view(scores.shape), row


class _Scores:
    """Scores alone, one tensor at a time; their sizes are known after the first look."""

    def __init__(self, scores: Callable[[], NamedScores]) -> None:
        self._scores = scores
        self.sizes: dict[str, int] = {}

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._seen, self._scores())

    def _seen(self, named: tuple[str, Tensor]) -> Tensor:
        self.sizes[named[0]] = named[1].numel()
        return named[1]

"""What an N:M pattern keeps: the N highest of every M neighbours along each weight's inputs, also across ranks.

A weight of shape (..., inputs, ...) lies in memory as slabs of M * (what follows the inputs): no group reaches beyond
its slab. A rank decides on the slabs that it holds whole. Of those that are cut, few where shards are contiguous, the
scores of all ranks are added up, all layers in one sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype, score_moments
from emp_callbacks.core.group_pattern import GroupPattern, group_mask, lowest_kept
from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.layer import Ranks
from emp_callbacks.pruning.groups import Decision, Scored, check_finite, sums_of_layers

_NONE, _ALL = -1, -2  # which slabs a rank holds a part of: besides a slab's number


def decide_pattern(layers: Sequence[Scored], pattern: GroupPattern, ranks: Ranks, step: int) -> list[Decision]:
    """Return one decision per layer. Collective; changes nothing.

    The arguments and errors are those of `decide`.
    """
    local = torch.stack([_moments(layer.counted.scores) for layer in layers])
    sums = ranks.all_sum(local).cpu()
    check_finite(local, sums, layers, ranks, step)
    own = sums_of_layers(ScoreMoments.unstack(sums))
    grouped = group_layers(layers, pattern, ranks)
    lowest = ranks.all_min(gather_rows([one.lowest() for one in grouped])).tolist()
    return [
        Decision(
            group=layer.span.name,
            members=(i,),
            n=layer.span.size,
            n_eff=own[i].n_eff,
            keep=layer.span.size // pattern.size * pattern.keep,
            threshold=lowest[i],
            layer_sums=(own[i],),
            digest=zlib.crc32(f"{pattern}".encode()),
            note="",
            is_top=False,
            mass_floor=pattern.density if own[i].mass else None,  # the N highest of M hold N/M of their mass at least
            mask=lambda i: grouped[i].mask(),
        )
        for i, layer in enumerate(layers)
    ]


def group_layers(layers: Sequence[Scored], pattern: GroupPattern, ranks: Ranks) -> list[GroupedLayer]:
    """Return each layer's scores in groups, those of cut slabs added up over ranks. Collective.

    Args:
        layers: Their scores may be infinite; of weights of two or more dimensions, whose inputs M divides.
        pattern: N and M.
        ranks: The job's processes.
    """
    grouped = [GroupedLayer(layer, pattern) for layer in layers]
    if ranks.world_size == 1 or all(layer.span.replicated for layer in layers):
        return grouped
    held = ranks.from_all(torch.tensor([one.ends for one in grouped])).unbind(1)
    for one, numbers in zip(grouped, held, strict=True):
        one.cut_at(numbers.flatten().tolist())
    dtype = key_dtype([layer.scores.dtype for layer in layers])
    device = layers[0].scores.device
    own = [one.of_cut_slabs(dtype) for one in grouped]
    together = ranks.all_sum(torch.cat([scores.to(device) for scores in own]))
    for one, scores in zip(grouped, torch.split(together, [len(scores) for scores in own]), strict=True):
        one.take(scores)
    return grouped


class GroupedLayer:
    """The scores that a rank holds of one layer, in slabs.

    Args:
        layer: The scores and where they lie.
        pattern: N and M.
    """

    def __init__(self, layer: Scored, pattern: GroupPattern) -> None:
        span = layer.span
        self._layer, self._pattern = layer, pattern
        self._beside = math.prod(span.shape[span.input_dim + 1 :])
        self._slab = pattern.size * self._beside
        self._scores = layer.scores.detach().reshape(-1)
        self._cut: Tensor = torch.zeros(0, dtype=torch.int64)  # numbers of the slabs that are cut, ascending
        self._cut_mask = torch.zeros(0, dtype=torch.bool)
        self._cut_lowest = torch.full((), torch.inf, dtype=torch.float64)
        size = len(self._scores)
        if isinstance(at := span.positions, int):
            first = min(-at % self._slab, size)
            self._whole = slice(first, first + (size - first) // self._slab * self._slab)
        else:
            self._whole = slice(0, 0)

    @property
    def ends(self) -> tuple[int, int]:
        """The numbers of the slabs of which this rank holds a part and not all: of a run at its ends."""
        at, size = self._layer.span.positions, len(self._scores)
        if not isinstance(at, int):
            return (_ALL, _ALL) if size else (_NONE, _NONE)
        first = at // self._slab if self._whole.start else _NONE
        last = (at + size - 1) // self._slab if self._whole.stop < size else _NONE
        return first, last

    def cut_at(self, ends: Sequence[int]) -> None:
        """Take note of the slabs that any rank holds a part of."""
        numbers = range(self._layer.span.size // self._slab) if _ALL in ends else sorted({*ends} - {_NONE})
        self._cut = torch.tensor([*numbers], dtype=torch.int64)

    def of_cut_slabs(self, dtype: torch.dtype) -> Tensor:
        """Return what this rank counts of the magnitudes in cut slabs, zeros elsewhere, flat."""
        part = self._layer.counted
        out = torch.zeros(len(self._cut) * self._slab, dtype=dtype, device=self._scores.device)
        places, held = self._places(part.positions, len(part.scores))
        out[places] = part.scores[held].detach().to(dtype).abs()
        return out

    def take(self, scores: Tensor) -> None:
        """Decide on the cut slabs by the magnitudes of all ranks."""
        groups = scores.to(self._scores.device).view(-1, self._pattern.size, self._beside)
        kept = group_mask(groups, self._pattern.keep)
        self._cut_mask, self._cut_lowest = kept.flatten(), lowest_kept(groups, kept)

    def mask(self) -> Tensor:
        """Return the mask, layout of the layer's scores."""
        kept = torch.empty(len(self._scores), dtype=torch.bool, device=self._scores.device)
        kept[self._whole] = group_mask(self._groups, self._pattern.keep).flatten()
        if len(self._cut):
            places, held = self._places(self._layer.span.positions, len(self._scores))
            kept[held] = self._cut_mask[places]
        return kept.view(self._layer.scores.shape)

    def lowest(self) -> Tensor:
        """Return the lowest kept score that this rank knows of, shape (), float64."""
        own = lowest_kept(self._groups, group_mask(self._groups, self._pattern.keep))
        return torch.minimum(own, to_device(self._cut_lowest, own.device))

    @property
    def _groups(self) -> Tensor:
        return self._scores[self._whole].view(-1, self._pattern.size, self._beside)

    def _places(self, positions: int | Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return where those of `size` components that lie in cut slabs are in these, and which they are."""
        if isinstance(positions, int):  # only a run's ends can lie there: few
            starts = (self._cut * self._slab).tolist()
            spans = [(max(start, positions), min(start + self._slab, positions + size)) for start in starts]
            flat = torch.cat([torch.arange(*one) for one in spans if one[0] < one[1]] or [self._cut[:0]])
            held = flat - positions
        else:
            flat, held = positions.cpu(), torch.arange(size)
        places = torch.searchsorted(self._cut, flat // self._slab) * self._slab + flat % self._slab
        device = self._scores.device
        return to_device(places, device), to_device(held, device)


def _moments(scores_n: Tensor) -> Tensor:
    if not scores_n.numel():
        return torch.zeros(3, dtype=torch.float64, device=scores_n.device)
    return score_moments(scores_n.reshape(1, -1)).stack()[0]

"""What a refresh would keep of weights that do not fit memory: their scores are made one tensor at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bounds import tight_mass_bounds
from emp_callbacks.core.effective_number import effective_numbers, key_dtype
from emp_callbacks.core.streamed_threshold import StreamedScores
from emp_callbacks.core.threshold import ALL_TIES, ScoredPart, Threshold
from emp_callbacks.layer import Ranks
from emp_callbacks.layer.segment import Span
from emp_callbacks.pruning.accounting import MaskCounts, count_mask, prune_event
from emp_callbacks.pruning.certificates import Certificates
from emp_callbacks.pruning.decision import NOTHING_KNOWN, decide
from emp_callbacks.pruning.groups import Decision, KeepRule, LayerSums, Scored, check_finite, sums_of_layers
from emp_callbacks.trajectory import PruneEvent

_UNCERTIFIED = Certificates({}, {})


class StreamedLayer(NamedTuple):
    """The scores of one layer.

    Attributes:
        span: Its components, all of them.
        dtype: Of the scores.
        make: Returns the scores, of either sign, the same ones at each call.
    """

    span: Span
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Observed(NamedTuple):
    """What one group would keep.

    Attributes:
        event: The row of the group.
        sums: N_eff and mass of each layer.
        nonzero: Of each layer how many scores are not 0.
    """

    event: PruneEvent
    sums: tuple[LayerSums, ...]
    nonzero: tuple[int, ...]


def observe_streamed(
    layers: Sequence[StreamedLayer], rule: KeepRule, ranks: Ranks, common: dict[str, Any]
) -> list[Observed]:
    """Return what `decide` would keep of each group, with the scores of one layer in memory at a time.

    With scope "global" they are made three to five times, of float64 seven times; all at once where the slices of a
    weight norm are guarded.

    Args:
        layers: What is scored.
        rule: How many components stay.
        ranks: One process.
        common: The fields that all rows share, see `prune_event`.

    Raises:
        FloatingPointError: A score is NaN or Inf.
        RuntimeError: A layer's scores are not the same at each call.
    """
    if common["scope"] != "global":
        return [_at_once([layer], rule, ranks, common) for layer in layers]
    if any(layer.span.never_empty is not None for layer in layers):
        return [_at_once(layers, rule, ranks, common)]
    return [_one_by_one(layers, rule, ranks, common)]


def _at_once(layers: Sequence[StreamedLayer], rule: KeepRule, ranks: Ranks, common: dict[str, Any]) -> Observed:
    scored = [Scored(layer.span, layer.make()) for layer in layers]
    (decision,) = decide(scored, common["scope"], rule, ranks, common["step"])
    counts = [_counts(one, decision.mask(i)) for i, one in enumerate(scored)]
    nonzero = tuple(int(torch.count_nonzero(one.scores)) for one in scored)
    return Observed(prune_event(decision, scored, counts, _UNCERTIFIED, common), decision.layer_sums, nonzero)


def _one_by_one(layers: Sequence[StreamedLayer], rule: KeepRule, ranks: Ranks, common: dict[str, Any]) -> Observed:
    """Return what layers that compete with each other would keep."""
    dtype = key_dtype([layer.dtype for layer in layers])
    scores = StreamedScores(_Scores(layers), dtype)
    spans = [Scored(layer.span, torch.empty(0)) for layer in layers]
    moments = scores.moments
    check_finite(moments.stack(), moments.stack(), spans, ranks, common["step"])
    together, sizes = moments.sum(), [layer.span.size for layer in layers]
    n_eff, is_known = effective_numbers(together), bool(together.nonzero)
    keep = rule.counts(n_eff, sum(sizes), together.nonzero)
    threshold = scores.threshold(int(keep)) if is_known else Threshold(0, ALL_TIES, dtype)
    starts = list(itertools.accumulate([0, *sizes]))

    def mask(i: int, scores: Tensor | None = None) -> Tensor:
        made = layers[i].make() if scores is None else scores
        return threshold.mask(ScoredPart(made.reshape(-1), starts[i])).view(made.shape)

    def count(i: int) -> MaskCounts:
        one = Scored(layers[i].span, layers[i].make())
        return _counts(one, mask(i, one.scores))

    members = tuple(range(len(layers)))
    decision = Decision(
        group="global",
        members=members,
        n=sum(sizes),
        n_eff=float(n_eff),
        keep=int(keep),
        threshold=threshold.value,
        layer_sums=tuple(sums_of_layers(moments)),
        digest=0,
        note="" if is_known else NOTHING_KNOWN,
        is_top=is_known,
        mass_floor=float(tight_mass_bounds(keep, sum(sizes), n_eff)) if is_known else None,
        mask=mask,
    )
    event = prune_event(decision, spans, list(map(count, members)), _UNCERTIFIED, common)
    return Observed(event, decision.layer_sums, tuple(moments.nonzero.long().tolist()))


class _Scores:
    """Makes the scores of layers anew each time that it is iterated over, and keeps none."""

    def __init__(self, layers: Sequence[StreamedLayer]) -> None:
        self._layers = layers

    def __iter__(self) -> Iterator[Tensor]:
        for layer in self._layers:
            yield layer.make()


def _counts(scored: Scored, mask: Tensor) -> MaskCounts:
    return MaskCounts(*count_mask(None, scored, mask).tolist())

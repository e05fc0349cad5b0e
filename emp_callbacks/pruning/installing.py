"""From decisions to masks in force: each mask made, counted and applied, on an accelerator in one pass for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.kernels.choice import kernels_serve
from emp_callbacks.core.row_parts import RowCuts
from emp_callbacks.layer import Layer
from emp_callbacks.layer.hiding import Places
from emp_callbacks.layer.mask_mode import MaskMode, States
from emp_callbacks.pruning.accounting import count_mask
from emp_callbacks.pruning.groups import Cut, Decision, Scored


class _Fused(NamedTuple):
    """A layer of one weight whose mask a kernel makes of its scores, counts and applies."""

    i: int
    cut: Cut | RowCuts
    places: Places | None


def install_masks(
    decisions: Sequence[Decision],
    new_mask: Callable[[Decision, int], Tensor],
    scored: Sequence[Scored],
    layers: Sequence[Layer],
    mode: MaskMode,
    states: Mapping[int, States],
) -> Tensor:
    """Give every layer its new mask; return this rank's MaskCounts of each, shape (L, 4), float64, on the CPU.

    Args:
        decisions: Of all groups.
        new_mask: Makes a layer's mask, as the mode wants it.
        scored: The scores of every layer.
        layers: Changed.
        mode: What masks mean.
        states: By the id of each weight, its part of the optimizer's tensors.
    """
    rows: dict[int, Tensor] = {}
    fused = [
        one
        for decision in decisions
        for i in decision.members
        if (one := _fused(i, decision, scored[i], layers[i], mode))
    ]
    for some in _alike(fused, scored):
        rows |= _choose(some, scored, layers, mode, states)
    # One layer after the other, so that no second mask of the whole model is held.
    for decision in decisions:
        for i in decision.members:
            if i in rows:
                continue
            mask = new_mask(decision, i)
            rows[i] = count_mask(layers[i].mask, scored[i], mask)
            weights = layers[i].weights
            mode.install_all(weights, layers[i].put_mask(mask), [states[id(weight)] for weight in weights])
    return gather_rows([rows[i] for i in range(len(layers))])


def _fused(i: int, decision: Decision, scored: Scored, layer: Layer, mode: MaskMode) -> _Fused | None:
    """Return what a kernel needs to make a layer's mask; None where it is made by itself."""
    if decision.cut is None or not scored.scores.is_contiguous() or not kernels_serve([scored.scores]):
        return None
    if len(layer.weights) != 1 or layer.weights[0].segment is not layer.span:  # units: their masks are few
        return None
    weight, old = layer.weights[0].weight, layer.mask
    if not weight.is_contiguous() or weight.device != scored.scores.device:
        return None
    if old is not None and (not old.is_contiguous() or old.device != weight.device):
        return None
    return _Fused(i, decision.cut(i), mode.places(layer.weights[0]))


def _alike(fused: Sequence[_Fused], scored: Sequence[Scored]) -> list[list[_Fused]]:
    """Return the layers in lists of one dtype of scores and of values, and one that scores compare in."""
    kinds: dict[tuple[object, ...], list[_Fused]] = {}
    for one in fused:
        width = None if one.places is None else one.places.source.element_size()
        kinds.setdefault((scored[one.i].scores.dtype, _dtype(one.cut), type(one.cut), width), []).append(one)
    return list(kinds.values())


def _dtype(cut: Cut | RowCuts) -> torch.dtype:
    """Return the dtype in which scores compare."""
    return cut.threshold.dtype if isinstance(cut, Cut) else cut.value.dtype


def _ties_end(cut: Cut) -> int:
    return cut.part.count_up_to(cut.threshold.last_tie)


def _choose(
    fused: Sequence[_Fused],
    scored: Sequence[Scored],
    layers: Sequence[Layer],
    mode: MaskMode,
    states: Mapping[int, States],
) -> dict[int, Tensor]:
    """Make, count and apply the masks of some layers in one launch; return the counts by layer."""
    from emp_callbacks.core.kernels.choosing import Choice, OneCut, choose_tensors

    choices = []
    for i, cut, places in fused:
        scores, old = scored[i].scores, layers[i].mask
        size = scores.numel()
        begin, end, _ = scored[i].span.counted.indices(size)
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        rule = OneCut(cut.threshold.value, _ties_end(cut)) if isinstance(cut, Cut) else cut
        choices.append(Choice(scores, rule, (begin, end), old, mask, *(places or (None, None))))
    counts = choose_tensors(choices, _dtype(fused[0].cut), within_old=mode.keeps_pruned)
    weights = [layers[one.i].weights[0] for one in fused]
    masks = [layers[one.i].put_mask(choice.mask)[0] for one, choice in zip(fused, choices, strict=True)]
    written = fused[0].places is not None
    mode.install_all(weights, masks, [states[id(weight)] for weight in weights], written=written)
    return dict(zip([one.i for one in fused], counts.unbind(0), strict=True))

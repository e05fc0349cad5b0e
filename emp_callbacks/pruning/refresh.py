"""One recomputation of all masks: score -> moments -> keep count -> selection -> mask -> apply -> rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.core.masked_values import zero_pruned
from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.accounting import MaskCounts, check_ranks_agree, count_mask, dynamic_event, prune_event
from emp_callbacks.pruning.assembly import DynamicSite
from emp_callbacks.pruning.certificates import Certificates, certify
from emp_callbacks.pruning.decision import Decision, KeepRule, Scored, decide
from emp_callbacks.trajectory import PruneEvent


def refresh_masks(
    layers: Sequence[Layer],
    criterion: Criterion,
    rule: KeepRule,
    mode: MaskMode,
    backend: Backend,
    common: dict[str, Any],
    *,
    certified: bool = False,
) -> list[PruneEvent]:
    """Give every layer, whose dense weights are in place, a new mask, and return the rows. Collective.

    Args:
        layers: What is scored and masked.
        criterion: How.
        rule: How many components stay.
        mode: What the masks mean.
        backend: The parallel strategy.
        common: The fields that all rows share, see `prune_event`.
        certified: Whether the rows say what pruning can have changed at most.

    Raises:
        FloatingPointError: A score is NaN or Inf; no mask was changed.
        RuntimeError: Evidence is missing, or ranks disagree; no mask was changed.
    """
    scores = [criterion.score(layer) for layer in layers]
    if criterion.signed == "shift":
        scores = _shifted(scores, common["scope"], backend)
    visible = [_visible(values, layer, criterion, mode) for values, layer in zip(scores, layers, strict=True)]
    scored = [Scored(layer.span, values) for layer, values in zip(layers, visible, strict=True)]
    decisions = decide(scored, common["scope"], rule, backend, common["step"])

    def new_mask(decision: Decision, i: int) -> Tensor:
        return mode.merge(layers[i].mask, decision.mask(i))

    check_ranks_agree(decisions, new_mask, layers, backend, common["step"])
    certificates = certify(decisions, scored, new_mask, layers, criterion) if certified else Certificates({}, {})
    states = {
        id(weight): backend.optimizer_states(weight.segment) if mode.clears_states else []
        for layer in layers
        for weight in layer.weights
    }
    # From here on nothing can fail. One layer after the other, so that no second mask of the whole model is held.
    rows = {}
    for decision in decisions:
        for i in decision.members:
            mask = new_mask(decision, i)
            rows[i] = count_mask(layers[i], scored[i], mask)
            for weight, part in zip(layers[i].weights, layers[i].put_mask(mask), strict=True):
                mode.install(weight, part, states[id(weight)])
    sums = backend.all_sum(gather_rows([rows[i] for i in range(len(layers))]))
    counts = [MaskCounts(*row) for row in sums.tolist()]
    return [prune_event(decision, scored, counts, certificates, common) for decision in decisions]


def refresh_dynamic(
    sites: Sequence[DynamicSite], backend: Backend, applied: bool, common: dict[str, Any]
) -> list[PruneEvent]:
    """Switch on the masks that every sample or query row makes for itself, and return the row. Collective.

    Args:
        sites: Where they are made.
        backend: The parallel strategy.
        applied: Whether they reach the forward pass.
        common: The fields of the row that are known already.

    Raises:
        RuntimeError: Nothing passed a site; nothing was changed.
    """
    sums = [{key: float(backend.all_sum(value)) for key, value in sorted(s.statistics().items())} for s in sites]
    event = dynamic_event(sites, sums, common)
    for site in sites:
        site.active = applied
    return [event]


def _shifted(scores: Sequence[Tensor], scope: str, backend: Backend) -> list[Tensor]:
    """Return the scores above the lowest of those that compete: of all layers, or of their own. Collective."""
    nothing = torch.full((), torch.inf, dtype=torch.float64)
    own = torch.stack([values.double().min().cpu() if values.numel() else nothing for values in scores])
    lowest = backend.from_all(own).amin(0)
    lowest = lowest.amin().expand_as(lowest) if scope == "global" else lowest
    return [values - low.to(values) for values, low in zip(scores, lowest, strict=True)]


def _visible(scores: Tensor, layer: Layer, criterion: Criterion, mode: MaskMode) -> Tensor:
    """Return a layer's scores; what `freeze` has pruned scores 0, also where the criterion does not see that."""
    sees_it = criterion.zero_scores_zero and bool(layer.weights)  # of features, nothing is zeroed but their output
    if mode.name != "freeze" or layer.mask is None or sees_it:
        return scores
    hidden = scores.clone()
    zero_pruned(hidden, layer.mask)
    return hidden

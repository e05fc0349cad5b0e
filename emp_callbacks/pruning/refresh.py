"""One recomputation of all masks: score -> moments -> keep count -> selection -> mask -> apply -> rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.core.chunks import count_true, gather_rows
from emp_callbacks.core.masked_values import zero_pruned
from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, MissingEvidence, Ranks
from emp_callbacks.layer.base import PASSED_IN_EVAL, nothing_passed, seen_by
from emp_callbacks.layer.features import agree_on_size, known_size
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.shared_sums import sum_together, together
from emp_callbacks.pruning.accounting import (
    MaskCounts,
    check_ranks_agree,
    dynamic_event,
    prune_event,
    unscored_event,
    unscored_note,
    with_note,
)
from emp_callbacks.pruning.assembly import DynamicSite
from emp_callbacks.pruning.certificates import Certificates, certify
from emp_callbacks.pruning.decision import decide
from emp_callbacks.pruning.groups import Decision, KeepRule, Scored
from emp_callbacks.pruning.installing import install_masks
from emp_callbacks.pruning.regrowth import Regrowth
from emp_callbacks.targets.features import FeatureSite
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
    regrowth: Regrowth | None = None,
) -> list[PruneEvent]:
    """Give every layer, whose dense weights are in place, a new mask, and return the rows. Collective.

    A layer without evidence keeps the mask that it has and takes no part in what its group decides; the rows say so.

    Args:
        layers: What is scored and masked.
        criterion: How.
        rule: How many components stay.
        mode: What the masks mean.
        backend: The parallel strategy.
        common: The fields that all rows share, see `prune_event`.
        certified: Whether the rows say what pruning can have changed at most.
        regrowth: What is replaced, in "rewire".

    Raises:
        FloatingPointError: A score is NaN or Inf; no mask was changed.
        MissingEvidence: There is none for any layer; no mask was changed.
        RuntimeError: Ranks disagree; no mask was changed.
    """
    found = scores_of(layers, criterion, backend)
    nothing = [scores for scores in found if isinstance(scores, MissingEvidence)]
    if len(nothing) == len(found):
        raise nothing[0]
    if mode.name == "freeze" and nothing:
        found = _or_frozen(found, layers, backend)
    pairs = list(zip(layers, found, strict=True))
    known = [(layer, scores) for layer, scores in pairs if isinstance(scores, Tensor)]
    missing = {layer.name: error for layer, error in pairs if isinstance(error, MissingEvidence)}
    scored = [layer for layer, _ in known]
    events = _refresh_scored(
        scored, [scores for _, scores in known], criterion, rule, mode, backend, common,
        certified=certified, regrowth=regrowth,
    )  # fmt: skip
    if not missing:
        return events
    left_out = [layer for layer in layers if layer.name in missing]
    counts = backend.all_sum(gather_rows([_take_as_it_is(layer, mode, backend) for layer in left_out]))
    if common["scope"] == "global":
        return [with_note(event, unscored_note(list(missing.values()))) for event in events]
    # A row for every layer, as in any other refresh.
    rows = {event.group: event for event in events}
    for layer, (kept,) in zip(left_out, counts.tolist(), strict=True):
        rows[layer.name] = unscored_event(layer, int(kept), missing[layer.name], common)
    return [rows[layer.name] for layer in layers]


def scores_of(layers: Sequence[Layer], criterion: Criterion, ranks: Ranks) -> list[Tensor | MissingEvidence]:
    """Return each layer's scores, or what says why it has none. Collective: all ranks have them or none."""

    def work(i: int) -> Tensor | MissingEvidence:
        try:
            layers[i].meet()
            return criterion.score(layers[i])
        except MissingEvidence as error:
            return error

    return together([layer.asking for layer in layers], work, ranks)


def _refresh_scored(
    layers: Sequence[Layer],
    scores: Sequence[Tensor],
    criterion: Criterion,
    rule: KeepRule,
    mode: MaskMode,
    backend: Backend,
    common: dict[str, Any],
    *,
    certified: bool,
    regrowth: Regrowth | None,
) -> list[PruneEvent]:
    """Give every layer the mask that its scores decide, and return the rows; see `refresh_masks`. Collective."""
    scored = competing(layers, scores, criterion, mode, common["scope"], backend)
    if rule.pattern is not None and mode.keeps_pruned:
        scored = [_frozen(one, layer) for one, layer in zip(scored, layers, strict=True)]
    if regrowth is None:
        decisions = decide(scored, common["scope"], rule, backend, common["step"])
    else:
        decisions = regrowth.decide(layers, scored, common["scope"], rule, backend, common["step"])

    def new_mask(decision: Decision, i: int) -> Tensor:
        return mode.merge(layers[i].mask, decision.mask(i))

    check_ranks_agree(decisions, new_mask, layers, backend, common["step"])
    certificates = (
        certify(decisions, scored, new_mask, layers, criterion, backend) if certified else Certificates({}, {})
    )
    states = {
        id(weight): backend.optimizer_states(weight.segment) if mode.clears_states else []
        for layer in layers
        for weight in layer.weights
    }
    # From here on nothing can fail.
    if mode.clears_states:
        backend.forget_histories()
    sums = backend.all_sum(install_masks(decisions, new_mask, scored, layers, mode, states))
    counts = [MaskCounts(*row) for row in sums.tolist()]
    return [prune_event(decision, scored, counts, certificates, common) for decision in decisions]


def competing(
    layers: Sequence[Layer],
    scores: Sequence[Tensor],
    criterion: Criterion,
    mode: MaskMode,
    scope: str,
    backend: Backend,
) -> list[Scored]:
    """Return the scores by which components compete: none below 0, and 0 of what `freeze` has pruned. Collective."""
    if criterion.signed == "shift":
        scores = _shifted(scores, scope, backend)
    visible = [_visible(values, layer, criterion, mode) for values, layer in zip(scores, layers, strict=True)]
    return [Scored(layer.span, values) for layer, values in zip(layers, visible, strict=True)]


class Selection(NamedTuple):
    """What a refresh would keep.

    Attributes:
        masks: Parameter name -> bool mask, layout of the parameter, True = kept; not of layers without evidence.
        keep: Components that are kept, all of those in layers without evidence.
        n: All components.
    """

    masks: dict[str, Tensor]
    keep: int
    n: int


def selections_of(
    layers: Sequence[Layer], criterion: Criterion, mode: MaskMode, backend: Backend, scope: str
) -> Callable[[KeepRule], Selection]:
    """Return what says, for any rule, what it selects by the scores of now; no mask is changed. Collective.

    The scores are computed here, once, and may be the weights themselves: when it is asked, these are to hold what they
    hold now.

    Raises:
        MissingEvidence: There is none for any layer.
    """
    found = scores_of(layers, criterion, backend)
    nothing = [scores for scores in found if isinstance(scores, MissingEvidence)]
    if len(nothing) == len(found):
        raise nothing[0]
    pairs = [(layer, scores) for layer, scores in zip(layers, found, strict=True) if isinstance(scores, Tensor)]
    known = [layer for layer, _ in pairs]
    scored = competing(known, [scores for _, scores in pairs], criterion, mode, scope, backend)
    n = sum(layer.span.size for layer in layers)

    def select(rule: KeepRule) -> Selection:
        masks, pruned = {}, []
        for decision in decide(scored, scope, rule, backend, step=0):
            for i in decision.members:
                mask, before = decision.mask(i), known[i].mask
                pruned.append(count_true(~mask.reshape(-1)[scored[i].span.counted]))
                for weight, part in zip(known[i].weights, known[i].put_mask(mask), strict=True):
                    masks[weight.name] = part
                known[i].put_back(before, None)
        return Selection(masks, n - int(backend.all_sum(gather_rows(pruned).sum())), n)

    return select


def _take_as_it_is(layer: Layer, mode: MaskMode, backend: Backend) -> Tensor:
    """Leave a layer's mask as it is and return how many components this rank counts as kept, shape (1,).

    Before its first mask all is kept. Weights get that as a mask: files hold the masks of all parameters or of none.
    """
    if layer.mask is None and layer.weights:
        for weight, part in zip(layer.weights, layer.put_mask(layer.mask_or_ones), strict=True):
            mode.install(weight, part, [])  # of the optimizer's states nothing is to be cleared
    if layer.mask is None:
        return torch.tensor([float(layer.span.size) if layer.is_known and backend.rank == 0 else 0.0])
    return _own_kept(layer.mask, layer)


def _own_kept(mask: Tensor, layer: Layer) -> Tensor:
    return count_true(mask.reshape(-1)[layer.span.counted]).double().reshape(1)


def _or_frozen(
    found: Sequence[Tensor | MissingEvidence], layers: Sequence[Layer], backend: Backend
) -> list[Tensor | MissingEvidence]:
    """Return zeros for a layer of which `freeze` has left nothing: no gradient can reach it, as is known. Collective.

    Of others without evidence what says so.
    """
    masks = {i: layer.mask for i, layer in enumerate(layers) if layer.mask is not None}
    if not masks:
        return list(found)
    own = gather_rows([_own_kept(mask, layers[i]) for i, mask in masks.items()])
    kept = dict(zip(masks, backend.all_sum(own).flatten().tolist(), strict=True))
    return [
        scores if isinstance(scores, Tensor) or kept.get(i, 1) else torch.zeros_like(masks[i], dtype=torch.float32)
        for i, scores in enumerate(found)
    ]


def refresh_dynamic(
    sites: Sequence[DynamicSite], backend: Backend, applied: bool, common: dict[str, Any]
) -> list[PruneEvent]:
    """Switch on the masks that every sample or query row makes for itself, and return the row. Collective.

    They need no evidence; the row leaves out the sites that nothing passed, and says so.

    Args:
        sites: Where they are made.
        backend: The parallel strategy.
        applied: Whether they reach the forward pass.
        common: The fields of the row that are known already.

    Raises:
        MissingEvidence: Nothing passed any site; nothing was changed.
    """
    sums = _sums_over_ranks(sites, backend)
    numbers = [{key: float(value) for key, value in found.items() if key != PASSED_IN_EVAL} for found in sums]
    seen = [(site, found) for site, found in zip(sites, numbers, strict=True) if any(found.values())]
    silent = [
        nothing_passed(site.name, found, f"nothing passed {site.name!r} since the last refresh")
        for site, found, own in zip(sites, sums, numbers, strict=True)
        if not any(own.values())
    ]
    if not seen:
        raise silent[0]
    event = dynamic_event([site for site, _ in seen], [found for _, found in seen], common)
    for site in sites:
        site.active = applied
    return [with_note(event, unscored_note(silent, "not in these numbers")) if silent else event]


def _sums_over_ranks(sites: Sequence[DynamicSite], backend: Backend) -> list[dict[str, Tensor]]:
    """Return what `seen_by` says of each site, over all ranks; no statistics where no rank called it. Collective."""
    sizes = sum_together([known_size(site) if isinstance(site, FeatureSite) else {} for site in sites], backend)
    called = [
        not isinstance(site, FeatureSite) or agree_on_size(site, sums, backend) is not None
        for site, sums in zip(sites, sizes, strict=True)
    ]
    own = [seen_by(site, called=known) for site, known in zip(sites, called, strict=True)]
    return sum_together(own, backend)


def _shifted(scores: Sequence[Tensor], scope: str, backend: Backend) -> list[Tensor]:
    """Return the scores above the lowest of those that compete: of all layers, or of their own. Collective."""
    nothing = torch.full((), torch.inf, dtype=torch.float64)
    own = torch.stack([values.double().min().cpu() if values.numel() else nothing for values in scores])
    lowest = backend.all_min(own)
    lowest = lowest.amin().expand_as(lowest) if scope == "global" else lowest
    return [values - low.to(values) for values, low in zip(scores, lowest, strict=True)]


def _frozen(scored: Scored, layer: Layer) -> Scored:
    """Return scores of which what is kept is above 0: else a pruned neighbour could take its place in an N:M group."""
    if layer.mask is None:
        return scored
    magnitude = scored.scores.abs()
    above = magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny)
    return scored._replace(scores=torch.where(layer.mask, above, 0.0))


def _visible(scores: Tensor, layer: Layer, criterion: Criterion, mode: MaskMode) -> Tensor:
    """Return a layer's scores; what `freeze` has pruned scores 0, also where the criterion does not see that."""
    sees_it = criterion.zero_scores_zero and bool(layer.weights)  # of features, nothing is zeroed but their output
    if mode.name != "freeze" or layer.mask is None or sees_it:
        return scores
    hidden = scores.clone()
    zero_pruned(hidden, layer.mask)
    return hidden

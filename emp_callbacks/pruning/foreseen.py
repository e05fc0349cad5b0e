"""What a refresh would decide, and its rows, without any mask put in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.core.chunks import gather_rows
from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer, MissingEvidence
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.accounting import MaskCounts, check_ranks_agree, count_mask, prune_event
from emp_callbacks.pruning.certificates import Certificates
from emp_callbacks.pruning.decision import decide
from emp_callbacks.pruning.groups import Decision, KeepRule, Scored
from emp_callbacks.pruning.refresh import competing, scores_of
from emp_callbacks.trajectory import PruneEvent


class Foreseen(NamedTuple):
    """What was scored and decided.

    Attributes:
        scored: The scores of every layer.
        decisions: Of all groups.
        masks: Of every layer, what it would be given.
        events: The rows.
    """

    scored: list[Scored]
    decisions: list[Decision]
    masks: list[Tensor]
    events: list[PruneEvent]


def foresee(
    layers: Sequence[Layer],
    criterion: Criterion,
    rule: KeepRule,
    mode: MaskMode,
    backend: Backend,
    common: dict[str, Any],
    before: Sequence[Tensor | None],
) -> Foreseen:
    """Return what a refresh of units would decide now. Collective; changes nothing.

    Args:
        layers: What is scored.
        criterion: How.
        rule: How many components stay.
        mode: What masks would mean.
        backend: The parallel strategy.
        common: The fields that all rows share, see `prune_event`.
        before: Of every layer the mask that the rows count flips from; None: all are kept.

    Raises:
        FloatingPointError: A score is NaN or Inf.
        MissingEvidence: There is none for one of the layers.
        RuntimeError: Ranks disagree.
    """
    scores = []
    for found in scores_of(layers, criterion, backend):
        if isinstance(found, MissingEvidence):
            raise found
        scores.append(found)
    scored = competing(layers, scores, criterion, mode, common["scope"], backend)
    decisions = decide(scored, common["scope"], rule, backend, common["step"])
    check_ranks_agree(decisions, lambda decision, i: decision.mask(i), layers, backend, common["step"])
    masks = {i: decision.mask(i) for decision in decisions for i in decision.members}
    rows = [count_mask(before[i], scored[i], masks[i]) for i in range(len(layers))]
    counts = [MaskCounts(*row) for row in backend.all_sum(gather_rows(rows)).tolist()]
    events = [prune_event(decision, scored, counts, Certificates({}, {}), common) for decision in decisions]
    return Foreseen(scored, decisions, [masks[i] for i in range(len(layers))], events)

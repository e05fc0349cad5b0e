"""Does every copy of a weight agree with its mask?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.targets import canonical_name

COPIES = ("owner", "forward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Entries that contradict the mask, over all ranks.

    Attributes:
        owner: Pruned entries that are not 0 in what the optimizer updates (the parameter or the fp32 master).
        forward: The same in the copy that forward reads, where that is another tensor (ZeRO's low-precision copy).
        optimizer: Pruned entries of momentum and second moments that are not as of a weight that never moved, where the
            mode clears them (`project`, `freeze`).
        worst: Name of the parameter with the most such entries; empty if there are none.
        worst_count: Its entries, over all copies.
    """

    owner: int
    forward: int
    optimizer: int
    worst: str
    worst_count: int

    @property
    def clean(self) -> bool:
        """Whether every copy agrees with the mask."""
        return self.worst_count == 0


@torch.no_grad()
def audit_masks(weights: Sequence[MaskedWeight], mode: MaskMode, backend: Backend) -> Audit:
    """Return what contradicts the masks. Collective; changes nothing.

    In `project`, entries that grew back since the last refresh are counted: they contradict the mask by design.
    With `observe_only` nothing is applied, so nothing is checked.
    """
    if not weights:  # features and edges are masked in the forward pass, where no copy can differ
        return Audit(owner=0, forward=0, optimizer=0, worst="", worst_count=0)
    # Where a weight was replaced since, what counts is what the model has.
    named = backend.module.named_parameters(remove_duplicate=False) if backend.can_follow else ()
    now = {canonical_name(name): parameter.detach() for name, parameter in named}
    counts = torch.zeros(len(weights), len(COPIES), dtype=torch.int64)
    for i, weight in enumerate(weights if mode.name != "observe" else ()):
        states = backend.optimizer_states(weight.segment) if mode.clears_states else []
        own = now.get(weight.name, weight.weight)
        own = own if own.shape == weight.weight.shape else weight.weight
        for k, copies in enumerate(([own], backend.forward_copies(weight.segment))):
            counts[i, k] = sum(_contradictions(weight, values, 0.0) for values in copies)
        # Codes of 8-bit optimizers are cleared like the rest, but their own rounding turns a 0 into a near code.
        exact = [(values, neutral) for values, neutral in states if values.is_floating_point()]
        counts[i, -1] = sum(_contradictions(weight, values, neutral) for values, neutral in exact)
    counts = backend.all_sum(counts)
    owner, forward, optimizer = counts.sum(0).tolist()
    worst = int(counts.sum(1).argmax())
    total = int(counts[worst].sum())
    name = weights[worst].name if total else ""
    return Audit(owner=owner, forward=forward, optimizer=optimizer, worst=name, worst_count=total)


def _contradictions(weight: MaskedWeight, values: Tensor, neutral: float) -> int:
    if weight.mask is None:
        return 0
    part = weight.segment.counted
    return int(((values != neutral) & ~weight.mask).reshape(-1)[part].sum())

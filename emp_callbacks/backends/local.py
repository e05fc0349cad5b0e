"""Whole parameters on every rank: one process, or DDP replicas."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from emp_callbacks.backends.base import Backend
from emp_callbacks.backends.shared_memory import check_apart
from emp_callbacks.layer.segment import Segment
from emp_callbacks.targets import WeightTarget


class LocalBackend(Backend):
    """Parameters that every rank holds in full.

    Each rank counts its own chunk of every replica and the counts are summed, so the ranks decide from the same
    numbers.
    """

    name = "local"
    can_follow = True

    def segments(self, targets: Sequence[WeightTarget]) -> list[Segment]:
        check_apart(targets)
        return [
            Segment(
                name=target.name,
                shape=target.parameter.shape,
                output_dim=target.output_dim,
                stacked=target.stacked,
                owner=target.parameter,
                view=_whole,
                positions=0,
                replicated=True,
                counted=self._chunk(target.parameter.numel()),
            )
            for target in targets
        ]

    def _chunk(self, size: int) -> slice:
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)


def _whole(tensor: Tensor) -> Tensor:
    return tensor

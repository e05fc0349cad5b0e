"""How the tasks of the studies are optimised: parameter groups, and a learning rate that rises and falls."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn

__all__ = ["check_optimization", "decay_groups", "warm_restarts", "warmup_cosine", "with_schedule"]


def check_optimization(optimizer: str, warmup_fraction: float, restarts: Sequence[float] | None, final: float) -> None:
    """Raise ValueError where a task's optimizer or the shape of its learning rate cannot be."""
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(f"optimizer must be adamw or sgd, got {optimizer!r}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must lie in [0, 1), got {warmup_fraction}")
    if not 0 <= final < 1:
        raise ValueError(f"final_lr_fraction must lie in [0, 1), got {final}")
    if not all(before < after for before, after in pairwise([0, *(restarts or ()), 1])):
        raise ValueError(f"lr_restarts must be increasing parts of the training in (0, 1), got {restarts}")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: weights with decay; biases, norms and other 1-D parameters without."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, total: int, warmup: int, final: float = 0.0) -> float:
    """Return the factor on the learning rate, in [0, 1]: linear for `warmup` steps, then a cosine to `final`.

    Examples:
        >>> [round(warmup_cosine(step, total=6, warmup=2), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warm_restarts(step: int, starts: Sequence[int], total: int, warmup_fraction: float, final: float = 0.0) -> float:
    """Return the factor on the learning rate, in [0, 1], of a schedule that begins anew at each of `starts`.

    Each segment, up to the next start or to `total`, is a `warmup_cosine` over its own length: SGDR (Loshchilov and
    Hutter, arXiv:1608.03983, eq. 5, with `final` for the lowest rate), with a warm-up in front of each cosine. With a
    restart where the network is pruned, what follows is trained from the highest rate down to the lowest: the idea of
    learning-rate rewinding (Renda et al., arXiv:2003.02389), which goes back to an earlier point of one schedule.

    Args:
        step: Optimizer steps done, >= 0.
        starts: First step of each segment, increasing; starts[0] is 0.
        total: Steps of the training, more than starts[-1].
        warmup_fraction: Part of each segment in which the rate rises, in [0, 1).
        final: Factor at the end of each segment, in [0, 1).

    Examples:
        >>> [round(warm_restarts(step, [0, 4], total=6, warmup_fraction=0.0), 2) for step in range(7)]
        [1.0, 0.85, 0.5, 0.15, 1.0, 0.5, 0.0]
    """
    segment = bisect_right(starts, step)
    start, end = starts[segment - 1], [*starts, total][segment]
    return warmup_cosine(step - start, end - start, int(warmup_fraction * (end - start)), final)


def with_schedule(
    task: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    warmup_fraction: float,
    restarts: Sequence[float],
    final: float,
) -> OptimizerLRScheduler:
    """Return an optimizer with its learning rate over the steps of the fit: see `warm_restarts`.

    Raises:
        ValueError: The fit has no end, or a restart lies on no step of its own.
    """
    if task.trainer.estimated_stepping_batches == math.inf:
        raise ValueError("the cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    total = int(task.trainer.estimated_stepping_batches)
    starts = [0, *(round(restart * total) for restart in restarts)]
    if not all(before < after for before, after in pairwise([*starts, total])):
        raise ValueError(
            f"lr_restarts {list(restarts)} are the optimizer steps {starts[1:]} of {total}: each must lie in the "
            "training and differ from the others; move them apart, or train for more steps"
        )
    factor = partial(warm_restarts, starts=starts, total=total, warmup_fraction=warmup_fraction, final=final)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

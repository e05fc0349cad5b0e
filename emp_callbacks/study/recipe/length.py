"""How long a Trainer trains, from the number of batches that a rank sees in an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Length", "training_length"]


@dataclass(frozen=True)
class Length:
    """Of a training.

    Attributes:
        steps: Optimizer steps; None: nothing ends it, or nobody knows how long an epoch is.
        steps_of_epoch: Of an epoch; None: the data have no length.
        epochs: Epochs that end, the last perhaps before its time; None: not known.
    """

    steps: int | None
    steps_of_epoch: int | None
    epochs: int | None


def training_length(trainer: Any, batches: int | None) -> Length:
    """Return how long a Trainer trains.

    Args:
        trainer: Its limits are read.
        batches: That a rank sees in an epoch; None: the data have no length.
    """
    limit, most = trainer.limit_train_batches, trainer.max_steps
    if isinstance(limit, float) and batches is not None:
        batches = int(batches * limit)
    elif isinstance(limit, int) and not isinstance(limit, bool):
        batches = limit if batches is None else min(batches, limit)
    of_epoch = None if batches is None else math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    ends = [of_epoch * epochs] if of_epoch is not None and epochs is not None else []
    steps = min([*ends, *([most] if most >= 0 else [])], default=None)
    if steps is None or not of_epoch:
        return Length(steps, of_epoch, None)
    return Length(steps, of_epoch, math.ceil(steps / of_epoch))

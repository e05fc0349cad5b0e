"""Where a Trainer's fit stands, in the numbers that a pruner counts in."""

from __future__ import annotations

import math
from typing import Any


def steps_so_far(trainer: Any) -> int:
    """Return the batches in which an optimizer stepped, however many of them did: the x of Lightning's own metrics.

    `trainer.global_step` counts every optimizer by itself.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def epoch_length(trainer: Any) -> int | None:
    """Return the optimizer steps of an epoch; None where the data do not say, or the module steps by itself."""
    batches: float = trainer.num_training_batches
    if not math.isfinite(batches) or not trainer.lightning_module.automatic_optimization:
        return None
    steps: int = math.ceil(batches / trainer.accumulate_grad_batches)
    return steps


def is_last_step(trainer: Any) -> bool:
    """Return whether the fit ends after this batch."""
    if trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps):
        return True
    return bool(trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1)


def end_bar(trainer: Any) -> None:
    """End what draws on the terminal, so that what follows stands below it.

    Lightning's bar of rich is drawn until its `teardown`, after every other hook; that of tqdm has ended by then.
    """
    drawn = getattr(trainer.progress_bar_callback, "progress", None)
    if drawn is not None:
        drawn.stop()

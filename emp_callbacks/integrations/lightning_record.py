"""Where a callback's rows and numbers go in Lightning: loggers, metrics that others monitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emp_callbacks.integrations.lightning_progress import steps_so_far
from emp_callbacks.integrations.record import log_values
from emp_callbacks.trajectory import PruneEvent, Trajectory


class ElsewhereTrajectory(Trajectory):
    """The empty trajectory of a callback that has seen no fit in this process."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return []
        raise IndexError(
            "this callback has no rows: no fit has refreshed in this process. After a fit in processes of its own "
            "(strategy='ddp_spawn', 'ddp_notebook') read them with Trajectory.read(PATH) from the run's folder"
        )


def check_told_apart(callback: Any, callbacks: Sequence[Any]) -> None:
    """Raise ValueError where another callback has the same key in checkpoints: one state would be put into both.

    Args:
        callback: The callback.
        callbacks: All EMPCallbacks of the Trainer.
    """
    if any(other is not callback and other.state_key == callback.state_key for other in callbacks):
        raise ValueError(
            f"two EMPCallbacks have the same settings ({callback.state_key}), so a checkpoint cannot tell them apart: "
            "give each a name of its own, EMPCallback(name='first', ...)"
        )


def log(trainer: Any, events: Sequence[PruneEvent], name: str) -> None:
    """Give the rows of a refresh to the loggers, and to callbacks that monitor a value, whatever bars there are."""
    values = log_values(events, name)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=steps_so_far(trainer))
    publish(trainer, values)


def publish(trainer: Any, values: dict[str, float]) -> None:
    """Let ModelCheckpoint, EarlyStopping and file names use the values."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})

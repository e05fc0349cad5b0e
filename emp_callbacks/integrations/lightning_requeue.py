"""Slurm's signal before a time limit, answered between two steps, and by all ranks between the same two."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

__all__ = ["RequeueBetweenSteps"]

_SIGNAL = signal.SIGUSR1  # SLURMEnvironment's, by default


class RequeueBetweenSteps(pl.Callback):
    """Lets Lightning save and requeue a Slurm job at the end of a step, the same one on all ranks.

    Left to itself, Lightning saves inside its handler of the signal, wherever a rank is when it arrives. A rank may
    then wait in the checkpoint's barrier for one that waits for it to sum gradients: nothing goes on until the time
    limit ends the job, unfinished and not requeued. And what it saves may be half a step. Here the signal is only
    noted, and Lightning's handler runs once a step has ended by which any rank had noted it.

    It does nothing outside Slurm. The time between signal and limit has to be enough for the longest of `every_n_steps`
    steps, of a validation, and for the checkpoint. Collective after every so many steps: one number.

    Args:
        every_n_steps: Steps between two questions to the other ranks, >= 1.

    Raises:
        ValueError: `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self._every_n_steps = every_n_steps
        self._answer: Callable[[int, None], Any] | None = None
        self._noted = False
        self._steps = self._global_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Take the place of Lightning's handler, where it has one."""
        handler = signal.getsignal(_SIGNAL)
        self._answer = handler if callable(handler) else None
        self._noted, self._steps, self._global_step = False, 0, trainer.global_step
        if self._answer:
            signal.signal(_SIGNAL, self._note)

    def _note(self, *_: object) -> None:
        self._noted = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Answer what was noted, after a whole step: of half an accumulated one a checkpoint keeps no gradients."""
        if self._answer is None or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._steps += 1
        if self._steps % self._every_n_steps == 0 and trainer.strategy.reduce_boolean_decision(self._noted, all=False):
            self._noted = False
            self._answer(_SIGNAL, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Give the signal back."""
        if self._answer:
            signal.signal(_SIGNAL, self._answer)  # type: ignore[arg-type]
            self._answer = None

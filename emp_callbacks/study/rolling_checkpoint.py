"""What a training that is cut off goes on from: one checkpoint, replaced now and then and when a signal says stop."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import SIGTERMException

from emp_callbacks.checkpoint.whole_output import appearing

__all__ = ["RollingCheckpoint"]

_REQUEUE = signal.Signals.SIGUSR1 if hasattr(signal, "SIGUSR1") else None  # a scheduler's: the time is nearly over
_ASKED_EVERY = 10  # steps after which several ranks agree: they get a signal at different steps


class RollingCheckpoint(pl.callbacks.Checkpoint):
    """Saves after steps from which Lightning resumes to the same end, and ends the training after SIGTERM and SIGUSR1.

    Those are all full optimizer steps where the training loader says where it stands (`state_dict`), but for the last
    of an epoch and those before a validation; with other loaders the ends of epochs. After SIGUSR1 in a Slurm job the
    job is requeued.

    Args:
        path: The file.
        minutes: Time between two checkpoints, >= 0; with 0 each such step has one.

    Raises:
        SIGTERMException: From the training, once a signal arrived and the checkpoint is saved.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self._path, self._seconds = path, 60 * minutes
        self._told: int | None = None
        self._saved_at, self._step = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self._saved_at, self._step = time.monotonic(), trainer.global_step
        self._listen()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self._listen()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self._stop_if_told(trainer)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's own handlers, which save in the middle of a step, and on several ranks wait for
            # each other at different ones; it puts back what there was before.
            for number in {signal.SIGTERM, _REQUEUE} - {None}:
                signal.signal(number, self._tell)  # type: ignore[arg-type]

    def _tell(self, number: int, _: FrameType | None) -> None:
        self._told = number

    def on_train_batch_end(self, trainer: pl.Trainer, *told: Any) -> None:
        batch_idx: int = told[-1]
        steps, self._step = trainer.global_step - self._step, trainer.global_step
        asked = trainer.world_size == 1 or trainer.global_step % _ASKED_EVERY == 0
        if steps and asked and not trainer.is_last_batch and not _validates_after(trainer, batch_idx):
            self._save_or_stop(trainer, resumable=_says_where_it_stands(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        ends = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if not ends:
            self._save_or_stop(trainer, resumable=True)

    def _save_or_stop(self, trainer: pl.Trainer, *, resumable: bool) -> None:
        """Save if it is time or a signal came, on whichever rank, and stop after a signal. Collective."""
        due = resumable and time.monotonic() - self._saved_at >= self._seconds
        if trainer.strategy.reduce_boolean_decision(due or self._told is not None, all=False):
            if resumable:
                self._save(trainer)
            self._stop_if_told(trainer)
            self._saved_at = time.monotonic()

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        decide = trainer.strategy.reduce_boolean_decision
        if decide(self._told is not None, all=False):
            if decide(self._told == _REQUEUE, all=False) and trainer.is_global_zero:
                _requeue()
            raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            with appearing(self._path, folder=False) as partial:
                trainer.save_checkpoint(partial)
        else:
            trainer.save_checkpoint(self._path)  # which writes nothing on this rank


def _validates_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch: Lightning would leave it out of a training that is resumed between."""
    every = trainer.val_check_batch
    if every is None or not math.isfinite(every):
        return False
    done = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (done + 1) % int(every) == 0


def _says_where_it_stands(trainer: pl.Trainer) -> bool:
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    return all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders)


def _requeue() -> None:
    """Ask Slurm to start this job again, where it is one."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is not None and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", job], check=True)

"""Tasks that learn from a dense model as well: the teacher's life in a Lightning fit."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from emp_callbacks.distillation import Distillation

_KEY = "emp_teacher"


def check_teacher(distill: Distillation | None, pretrained: object) -> None:
    """Raise ValueError where the teacher would be a network that nobody trained."""
    if distill is not None and distill.teacher is None and not pretrained:
        raise ValueError(
            "distill without a teacher learns from the network as the fit begins, and this one begins untrained: name "
            "a trained one, distill: {teacher: dense.ckpt}, or begin from pretrained weights"
        )


class DistilledTask(pl.LightningModule):
    """A task whose training loss may have a teacher's part; validation and test are of the task alone.

    The teacher is taken as a fit begins, before EMP prunes. One that is a copy of the model travels in the checkpoints,
    so that a resumed run learns from the same. It is no submodule: neither optimizers nor EMP see it.

    Attributes:
        model: The network that is trained.
        distill: How it learns from the teacher; None: not at all.
    """

    model: nn.Module
    distill: Distillation | None = None
    _teacher: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not registered
    _held: dict[str, Tensor] | None = None

    def logits_of(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return what a network of this task's kind says of a batch."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Find the teacher: of this run's beginning, also where it is resumed."""
        if self.distill is None or (self._teacher and self._held is None):
            return
        if self.distill.teacher is None and self._held is None and self.trainer.ckpt_path is not None:
            raise ValueError(
                f"{self.trainer.ckpt_path} holds no teacher, so that of its run is not known: name it, "
                "distill: {teacher: dense.ckpt}"
            )
        teacher = self.distill.teacher_for(self.model)
        if self._held is not None:
            teacher.load_state_dict(self._held)
        self._teacher, self._held = (teacher.to(self.device),), None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold the teacher that is nowhere else."""
        if self._teacher and self.distill is not None and self.distill.teacher is None:
            checkpoint[_KEY] = self._teacher[0].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the teacher of the run that goes on."""
        self._held = checkpoint.get(_KEY)

    def training_loss(self, task: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss to minimise, and log the task's and the teacher's part.

        Args:
            task: The task's loss, shape ().
            logits: What the model said of the batch.
            inputs: The batch.
        """
        self.log("train/loss", task)
        if self.distill is None or not self._teacher or not self.training:  # a step outside of a fit: for evidence
            return task
        with torch.no_grad():
            said = self.logits_of(self._teacher[0], inputs)
        distilled = self.distill.loss(logits, said)
        self.log("train/distillation_loss", distilled)
        return self.distill.mixed(task, distilled)

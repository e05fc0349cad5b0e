"""What a training was given and how it went: digests of weights and batches, the validation curve."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from emp_callbacks.integrations.lightning import EMPCallback

OnStep = Callable[[int, int | None], None]


class TrainingRecord(pl.Callback):
    """Digests of initial weights and of every training batch, and the validation curve.

    The curve's `train/loss` is the mean over the batches since the point before.
    """

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self.init_digest = ""
        self.batches = hashlib.sha256()
        self.curve: list[dict[str, float]] = []
        self.steps = 0
        self._losses: list[Tensor] = []
        self._emp: EMPCallback | None = None
        self._active: dict[str, Tensor] = {}
        self._seen_at = 0

    def watch(self, emp: EMPCallback) -> None:
        """Follow the masks of a callback, for `explored`."""
        self._emp = emp

    @property
    def explored(self) -> float | None:
        """Share of the weights that were ever kept, where masks move and hold zeros ("rewire"); elsewhere None.

        Source: the in-time over-parameterization rate R_s of Liu et al., arXiv:2102.02887.
        """
        self._take_masks()
        if not self._active:
            return None
        return sum(int(mask.sum()) for mask in self._active.values()) / sum(m.numel() for m in self._active.values())

    def _take_masks(self) -> None:
        pruner = self._emp.pruner if self._emp is not None else None
        if pruner is None or pruner.config.mode != "rewire" or pruner.clock.steps_at_refresh == self._seen_at:
            return
        self._seen_at = pruner.clock.steps_at_refresh
        for name, mask in pruner.weight_masks.items():
            here = mask.cpu()
            self._active[name] = here | self._active[name] if name in self._active else here.clone()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        hasher = hashlib.sha256()
        for name, value in pl_module.state_dict().items():
            hasher.update(name.encode())
            _update(hasher, value)
        self.init_digest = hasher.hexdigest()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        _update(self.batches, batch)
        self._take_masks()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:  # noqa: ARG002
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            self._losses.append(outputs["loss"].detach())  # read later: a GPU is not made to wait at every step
        self.steps = trainer.global_step
        expected = trainer.estimated_stepping_batches
        self._on_step(self.steps, int(expected) if math.isfinite(expected) else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        trained = {"train/loss": float(torch.stack(self._losses).mean())} if self._losses else {}
        self._losses.clear()
        self.curve.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **trained, **metrics})


def _update(hasher: Any, value: Any) -> None:
    """Feed tensors and plain values, however nested, to a hash."""
    if isinstance(value, Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            hasher.update(repr(key).encode())
            _update(hasher, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(hasher, item)
    else:
        hasher.update(repr(value).encode())

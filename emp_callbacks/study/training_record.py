"""What a training was given and how it went: digests of weights and batches, the validation curve."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.study.random_state import random_state, set_random_state

OnStep = Callable[[int, int | None], None]


class TrainingRecord(pl.Callback):
    """Digests of initial weights and of every training batch, and the validation curve.

    The curve's `train/loss` is the mean over the batches since the point before, of all ranks. A checkpoint holds all
    of it, and the states of the random generators: a training that is resumed ends as if it had not been interrupted.
    """

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self.init_digest = ""
        self._batches = b""  # a chain of digests: a hash in the making cannot be saved
        self._trainer: pl.Trainer | None = None
        self._random: dict[str, Any] | None = None  # to go on with
        self._started, self._seconds_before = 0.0, 0.0
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

    @property
    def seconds(self) -> float:
        """Seconds since `begin`, and those before the checkpoint that the training goes on from."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def batches_digest(self) -> str:
        """Of the batches of all ranks, as 64 hexadecimal digits. Collective."""
        digests = self._of_all_ranks(self._batches.hex())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def _of_all_ranks(self, value: Any) -> list[Any]:
        assert self._trainer is not None
        strategy, rank = self._trainer.strategy, self._trainer.global_rank
        return [strategy.broadcast(value if i == rank else None, src=i) for i in range(self._trainer.world_size)]

    def state_dict(self) -> dict[str, Any]:
        """Collective: each rank has its own batches, losses and random numbers, and rank 0 writes the checkpoint."""
        losses = [float(loss) for loss in self._losses]
        return {
            "init_digest": self.init_digest,
            "curve": self.curve,
            "steps": self.steps,
            "active": self._active,
            "seen_at": self._seen_at,
            "seconds": self.seconds,
            "ranks": self._of_all_ranks({"batches": self._batches.hex(), "losses": losses, "random": random_state()}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self._trainer is not None
        own = state_dict["ranks"][self._trainer.global_rank]
        self._batches, self._random = bytes.fromhex(own["batches"]), own["random"]
        self.init_digest, self.curve, self.steps = (state_dict[name] for name in ("init_digest", "curve", "steps"))
        self._losses = [torch.tensor(loss) for loss in own["losses"]]
        self._active, self._seen_at = state_dict["active"], state_dict["seen_at"]
        self._seconds_before = state_dict["seconds"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        self._trainer = trainer

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self._resume_random_numbers()

    def _resume_random_numbers(self) -> None:
        """Go on with the generators as they were: not before, because making loaders and iterators draws from them."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        if self.init_digest:  # of the weights that the interrupted training began with
            return
        self.init_digest = digest_of(pl_module)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        self._resume_random_numbers()
        hasher = hashlib.sha256(self._batches)
        _update(hasher, batch)
        self._batches = hasher.digest()
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
        trained = {"train/loss": self._mean_loss(trainer)} if self._losses else {}
        self._losses.clear()
        self.curve.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **trained, **metrics})

    def _mean_loss(self, trainer: pl.Trainer) -> float:
        mean = torch.tensor([float(loss) for loss in self._losses]).mean().to(trainer.strategy.root_device)
        return float(trainer.strategy.reduce(mean, reduce_op="mean"))


def digest_of(module: nn.Module) -> str:
    """Return a hash of a module's weights and buffers, as 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    for name, value in module.state_dict().items():
        hasher.update(name.encode())
        _update(hasher, value)
    return hasher.hexdigest()


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

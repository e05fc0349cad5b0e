"""One training of a study: fit, test, and the proof of what it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, score_moments
from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.pruner import EMPPruner
from emp_callbacks.study.recipe import Recipe
from emp_callbacks.targets.weights import prunable_weights

__all__ = ["Training", "measure"]

Adapt = Callable[[EMPConfig], EMPConfig]
OnStep = Callable[[int, int | None], None]

# These end a run early or choose weights by a metric: arms would no longer be trained alike.
_UNFAIR = (pl.callbacks.EarlyStopping, pl.callbacks.Timer)
# What the study replaces by its own: bars and tables, and checkpoints (final weights are tested).
_REPLACED = (pl.callbacks.ProgressBar, pl.callbacks.ModelSummary, pl.callbacks.Checkpoint, EMPCallback)

_LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
# Advice of Lightning's on speed and logging that a comparison of small runs need not repeat per run.
_NOISE = (
    r".*does not have many workers",
    r".*The number of training batches \(.*smaller than the logging interval",
    r".*isinstance\(treespec, LeafSpec\)",
    r".*`?isinstance.treespec, LeafSpec.",
    r".*GPU available but not used",
)


class Training:
    """A fit of the recipe as one arm wants it; `record` then tests the weights as they are.

    Args:
        recipe: Gives fresh model, data and trainer.
        seed: Seeds initial weights, batch order and dropout.
        adapt: Turns the EMP settings of the recipe into those of the arm.
        folder: Where Lightning's logs and the trajectory go.
        on_step: Called after each optimizer step with (steps done, steps in all if known).
    """

    def __init__(self, recipe: Recipe, seed: int, adapt: Adapt, folder: Path, on_step: OnStep) -> None:
        self._adapt = adapt
        self.evidence = _Evidence(on_step)
        pl.seed_everything(seed, workers=True, verbose=False)
        with _quiet():
            recipe.build(
                self._callbacks,
                logger=CSVLogger(str(folder), name="", version=""),
                default_root_dir=str(folder),
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
        self.model, self.data, self.trainer = recipe.model, recipe.datamodule, recipe.trainer
        _check_single_process(self.trainer)
        self.seconds = 0.0

    def fit(self) -> None:
        """Train; raises KeyboardInterrupt if the user stopped it."""
        started = time.perf_counter()
        with _quiet(), _interrupts_raised(self.trainer):
            self.trainer.fit(self.model, datamodule=self.data)
        self.seconds = time.perf_counter() - started

    def prune_once(self, trajectory_path: Path) -> list[dict[str, Any]]:
        """Apply EMP once to the trained weights, without fine-tuning; return the trajectory rows."""
        started = time.perf_counter()
        # A beta that moves during training has arrived at its last value.
        beta = self.config.beta_at(sys.maxsize)
        config = dataclasses.replace(self.config, mode="project", observe_only=False, beta=beta)
        pruner = EMPPruner(self.model, config=config, trajectory_path=trajectory_path)
        pruner.start_at(self.evidence.steps, self.trainer.current_epoch)
        pruner.refresh()
        pruner.finalize()
        self.seconds += time.perf_counter() - started
        return pruner.trajectory.records()

    def record(self, trajectory: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Test the current weights and return the run's record, with everything measured on them."""
        with _quiet(), _interrupts_raised(self.trainer):
            (metrics,) = self.trainer.test(self.model, datamodule=self.data, verbose=False)
        rows = self.emp.trajectory.records() if trajectory is None else trajectory
        return {
            "metrics": {name: float(value) for name, value in metrics.items()},
            **measure(self.model, self.config),
            "steps": self.evidence.steps,
            "refreshes": len({row["step"] for row in rows}),
            "seconds": self.seconds,
            "curve": self.evidence.curve,
            "trajectory": rows,
            "init_digest": self.evidence.init_digest,
            "batches_digest": self.evidence.batches.hexdigest(),
        }

    def _callbacks(self, own: list[pl.Callback]) -> list[pl.Callback]:
        for callback in own:
            if isinstance(callback, _UNFAIR):
                raise ValueError(
                    f"trainer.callbacks holds {type(callback).__name__}, which ends some arms earlier than others;"
                    " remove it from the recipe and fix trainer.max_epochs or trainer.max_steps"
                )
        found = [callback.config for callback in own if isinstance(callback, EMPCallback)]
        if len(found) > 1:
            raise ValueError(f"trainer.callbacks holds {len(found)} EMPCallbacks; a study needs one at most")
        # A recipe without EMP still says what to compare: one refresh per epoch.
        self.config = self._adapt(found[0] if found else EMPConfig(every_n_epochs=1))
        settings = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(EMPConfig)}
        self.emp = EMPCallback(summary=False, **settings)
        kept = [callback for callback in own if not isinstance(callback, _REPLACED)]
        return [self.evidence, *kept, self.emp]


class _Evidence(pl.Callback):
    """Digests of initial weights and of every training batch, and the validation curve."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self.init_digest = ""
        self.batches = hashlib.sha256()
        self.curve: list[dict[str, float]] = []
        self.steps = 0

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

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.steps = trainer.global_step
        expected = trainer.estimated_stepping_batches
        self._on_step(self.steps, int(expected) if math.isfinite(expected) else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        self.curve.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **metrics})


def measure(model: nn.Module, config: EMPConfig) -> dict[str, float]:
    """Return `density`, `n`, `keep` and `n_eff` of the weights as they are, by the config's targets and scope.

    `keep` counts weights that are not zero; `n_eff` is the effective number of these final weights
    (magnitude scores; summed over groups for the scopes tensor and row).
    """
    targets = prunable_weights(model, config.include, config.exclude)
    by_row = config.scope == "row"
    moments = []
    for target in targets:
        weight = target.parameter.detach()
        rows = weight.movedim(target.output_dim, 0).flatten(1) if by_row else weight.reshape(1, -1)
        moments.append(score_moments(rows).stack())
    groups = ScoreMoments.unstack(torch.cat(moments))
    n = sum(target.parameter.numel() for target in targets)
    keep = int(groups.nonzero.sum())
    n_eff = float(effective_numbers(groups.sum() if config.scope == "global" else groups).sum())
    return {"density": keep / n, "n": n, "keep": keep, "n_eff": n_eff}


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


def _check_single_process(trainer: pl.Trainer) -> None:
    if trainer.world_size > 1:
        raise ValueError(
            f"emp compare trains each arm in one process, and the recipe asks for {trainer.world_size};"
            " add --trainer.devices 1 --trainer.num_nodes 1"
        )


@contextmanager
def _interrupts_raised(trainer: pl.Trainer) -> Iterator[None]:
    """Turn Lightning's exit after Ctrl-C back into KeyboardInterrupt, with the signal handler restored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        # Lightning ignores further signals and exits with code 1: the study has to end on its own terms.
        if trainer.interrupted:
            raise KeyboardInterrupt from stop
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is not handler and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's notices and its advice on speed; other warnings stay."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

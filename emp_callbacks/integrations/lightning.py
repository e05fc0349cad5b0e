"""EMP in a Lightning Trainer, under both of Lightning's import names."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from emp_callbacks.config import EMPConfig, check_names
from emp_callbacks.extras import is_installed, needs
from emp_callbacks.integrations.lightning_checkpoint import CheckpointCompanion, masks_folder
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.trajectory import PruneEvent, Trajectory, layer_table

TRAJECTORY_FILE = "emp_trajectory.jsonl"
_WRAPPING = ("DeepSpeed", "FSDP")  # strategies whose own model object, not the module, knows the shards
_IN_FILES = {"saved": "in files"}  # what a checkpoint's callback state says where the masks lie in files of their own


def _callback_classes() -> tuple[type, ...]:
    """Return the Callback classes of the Lightning packages that are installed; they are different classes."""
    names = [name for name in ("pytorch_lightning", "lightning.pytorch") if is_installed(name)]
    if not names:
        needs("EMPCallback", "lightning", "pytorch_lightning")
    return tuple(import_module(name).Callback for name in names)


class EMPCallback(*_callback_classes()):  # type: ignore[misc]
    """Recompute EMP masks while a Trainer trains, and log the N_eff trajectory.

    A refresh tied to epochs happens after the epoch's last optimizer step and before its validation, so validation
    and checkpoints see the masked weights. The checkpoint holds masked weights; masks, the dense values behind them,
    schedule position and trajectory travel in the callback's state: a resumed run equals one that never stopped.

    Args:
        trajectory_path: JSON-lines file for the trajectory; default `emp_trajectory.jsonl` in the trainer's log_dir.
        summary: Print the per-layer table when the fit ends.
        **settings: Fields of EMPConfig by name: `EMPCallback(every_n_epochs=1, beta=1.2)`. Without a schedule,
            `every_n_epochs=1`.

    Attributes:
        config: The settings.
        pruner: The EMPPruner of the current or last fit; None before the first.

    Raises:
        ValueError: A setting is invalid; when the fit starts: it selects no weights.
        TypeError: A setting has an unknown name.
        NotImplementedError: When the fit starts: the strategy shards the model in a way that is not supported.
    """

    def __init__(
        self, *, trajectory_path: str | os.PathLike[str] | None = None, summary: bool = True, **settings: Any
    ) -> None:
        super().__init__()
        if settings.get("every_n_epochs") is None and settings.get("every_n_steps") is None:
            settings["every_n_epochs"] = 1
        check_names(settings)
        self.config = EMPConfig(**settings)  # jsonargparse reads a recipe's valid keys from this call
        self.trajectory_path = trajectory_path
        self.summary = summary
        self.pruner: EMPPruner | None = None
        self._restored: dict[str, Any] | None = None
        self._module: Any = None
        self._companion: CheckpointCompanion | None = None
        self._evaluation: AbstractContextManager[None] | None = None

    @classmethod
    def from_config(cls, config: EMPConfig, **kwargs: Any) -> EMPCallback:
        """Return the callback with all settings of `config`; `kwargs` are `trajectory_path` and `summary`."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)}, **kwargs)

    @property
    def state_key(self) -> str:
        """Name of this callback's part of a checkpoint; differs between callbacks that prune different weights."""
        chosen = {name: getattr(self.config, name) for name in ("target", "include", "exclude")}
        return f"EMPCallback{chosen}"

    @property
    def trajectory(self) -> Trajectory:
        """One PruneEvent per refresh and group; empty before the first fit."""
        return Trajectory() if self.pruner is None else self.pruner.trajectory

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask, True = kept, see `EMPPruner.masks`; empty before the first fit."""
        return {} if self.pruner is None else self.pruner.masks

    # ---- Trainer hooks --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _check_strategy(trainer)
        # A second fit of the same module goes on where the first one stopped.
        continued = self.pruner.state_dict() if self.pruner is not None and self._module is pl_module else None
        pruner = EMPPruner(
            _sharding_model(trainer, pl_module), trainer.optimizers, self.config, trajectory_path=self._path(trainer)
        )
        try:
            self._restore(trainer, pruner, continued)
        except BaseException:
            pruner.detach()
            raise
        if self._companion is not None:
            self._companion.detach()
        self._companion = CheckpointCompanion(trainer.strategy, pruner.save) if pruner.sharded else None
        self.pruner, self._module, self._restored = pruner, pl_module, None

    def _restore(self, trainer: Any, pruner: EMPPruner, continued: dict[str, Any] | None) -> None:
        state = self._restored or continued
        if not state:
            pruner.start_at(trainer.global_step, trainer.current_epoch, _epoch_length(trainer))
        elif state == _IN_FILES:
            pruner.load(masks_folder(trainer.ckpt_path))
        elif pruner.sharded and self._restored:
            raise ValueError(
                "the checkpoint is of an unsharded run, this run shards the model: carry the masks over with "
                "EMPPruner.save(folder) and load(folder), or resume with strategy='auto' or 'ddp'"
            )
        else:
            pruner.load_state_dict(state)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002
        if self.pruner is not None and self.pruner.sharded:
            self.pruner.mask_gradients()  # before Lightning clips; unsharded gradients are masked as they arrive

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.pruner is not None
        events = self.pruner.step(end_of_epoch=trainer.is_last_batch)
        if not events and self.pruner.needs_closing_refresh and _is_last_step(trainer):
            events = self.pruner.close()
        if events:
            for logger in trainer.loggers:
                logger.log_metrics(log_values(events), step=trainer.global_step)
        if (last := self.pruner.last_events) and trainer.progress_bar_callback is not None:
            # Every batch: the bar shows only what the current step logged.
            pl_module.log("emp/density", _density(last), prog_bar=True, logger=False, on_step=True, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        self.pruner.finalize()
        if self.summary and trainer.is_global_zero and self.pruner.last_events:
            Console().print(layer_table(self.pruner.last_events))

    # DeepSpeed's strategy clears module hooks for every evaluation; after a fit, features are masked by hooks alone.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_begins(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_begins(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_begins(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def _evaluation_begins(self, pl_module: Any) -> None:
        if self.pruner is not None and self._module is pl_module:
            self._evaluation = self.pruner.masked_forward()
            self._evaluation.__enter__()

    def _evaluation_ends(self) -> None:
        if self._evaluation is not None:
            self._evaluation.__exit__(None, None, None)
            self._evaluation = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        self._evaluation_ends()
        if self.pruner is not None:
            self.pruner.detach()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.pruner is not None:
            self.pruner.share_evidence()  # Lightning asks every rank and keeps the answer of rank 0
            return dict(_IN_FILES) if self.pruner.sharded else self.pruner.state_dict()
        return self._restored or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Weights and optimizer come back after this hook; the pruner takes its state in on_train_start.
        self._restored = state_dict

    def _path(self, trainer: Any) -> Path | None:
        folder = trainer.log_dir or trainer.default_root_dir  # collective: on every rank
        if trainer.fast_dev_run:
            return None
        return Path(folder) / TRAJECTORY_FILE if self.trajectory_path is None else Path(self.trajectory_path)


def log_values(events: list[PruneEvent]) -> dict[str, float]:
    """Return what loggers get of one refresh: `emp/density`, `emp/n_eff`, ... and per group `emp/density/NAME`."""
    n, n_eff = sum(e.n for e in events), sum(e.n_eff for e in events)
    values = {
        "emp/density": _density(events),
        "emp/n_eff": n_eff,
        "emp/n_eff_fraction": n_eff / n,
        "emp/keep": float(sum(e.keep for e in events)),
        "emp/churn": sum(e.churn * e.n for e in events) / n,
        "emp/regrown": float(sum(e.regrown for e in events)),
        "emp/seconds": events[0].seconds,
    }
    for e in events:
        suffix = "" if e.group == "global" else f"/{e.group}"
        measured = {
            "preserved_mass": e.preserved_mass,
            "threshold": e.threshold,
            "beta": e.beta,
            "mass_bound": e.mass_bound,
            "tight_mass_bound": e.tight_mass_bound,
            "certified_loss_change": e.certificate.bound if e.certificate else None,
        }
        if suffix:
            measured |= {"density": e.density, "n_eff_fraction": e.n_eff_fraction}
        values |= {f"emp/{name}{suffix}": value for name, value in measured.items() if value is not None}
        values |= {f"emp/first_token/{x.name}": x.first_token for x in e.layers if x.first_token is not None}
        for layer in e.layers:
            if layer.certificate is not None and layer.certificate.scale:
                certified, found = layer.certificate.relative
                values |= {
                    f"emp/certified_error/{layer.name}": certified,
                    f"emp/measured_error/{layer.name}": found or 0.0,
                }
    return values


def _density(events: list[PruneEvent]) -> float:
    return sum(e.keep for e in events) / sum(e.n for e in events)


def _epoch_length(trainer: Any) -> int | None:
    """Return the optimizer steps of an epoch; None where the data do not say."""
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None


def _is_last_step(trainer: Any) -> bool:
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return bool(trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1)


def _sharding_model(trainer: Any, pl_module: Any) -> Any:
    name = type(trainer.strategy).__name__
    return trainer.strategy.model if any(kind in name for kind in _WRAPPING) else pl_module


def _check_strategy(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if "XLA" in name:
        raise NotImplementedError(f"EMPCallback does not support {name}; use one device, DDP, FSDP or DeepSpeed")

"""EMP in a Lightning Trainer, under both of Lightning's import names."""

from __future__ import annotations

import os
from dataclasses import fields
from importlib import import_module
from typing import Any

from torch.nn.parameter import is_lazy

from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig, check_names
from emp_callbacks.extras import is_installed, needs
from emp_callbacks.integrations.lightning_averages import LightningAverages
from emp_callbacks.integrations.lightning_checkpoint import IN_FILES, CheckpointCompanion, masks_folder
from emp_callbacks.integrations.lightning_evaluation import EvaluationHooks
from emp_callbacks.integrations.lightning_progress import end_bar, epoch_length, is_last_step, steps_so_far
from emp_callbacks.integrations.lightning_record import ElsewhereTrajectory, check_told_apart, log, publish
from emp_callbacks.integrations.lightning_strategy import check_strategy, sharding_model
from emp_callbacks.integrations.record import HostCallback, check_record, density, file_name, log_values, own_name
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets.positions import positions_of
from emp_callbacks.trajectory import PruneEvent, Trajectory, trajectory_file

__all__ = ["EMPCallback", "log_values"]


def _callback_classes() -> tuple[type, ...]:
    """Return the Callback classes of the Lightning packages that are installed; they are different classes."""
    names = [name for name in ("pytorch_lightning", "lightning.pytorch") if is_installed(name)]
    if not names:
        needs("EMPCallback", "lightning", "pytorch_lightning")
    return tuple(import_module(name).Callback for name in names)


class EMPCallback(HostCallback, EvaluationHooks, *_callback_classes()):  # type: ignore[misc]
    """Recompute EMP masks while a Trainer trains, and log the N_eff trajectory.

    A refresh tied to epochs happens after the epoch's last optimizer step and before its validation, so validation
    and checkpoints see the masked weights. The checkpoint holds masked weights; masks, the dense values behind them
    and the schedule's position travel in the callback's state: a resumed run equals one that never stopped.

    What the Trainer's optimizers update is pruned, unless `include` names other weights; the closing table says what is
    left out. A second fit of the same module goes on where the first one stopped; another module starts anew. What
    `test`, `validate` or `predict` load with `ckpt_path` is masked as that checkpoint says, and forgotten after it.

    Args:
        trajectory_path: JSON-lines file for the trajectory; default `emp_trajectory.jsonl` in the trainer's log_dir.
        summary: Print the per-layer table when the fit ends.
        name: Tells several callbacks apart: `emp/NAME/density` in loggers, `emp_trajectory_NAME.jsonl`. Default:
            nothing for one callback, the target's name where there are several. Two with the same settings need one.
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
        self,
        *,
        trajectory_path: str | os.PathLike[str] | None = None,
        summary: bool = True,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if settings.get("every_n_epochs") is None and settings.get("every_n_steps") is None:
            settings["every_n_epochs"] = 1
        check_names(settings)
        check_record(trajectory_path, summary, name)
        self.config = EMPConfig(**settings)  # jsonargparse reads a recipe's valid keys from this call
        self.trajectory_path = trajectory_path
        self.summary = summary
        self.name = name
        self.pruner: EMPPruner | None = None
        self._restored: dict[str, Any] | None = None
        self._module: Any = None
        self._fits = False
        self._epoch_is_counted = False
        self._own_name = ""
        self._companion: CheckpointCompanion | None = None
        self._averages: LightningAverages | None = None

    @classmethod
    def from_config(cls, config: EMPConfig, **kwargs: Any) -> EMPCallback:
        """Return the callback with all settings of `config`; `kwargs` are `trajectory_path`, `summary` and `name`."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)}, **kwargs)

    @property
    def state_key(self) -> str:
        """Name of this callback's part of a checkpoint: differs between all that may stand side by side."""
        default, told = EMPConfig(), dict[str, Any]()
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if field.name == "criterion":
                value = self.config.criterion_name
            elif isinstance(value, (list, tuple, set)):
                value = sorted(value)
            if value != getattr(default, field.name) and not callable(value):
                told[field.name] = value
        return f"{self._key_begins}{told}"

    @property
    def _key_begins(self) -> str:
        return f"EMPCallback[{self.name or ''}]"

    @property
    def trajectory(self) -> Trajectory:
        """One PruneEvent per refresh and group; empty before the first fit."""
        return ElsewhereTrajectory() if self.pruner is None else self.pruner.trajectory

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            "EMPCallback is for Lightning's Trainer; for Hugging Face's: EMPTrainerCallback.attach(trainer, "
            "every_n_steps=500)"
        )

    on_init_end = on_train_begin = _refuse  # Hugging Face's Trainer calls these, Lightning's does not

    # ---- a stage begins -------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Lightning looks only at those that its Trainer was made with, and does not know of `name`.
        check_told_apart(self, [other for other in trainer.callbacks if isinstance(other, EMPCallback)])
        super().setup(trainer, pl_module, stage)

    # ---- a fit ----------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        # Before the first call of a compiled model, which sees no hooks that come later.
        if not any(is_lazy(parameter) for parameter in pl_module.parameters()):
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._fits:
            self._begin(trainer, pl_module)
        assert self.pruner is not None
        # Due already where the checkpoint was made after a step (an epoch's last?) and before EMP saw the batch's end.
        if events := self.pruner.step(end_of_epoch=trainer.current_epoch == self.pruner.epochs + 1):
            log(trainer, events, self._own_name)
        publish(trainer, self._values() or {self._density_name: 1.0})

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        check_strategy(trainer)
        continued = self._continued() if self._module is pl_module else None
        self._own_name = own_name(self, [other for other in trainer.callbacks if isinstance(other, EMPCallback)])
        pruner = EMPPruner(
            sharding_model(trainer, pl_module), trainer.optimizers, self.config, trajectory_path=self._path(trainer)
        )
        pruner.remedy = (
            f"The Trainer stopped before the first refresh (max_epochs={trainer.max_epochs}, max_steps="
            f"{trainer.max_steps}): lower every_n_epochs, every_n_steps or start, or train longer"
        )
        try:
            averages = None if self.config.observe_only else LightningAverages(trainer, pruner)
            self._restore(trainer, pruner, self._brought(pl_module), continued)
        except BaseException:
            pruner.detach()
            raise
        if self._companion is not None:
            self._companion.detach()
        self._companion = CheckpointCompanion(trainer.strategy, pruner.save) if pruner.sharded else None
        self.pruner, self._module, self._restored, self._stands_for = pruner, pl_module, None, None
        self._averages, self._fits = averages, True

    def _continued(self) -> dict[str, Any] | None:
        """Return the state of the last fit of the same module, told if its weights were replaced since."""
        if self.pruner is None:
            return None
        if (names := self.pruner.replaced_weights()) and self._restored is None:
            warn_the_user(
                f"the weights of the module are others than the last fit left ({names[0]!r} and {len(names) - 1} more; "
                "load_state_dict, or a test with ckpt_path?): they are the dense values from here on, masks and clock "
                "go on. To start anew, use a new EMPCallback"
            )
        return self.pruner.state_dict()

    def _restore(self, trainer: Any, pruner: EMPPruner, brought: Any, continued: dict[str, Any] | None) -> None:
        state = brought or continued
        if not state:
            pruner.start_at(steps_so_far(trainer), trainer.current_epoch, epoch_length(trainer))
        elif state == IN_FILES:
            pruner.load(masks_folder(trainer.ckpt_path))
        elif pruner.sharded and brought:
            raise ValueError(
                "the checkpoint is of an unsharded run, this run shards the model: carry the masks over with "
                "EMPPruner.save(folder) and load(folder), or resume with strategy='auto' or 'ddp'"
            )
        else:
            pruner.load_state_dict(state)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        self._epoch_is_counted = False
        self.pruner.start_epoch(epoch_length(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx == 0 and self.pruner is not None:
            # Once more: another callback may accumulate other numbers of batches from this epoch on.
            self.pruner.start_epoch(epoch_length(trainer))
        if self.pruner is not None and self.pruner.reads_positions:
            self.pruner.count_positions(positions_of(batch, self.config.positions))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002
        if self.pruner is not None and self.pruner.sharded:
            self.pruner.mask_gradients()  # before Lightning clips; unsharded gradients are masked as they arrive

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.pruner is not None
        self._epoch_is_counted = bool(trainer.is_last_batch)
        events = self.pruner.step(end_of_epoch=self._epoch_is_counted)
        if self.pruner.needs_closing_refresh and is_last_step(trainer):
            events = self.pruner.close() or events
        if events:
            log(trainer, events, self._own_name)
        if (last := self.pruner.last_events) and trainer.progress_bar_callback is not None:
            # Every batch: the bar shows only what the current step logged.
            pl_module.log(self._density_name, density(last), prog_bar=True, logger=False, on_step=True, batch_size=1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Any) -> None:
        """Count an epoch whose last batch did not say so: skipped batches, a source that does not know its length."""
        if self.pruner is not None and not self._epoch_is_counted:
            self._epoch_is_counted = True
            if events := self.pruner.end_epoch():
                log(trainer, events, self._own_name)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        self._end_fit()
        if "MultiProcessing" in type(trainer.strategy.launcher).__name__ and trainer.is_global_zero:
            warn_the_user(
                "this fit ran in processes of its own, so the callback of the main process stays empty: the rows are "
                f"in {self.pruner.trajectory.path}, the masks in the checkpoints' callback state"
            )

    def _end_fit(self) -> None:
        self._fits = False
        assert self.pruner is not None
        self.pruner.finalize()
        if self._averages is not None:
            self._averages.detach()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        if self._fits:  # begun by the sanity check, and no batch followed
            self._end_fit()
        elif self.summary and trainer.is_global_zero:
            end_bar(trainer)
            self.print_summary()
        if self.pruner is not None:
            self.pruner.replaced_weights()  # by averages, at the end: that is what this fit leaves

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        self._fits = False
        self._evaluation_ends()
        self._forget()
        if self._averages is not None:
            self._averages.detach()
        if self.pruner is not None:
            self.pruner.detach()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.pruner is not None and self._subject in (None, self._module):
            if not self._fits and (names := self.pruner.replaced_weights()):
                warn_the_user(
                    f"a checkpoint is made whose weights ({names[0]!r}, ...) are not those that EMP's masks in it were "
                    "made for: a test with ckpt_path, or load_state_dict, replaced them since the fit"
                )
            self.pruner.share_evidence()  # Lightning asks every rank and keeps the answer of rank 0
            return dict(IN_FILES) if self.pruner.sharded else self.pruner.state_dict()
        return self._brought(self._subject) or {}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Take the state of an EMPCallback with other settings, where it can only be meant for this one.

        Whether the settings fit is then checked, and said, as the state is put back; Lightning would just leave it.
        """
        states = checkpoint.get("callbacks") or {}
        ours = [other for other in trainer.callbacks if isinstance(other, EMPCallback)]
        without = [other for other in ours if other.state_key not in states]
        keys = {other.state_key for other in ours}
        left = [key for key in states if key.startswith("EMPCallback") and key not in keys]
        named = [key for key in left if self.name and key.startswith(self._key_begins)]
        if self in without and left:
            if len(named) == 1:
                left = named
            elif len(left) != 1 or len(without) != 1:
                raise ValueError(
                    f"the checkpoint holds the states of {len(left)} EMPCallbacks with other settings than the "
                    f"{len(without)} of this Trainer, so which belongs to which is not known: give them the settings "
                    f"that they were trained with, or the same name=: {'; '.join(left)}"
                )
            self.load_state_dict(states[left[0]])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fits and self.pruner is not None and state_dict != IN_FILES:
            self.pruner.load_state_dict(state_dict)  # a restore in the middle of a fit, as a learning-rate finder's
        else:
            # Weights and optimizer may come back after this hook; the pruner takes its state in as the stage starts.
            self._restored, self._stands_for = state_dict, None

    # ---- inside ---------------------------------------------------------------------------------------------------

    @property
    def _density_name(self) -> str:
        return f"emp/{self._own_name}/density" if self._own_name else "emp/density"

    def _values(self) -> dict[str, float]:
        events: list[PruneEvent] = [] if self.pruner is None else self.pruner.last_events
        return log_values(events, self._own_name) if events else {}

    def _path(self, trainer: Any) -> str | os.PathLike[str] | None:
        folder = trainer.log_dir or trainer.default_root_dir  # collective: on every rank
        if trainer.fast_dev_run:
            return None
        return self.trajectory_path or trajectory_file(folder, file_name(self._own_name))

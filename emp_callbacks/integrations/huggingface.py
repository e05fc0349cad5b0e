"""EMP in Hugging Face's Trainer, and in those that inherit from it (TRL's, sentence-transformers')."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig, settled
from emp_callbacks.distillation import Distillation
from emp_callbacks.extras import needs
from emp_callbacks.integrations.record import HostCallback, check_record, file_name, log_values, own_name
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets.positions import positions_of
from emp_callbacks.trajectory import PruneEvent, Trajectory, trajectory_file

needs("EMPTrainerCallback", "hf", "transformers", "accelerate")

from accelerate.utils import broadcast_object_list  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402  (the line above says what is missing)
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint  # noqa: E402

from emp_callbacks.integrations.huggingface_distillation import TrainerDistillation  # noqa: E402

FOLDER = "emp"


class EMPTrainerCallback(HostCallback, TrainerCallback):
    """Recompute EMP masks while a `transformers.Trainer` trains, and log the N_eff trajectory.

    Made by `attach`, because a Trainer's events tell neither its engine, nor the checkpoint that it resumes from. Works
    on one process, under DDP, FSDP and DeepSpeed (ZeRO 0 to 3), as the Trainer's own arguments say.

    A refresh comes before the evaluation and the checkpoint of its step, so both see the masked weights. The masks, the
    dense values behind them and the schedule's position lie in the checkpoint's folder, as `checkpoint-500/emp`:
    `train(resume_from_checkpoint=...)` equals a run that never stopped, and `load_best_model_at_end` brings the masks
    of the best step. A second `train()` of the same model goes on behind the masks of the first.

    Attributes:
        config: The settings.
        pruner: The EMPPruner of the current or last training; None before the first.

    Examples:
        trainer = Trainer(model, args, train_dataset=data)
        emp = EMPTrainerCallback.attach(trainer, every_n_steps=500)
        trainer.train()
        print(emp.trajectory[-1].density)
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        trajectory_path: str | os.PathLike[str] | None = None,
        summary: bool = True,
        name: str | None = None,
        distill: Distillation | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "EMPTrainerCallback needs its Trainer, which shows itself to no callback: make the Trainer without it, "
                f"then EMPTrainerCallback.attach(trainer, every_n_steps=500); got {type(trainer).__name__}"
            )
        if settings.get("every_n_epochs") is None and settings.get("every_n_steps") is None:
            settings["every_n_epochs"] = 1
        check_record(trajectory_path, summary, name)
        self.config: EMPConfig = settled(None, settings)
        self.trajectory_path, self.summary, self.name = trajectory_path, summary, name
        self.pruner: EMPPruner | None = None
        self._trainer = trainer
        self._model: Any = None
        self._resumes: Path | None = None
        self._trains = self._epoch_is_counted = False
        self._own_name = ""
        self._learning = None if distill is None else TrainerDistillation(trainer, distill)

    @classmethod
    def attach(cls, trainer: Trainer, **settings: Any) -> EMPTrainerCallback:
        """Add EMP to a Trainer, before its `train()`, and return the callback.

        Args:
            trainer: The Trainer.
            **settings: Fields of EMPConfig by name, as in `attach(trainer, every_n_steps=500, beta=1.2)`; without a
                schedule, `every_n_epochs=1`. And of the record: `trajectory_path`, a JSON-lines file for the
                trajectory (default `emp_trajectory.jsonl` in `output_dir`); `summary`, whether the per-layer table is
                printed when training ends; `name`, which tells several callbacks apart (`emp/NAME/density` in logs,
                `checkpoint-500/emp_NAME`; default: the target's name where there are several). And `distill`, a
                Distillation: the pruned model learns from the dense one as well.

        Raises:
            ValueError: A setting is invalid; when training starts: it selects no weights.
            TypeError: `trainer` is no Trainer, or a setting has an unknown name.
        """
        callback = cls(trainer, **settings)
        for owner, method, around in (
            (trainer, "train", callback._train),
            (trainer, "training_step", callback._training_step),
            (trainer, "evaluation_loop", callback._evaluation_loop),
            (trainer, "_save_checkpoint", callback._save_checkpoint),
            (trainer.accelerator, "clip_grad_norm_", callback._clip),
        ):
            Wrapped(owner, method, around)
        trainer.add_callback(callback)
        return callback

    @property
    def trajectory(self) -> Trajectory:
        """One PruneEvent per refresh and group; empty before the first training."""
        return Trajectory() if self.pruner is None else self.pruner.trajectory

    # ---- a training -----------------------------------------------------------------------------------------------

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = resume_from_checkpoint
        if found is True:
            # If there is none, the Trainer says so.
            found = get_last_checkpoint(self._trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self._resumes = Path(found) if found else None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._trains = False
            if self._learning is not None:
                self._learning.end()
            if self.pruner is not None:
                self.pruner.detach()
            raise

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        trainer = self._trainer
        if self._learning is not None:
            self._learning.begin(self._resumes)  # before EMP prunes what may be the teacher
        others = [one for one in trainer.callback_handler.callbacks if isinstance(one, EMPTrainerCallback)]
        self._own_name = own_name(self, others)
        continued = None
        if self.pruner is not None:
            continued = self.pruner.state_dict() if self._model is trainer.model else None
            self.pruner.detach()  # the Trainer may begin anew within a training: auto_find_batch_size
        path = self.trajectory_path or trajectory_file(args.output_dir, file_name(self._own_name))
        pruner = EMPPruner(trainer.model_wrapped, trainer.optimizer, self.config, trajectory_path=path)
        pruner.remedy = (
            f"The Trainer stopped before the first refresh (num_train_epochs={args.num_train_epochs}, max_steps="
            f"{state.max_steps}): lower every_n_epochs, every_n_steps or start, or train longer"
        )
        try:
            self._restore(pruner, state, continued)
        except BaseException:
            pruner.detach()
            raise
        self.pruner, self._model, self._trains, self._epoch_is_counted = pruner, trainer.model, True, False

    def _restore(self, pruner: EMPPruner, state: Any, continued: dict[str, Any] | None) -> None:
        if self._resumes is None:
            if continued:
                pruner.load_state_dict(continued)
            return
        folder = self._resumes / self._folder
        (there, others) = broadcast_object_list([folder.is_dir(), sorted(map(str, self._resumes.glob(f"{FOLDER}*")))])
        if there:
            pruner.load(folder)
        elif others:
            raise FileNotFoundError(
                f"{folder} does not exist, but {', '.join(others)}: give the callbacks the names that they had, "
                "EMPTrainerCallback.attach(trainer, name=...)"
            )
        else:
            if self._trainer.is_world_process_zero():
                warn_the_user(
                    f"{self._resumes} was saved without EMP (it holds no folder {self._folder!r}): masks begin anew "
                    f"from its weights, at step {state.global_step}"
                )
            pruner.start_at(state.global_step, int(state.epoch or 0))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        self._epoch_is_counted = False
        self.pruner.start_epoch(_steps_of(kwargs.get("train_dataloader"), args.gradient_accumulation_steps))

    def _training_step(self, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._trains and self.pruner is not None and self.pruner.reads_positions:
            self.pruner.count_positions(positions_of(inputs, self.config.positions))
        return step(model, inputs, *args, **kwargs)

    def _clip(self, clip: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._trains and self.pruner is not None and self.pruner.sharded:
            self.pruner.mask_gradients()  # unsharded gradients are masked as they arrive
        return clip(*args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        is_last = state.global_step >= state.max_steps
        # The last step of an epoch may evaluate and save before the event that ends it.
        self._epoch_is_counted = is_last or float(state.epoch).is_integer()
        events = self.pruner.step(end_of_epoch=self._epoch_is_counted)
        if is_last and self.pruner.needs_closing_refresh:
            events = self.pruner.close() or events
        self._log(events, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        if not self._epoch_is_counted:  # cut short, or of a length that nobody knew
            self._epoch_is_counted = True
            self._log(self.pruner.end_epoch(), control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self.pruner is not None
        self._trains = False
        if self._learning is not None:
            self._learning.end()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_best(self.pruner, Path(state.best_model_checkpoint))
        self.pruner.finalize()
        if self.summary and self._trainer.is_world_process_zero():
            self.print_summary()

    def _take_best(self, pruner: EMPPruner, checkpoint: Path) -> None:
        """Take the masks of the checkpoint whose weights the Trainer has just loaded."""
        folder = checkpoint / self._folder
        if broadcast_object_list([folder.is_dir()])[0]:
            pruner.load(folder, masks_only=True)
        elif self._trainer.is_world_process_zero():
            warn_the_user(
                f"load_best_model_at_end brought the weights of {checkpoint}, which was saved without EMP: the masks "
                "of the last step are on them now. To have the weights as they were, load that folder"
            )

    # ---- evaluation and checkpoints -------------------------------------------------------------------------------

    def _evaluation_loop(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # After a training no hooks are left, which alone mask features and attention edges.
        ours = self.pruner is not None and self._model is self._trainer.model
        with self.pruner.masked_forward() if ours and self.pruner is not None else nullcontext():
            return evaluate(*args, **kwargs)

    def _save_checkpoint(self, save: Callable[..., Any], model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        # First the masks: the Trainer's last acts are to send the folder away, and to remove older ones.
        if self._trains and self.pruner is not None:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self._trainer.state.global_step}"
            self.pruner.save(Path(self._trainer._get_output_dir(trial)) / name / self._folder)
        return save(model, trial, *args, **kwargs)

    @property
    def _folder(self) -> str:
        return f"{FOLDER}_{self._own_name}" if self._own_name else FOLDER

    # ---- the record -----------------------------------------------------------------------------------------------

    def _log(self, events: Sequence[PruneEvent], control: Any) -> None:
        """Give the rows of a refresh to the Trainer's log and its reporters; those of single layers to these alone."""
        if not events:
            return
        first = f"emp/{self._own_name}/" if self._own_name else "emp/"
        values = log_values(events, self._own_name)
        totals = {key: value for key, value in values.items() if "/" not in key.removeprefix(first)}
        trainer, should_log = self._trainer, control.should_log
        Trainer.log(trainer, totals)  # not an heir's, which may take the occasion to log what it gathered
        rest = {key: values[key] for key in values if key not in totals}
        for callback in trainer.callback_handler.callbacks if rest else ():
            if not isinstance(callback, (ProgressCallback, PrinterCallback)):
                callback.on_log(trainer.args, trainer.state, control, logs=dict(rest), model=trainer.model)
        control.should_log = should_log  # the Trainer takes every log for that of its step


def _steps_of(loader: Any, accumulation: int) -> int | None:
    """Return the optimizer steps of an epoch; None where the data do not say."""
    try:
        return math.ceil(len(loader) / accumulation)
    except TypeError:  # an iterable dataset
        return None

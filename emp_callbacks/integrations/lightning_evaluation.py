"""What EMPCallback does around a Trainer's validation, test and prediction."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig
from emp_callbacks.integrations.lightning_checkpoint import IN_FILES, masks_folder
from emp_callbacks.integrations.lightning_strategy import sharding_model
from emp_callbacks.pruning.pruner import EMPPruner


class EvaluationHooks:
    """The evaluation half of EMPCallback: after a fit, inside one, or with what a checkpoint brought.

    Attributes:
        config: The settings.
        pruner: The EMPPruner of the current or last fit; None before the first.
    """

    config: EMPConfig
    pruner: EMPPruner | None
    _restored: dict[str, Any] | None
    _stands_for: Any = None  # the module whose fit had nothing left to train: what it resumed holds for it from then on
    _subject: Any = None  # the module of the current or last stage
    _module: Any
    _fits: bool
    _evaluation: ExitStack | None = None

    def _end_epoch(self, trainer: Any) -> None:
        raise NotImplementedError

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._fits and not trainer.sanity_checking and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._end_epoch(trainer)
        self._evaluation_begins(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:  # noqa: ARG002
        self._first_batch(batch_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_begins(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_begins(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._evaluation_ends()

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in the middle of a stage has no part in it: it keeps the record, and begins its own.
        return {**self.__dict__, **dict.fromkeys(("_evaluation", "_companion", "_averages")), "_fits": False}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        self._subject = pl_module
        if self.pruner is not None and not self._fits:
            self.pruner.detach()  # of a copy made during a fit

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        if stage == "fit" and self._restored is not None:
            self._stands_for = pl_module
        self._forget()

    def _forget(self) -> None:
        """Drop what a checkpoint brought to a stage that is over, also one that failed or had no batch."""
        if self._stands_for is None:
            self._restored = None

    def _brought(self, pl_module: Any) -> dict[str, Any] | None:
        """Return what a checkpoint brought for this module."""
        return self._restored if self._stands_for in (None, pl_module) else None

    def _evaluation_begins(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation = ExitStack()
        state = None if self._fits else self._brought(pl_module)
        if state is not None:
            if self.config.masks_in_forward or self.config.gates:  # which may have been learning
                self._evaluate_with(trainer, pl_module, state)
            return
        if not self._fits and not trainer.sanity_checking and trainer.is_global_zero:
            self._say_if_unmasked(trainer.ckpt_path, pl_module)
        if self.pruner is not None and self._module is pl_module:
            # DeepSpeed's strategy clears module hooks for every evaluation; after a fit, hooks alone mask features.
            self._evaluation.enter_context(self.pruner.masked_forward())

    def _say_if_unmasked(self, checkpoint: Any, pl_module: Any) -> None:
        """Warn where the evaluation loaded weights without masks, and masks are no part of the weights."""
        if checkpoint is None or not self.config.masks_in_forward or not self.config.masks_evaluation:
            return
        masked = self.pruner is not None and self._module is pl_module and self.pruner.trajectory
        how = "behind the masks of the last fit, which may be others than its own" if masked else "without masks"
        warn_the_user(
            f"{checkpoint} holds no EMP state (save_weights_only=True, or a run without this callback), so this "
            f"evaluation runs {how}: masks of {self.config.target} are no part of the weights. Load a checkpoint that "
            "was saved with save_weights_only=False"
        )

    def _evaluate_with(self, trainer: Any, pl_module: Any, state: dict[str, Any]) -> None:
        """Mask as the checkpoint says that this evaluation loaded; weights came masked."""
        assert self._evaluation is not None
        config = replace(self.config, every_n_epochs=None, every_n_steps=None, start=None, stop=None)
        pruner = EMPPruner(sharding_model(trainer, pl_module), None, config)
        self._evaluation.callback(pruner.detach)
        if state == IN_FILES:
            pruner.load(masks_folder(trainer.ckpt_path))
        else:
            pruner.load_state_dict(state)

    def _first_batch(self, batch_idx: int) -> None:
        # Once more: other callbacks swap weights between the start of a validation and its first batch.
        if batch_idx == 0 and self._fits and self._evaluation is not None and self.pruner is not None:
            self._evaluation.enter_context(self.pruner.masked_forward())

    def _evaluation_ends(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

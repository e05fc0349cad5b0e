"""Where the files of a fit are, said when it ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from emp_callbacks.integrations.lightning import EMPCallback
from emp_callbacks.integrations.record import TRAJECTORY_FILE
from emp_callbacks.terminal import make_console

__all__ = ["Whereabouts"]


class Whereabouts(pl.Callback):
    """Says where the run and its checkpoint are, and the commands that come next; after a stop, the checkpoint."""

    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        folder = trainer.log_dir or trainer.default_root_dir  # collective: on every rank
        rows = [row for one in trainer.callbacks if isinstance(one, EMPCallback) if (row := one.trajectory.path)]
        checkpoint = _last_checkpoint(trainer)
        lines = [f"run: {_near(folder)}", *(f"trajectory: {_near(row)}" for row in rows)]
        local = [row for row in rows if isinstance(row, Path) and row.name == TRAJECTORY_FILE]
        following = [f"emp report {_word(row.parent)}" for row in local]
        if checkpoint:
            lines.append(f"checkpoint: {_near(checkpoint)}")
            following += [
                f"emp inspect {_word(checkpoint)}",
                f"emp export {_word(checkpoint)} --out model.safetensors",
            ]
        self._tell(trainer, [*lines, *["next:"] * bool(following), *(f"  {command}" for command in following)])

    def on_exception(self, trainer: Any, pl_module: pl.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        if checkpoint := _last_checkpoint(trainer):
            self._tell(trainer, [f"last checkpoint: {_near(checkpoint)}"])

    def _tell(self, trainer: Any, lines: list[str]) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            make_console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _last_checkpoint(trainer: Any) -> str:
    """Return the path of the newest checkpoint of a fit; "" where it wrote none."""
    saving: Any = trainer.checkpoint_callback
    return getattr(saving, "last_model_path", "") or getattr(saving, "best_model_path", "")


def _near(path: Any) -> str:
    """Return a path as it is written from here; one that lies elsewhere, or is a URL, as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def _word(path: Any) -> str:
    return shlex.quote(_near(path))

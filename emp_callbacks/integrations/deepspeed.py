"""EMP around a DeepSpeed engine, without Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from emp_callbacks.backends.wrapped import Wrapped
from emp_callbacks.config import EMPConfig
from emp_callbacks.pruning.pruner import EMPPruner
from emp_callbacks.targets import LeftOut
from emp_callbacks.trajectory import PruneEvent, Trajectory

CHECKPOINT_FOLDER = "emp"


class EMPHook:
    """Recompute EMP masks while a DeepSpeed engine trains; nothing else changes in the loop.

    `engine.step()` counts applied steps and refreshes the masks when the schedule says so: a micro-batch does not
    count, nor does a step that loss-scale overflow skipped, and a refresh due there is late, not lost.
    `engine.save_checkpoint` also writes masks, dense values behind them, schedule position and trajectory, and
    `engine.load_checkpoint` brings them back.

    Args:
        engine: What `deepspeed.initialize` returned, with an optimizer; ZeRO stage 0, 1, 2 or 3.
        config: All settings; default `EMPConfig()`: no schedule, `hook.pruner.refresh()` by hand.
        trajectory_path: JSON-lines file for the trajectory; written by rank 0. Default: memory only.
        **settings: Fields of EMPConfig by name, put over `config`.

    Attributes:
        pruner: The EMPPruner that decides everything.

    Raises:
        ValueError: A setting is invalid or selects no weights, or the engine does not update what it selects.
        TypeError: A setting has an unknown name.
        NotImplementedError: The engine's configuration is not supported.

    Examples:
        engine, *_ = deepspeed.initialize(model=model, config=config)
        hook = EMPHook(engine, every_n_steps=500)
        for x, y in loader:
            engine.backward(loss_of(engine(x), y))
            engine.step()
        hook.finalize()
    """

    def __init__(
        self,
        engine: Any,
        config: EMPConfig | None = None,
        *,
        trajectory_path: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self._engine = engine
        self.pruner = EMPPruner(engine, None, config, trajectory_path=trajectory_path, **settings)
        self.pruner.remedy = (
            "Say hook.end_epoch() after an epoch's last engine.step(), or refresh earlier (start, every_n_steps, "
            "every_n_epochs)"
        )
        self._wrapped = [
            Wrapped(engine, "step", self._step),
            Wrapped(engine, "save_checkpoint", self._save_checkpoint),
            Wrapped(engine, "load_checkpoint", self._load_checkpoint),
        ]

    @property
    def trajectory(self) -> Trajectory:
        """One PruneEvent per refresh and group."""
        return self.pruner.trajectory

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool mask, True = kept, see `EMPPruner.masks`: under ZeRO 1 to 3 of this rank's part, flat."""
        return self.pruner.masks

    @property
    def density(self) -> float:
        """Kept share of all scored components, in [0, 1]."""
        return self.pruner.density

    @property
    def left_out(self) -> list[LeftOut]:
        """Every parameter that is not pruned: its name, why not, and its size."""
        return self.pruner.left_out

    def end_epoch(self) -> list[PruneEvent]:
        """Say that an epoch is over, after its last `engine.step()`; needed for `every_n_epochs`.

        Collective when it refreshes; returns the rows of the refresh.
        """
        return self.pruner.end_epoch()

    def finalize(self) -> None:
        """Give the engine its own methods back; the model stays masked. Twice is once. Collective."""
        self.pruner.finalize()
        while self._wrapped:
            self._wrapped.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's state."""
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the pruner's state, together with the engine's own."""
        self.pruner.load_state_dict(state)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        self.pruner.step()
        return result

    def _save_checkpoint(
        self, save: Callable[..., Any], save_dir: Any, tag: Any = None, *rest: Any, **more: Any
    ) -> Any:
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        # First ours: DeepSpeed's last act is to declare this checkpoint the latest.
        self.pruner.save(Path(save_dir) / tag / CHECKPOINT_FOLDER)
        return save(save_dir, tag, *rest, **more)

    def _load_checkpoint(
        self, load: Callable[..., Any], load_dir: Any, tag: Any = None, *rest: Any, **more: Any
    ) -> Any:
        tag = self._latest_tag(Path(load_dir)) if tag is None else str(tag)
        if tag is None:
            return load(load_dir, tag, *rest, **more)  # DeepSpeed says what is missing, and loads nothing
        # DeepSpeed's converter to universal checkpoints leaves our folder in the one that it was given.
        tags = (tag, tag.removesuffix("_universal"))
        folders = [folder for name in tags if (folder := Path(load_dir) / name / CHECKPOINT_FOLDER).is_dir()]
        if not folders:
            raise FileNotFoundError(
                f"{Path(load_dir) / tag / CHECKPOINT_FOLDER} does not exist: the checkpoint was saved without EMP, or "
                "converted since (then copy the folder). To begin EMP from its weights, make the EMPHook after "
                "engine.load_checkpoint"
            )
        result = load(load_dir, tag, *rest, **more)
        self.pruner.load(folders[0])
        return result

    def _latest_tag(self, folder: Path) -> str | None:
        latest = folder / ("latest_universal" if self._engine.load_universal_checkpoint() else "latest")
        return latest.read_text().strip() if latest.is_file() else None

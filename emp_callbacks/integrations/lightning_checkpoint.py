"""Masks of a sharded run beside Lightning's checkpoints: each rank writes its part when the strategy writes its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "emp"
IN_FILES = {"saved": "in files"}  # what a checkpoint's callback state says where the masks lie in files of their own


def masks_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Return where the masks of a checkpoint lie: inside it if it is a folder, else beside it as `NAME.emp`."""
    path = Path(checkpoint)
    return path / FOLDER if path.is_dir() else path.with_name(f"{path.name}.{FOLDER}")


class CheckpointCompanion:
    """Saves masks after every checkpoint that a strategy saves, and removes them with it.

    Lightning tells a callback that a checkpoint is being made, but not where; the strategy's own methods know.

    Args:
        strategy: The trainer's strategy; two methods of this instance are wrapped.
        save: Writes the masks into a folder. Collective.
    """

    def __init__(self, strategy: Any, save: Callable[[Path], None]) -> None:
        self._strategy = strategy
        save_checkpoint, remove_checkpoint = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_both(checkpoint: dict[str, Any], filepath: str | os.PathLike[str], **kwargs: Any) -> None:
            save_checkpoint(checkpoint, filepath, **kwargs)
            strategy.barrier("emp: the checkpoint is written")  # rank 0 may only now have made the folder
            save(masks_folder(strategy.broadcast(filepath)))

        def remove_both(filepath: str | os.PathLike[str]) -> None:
            folder = masks_folder(filepath)
            remove_checkpoint(filepath)
            if strategy.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)

        strategy.save_checkpoint, strategy.remove_checkpoint = save_both, remove_both

    def detach(self) -> None:
        """Give the strategy its own methods back."""
        for name in ("save_checkpoint", "remove_checkpoint"):
            self._strategy.__dict__.pop(name, None)

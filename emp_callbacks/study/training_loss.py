"""The loss of a LightningModule's training step, outside its Trainer's loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def training_loss(module: Any, batch: Any, index: int) -> Tensor:
    """Return the loss of one batch.

    Raises:
        ValueError: The training step does not return a loss.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*self\.log\(\).*|.*self\.trainer.*|.*isinstance\(treespec")
        returned = module.training_step(batch, index)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(module).__name__}.training_step returned {type(loss).__name__}, not a loss; "
            "criteria that read data need one"
        )
    return loss

"""The lottery-ticket way: after each refresh what is kept goes back to its initial values."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from emp_callbacks.integrations.lightning import EMPCallback

__all__ = ["Rewinding"]


class Rewinding(pl.Callback):
    """Takes a model back to its initial parameters, masked, and its optimizers to their start, after each refresh.

    To stand after the EMPCallback in the Trainer's list. The learning rate's schedule is not touched: see the tasks'
    `lr_restarts`. Buffers, such as the statistics of batch norms, go back as well.

    Args:
        emp: Makes the masks.

    Source: Frankle and Carbin, arXiv:1803.03635; with N_eff as the budget Diao et al., arXiv:2302.05601.
    """

    def __init__(self, emp: EMPCallback) -> None:
        self._emp = emp
        self._initial: dict[str, Tensor] = {}
        self._rewound_at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._initial, "rewound_at": self._rewound_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._initial, self._rewound_at = state_dict["initial"], state_dict["rewound_at"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        if self._initial:  # a resumed training's
            return
        self._initial = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pruner = self._emp.pruner
        assert pruner is not None
        if pruner.clock.steps_at_refresh == self._rewound_at:
            return
        self._rewound_at = pruner.clock.steps_at_refresh
        masks = pruner.weight_masks
        for name, value in pl_module.state_dict().items():
            initial = self._initial[name].to(value.device)
            value.copy_(torch.where(masks[name].to(value.device), initial, 0.0) if name in masks else initial)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

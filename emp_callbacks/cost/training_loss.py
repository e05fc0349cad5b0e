"""A LightningModule's training step outside its Trainer's loop: its loss, and the evidence that a pruner gathers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from emp_callbacks.pruning.pruner import EMPPruner


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


def show_batches(
    pruner: EMPPruner,
    module: Any,
    batches: Iterable[Any],
    *,
    gradients: bool,
    step_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run batches through a module for the evidence that they give a pruner; no weight is updated.

    Args:
        pruner: Without a schedule: it looks at every forward.
        module: The LightningModule, its gradients empty.
        batches: As its training step takes them.
        gradients: Whether the criterion reads gradients.
        step_context: Around each training step, such as autocast.

    Raises:
        ValueError: The training step does not return a loss.
    """
    with torch.set_grad_enabled(gradients):
        for index, batch in enumerate(batches):
            with step_context():
                loss = training_loss(module, batch, index)
            if gradients:
                loss.backward()  # type: ignore[no-untyped-call]
                pruner.collect()
                module.zero_grad()

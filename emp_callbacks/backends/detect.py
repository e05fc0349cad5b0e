"""Pick the backend from what wraps the model, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from emp_callbacks.backends.local import LocalBackend


def detect_backend(
    model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
) -> tuple[nn.Module, LocalBackend]:
    """Return the user's own module and the backend that reaches its parameters.

    Args:
        model: A module, or one wrapped in DistributedDataParallel or DataParallel.
        optimizer: The optimizer or optimizers that update it; None for a model that is not trained.

    Raises:
        TypeError: `model` or `optimizer` is not what it should be.
        NotImplementedError: The parameters are sharded by FSDP, FSDP2 or DeepSpeed ZeRO-3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or "flat_param" in name:
            raise NotImplementedError(
                f"parameter {name!r} is sharded (FSDP, FSDP2 or DeepSpeed ZeRO-3); EMP supports one process and DDP "
                "so far: use strategy='ddp' or 'auto'"
            )
    return model, LocalBackend(_optimizers(optimizer))


def _optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
) -> list[torch.optim.Optimizer]:
    given = (
        [] if optimizer is None else [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    )
    for one in given:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer (or a list of them), got {type(one).__name__}")
    return given

"""Pick the backend from what wraps the model, once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from emp_callbacks.backends.base import Backend
from emp_callbacks.backends.local import LocalBackend

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def detect_backend(model: Any, optimizer: Optimizers) -> Backend:
    """Return the backend that reaches the parameters of a model.

    Args:
        model: A module, plain, compiled, wrapped in DistributedDataParallel, DataParallel or FullyShardedDataParallel,
            sharded by `fully_shard`; or a DeepSpeed engine; or what Accelerate or Fabric made of one.
        optimizer: The optimizer or optimizers that update it; None for a model that is not trained, and for a
            DeepSpeed engine, which brings its own.

    Raises:
        TypeError: `model` or `optimizer` is not what it should be.
        NotImplementedError: This way of sharding is not supported.
    """
    model = getattr(model, "_forward_module", model)  # Fabric's, around what its strategy made of the model
    if hasattr(model, "basic_optimizer") and hasattr(model, "zero_optimization_stage"):
        from emp_callbacks.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a DeepSpeed engine, got {type(model).__name__}")
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    optimizers = _optimizers(optimizer)
    modules, parameters = list(model.modules()), list(model.parameters())
    if _any_is(modules, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        from emp_callbacks.backends.fsdp import FSDP1Backend

        return FSDP1Backend(model, optimizers)
    _check_not_an_inside(parameters)
    # After a forward without gradients a root that fully_shard wrapped shows plain parameters.
    if _any_is(modules, "torch.distributed.fsdp", "FSDPModule") or _any_is(
        parameters, "torch.distributed.tensor", "DTensor"
    ):
        from emp_callbacks.backends.fsdp import FSDP2Backend

        return FSDP2Backend(model, optimizers)
    return LocalBackend(model, optimizers, group)


def _any_is(things: Sequence[object], package: str, name: str) -> bool:
    """Return whether one is of a class that takes torch a second to import: nobody has one who did not import it."""
    return package in sys.modules and any(isinstance(thing, getattr(sys.modules[package], name)) for thing in things)


def _check_not_an_inside(parameters: Sequence[nn.Parameter]) -> None:
    """Raise where the model's shards are known to an engine or wrapper that was not passed."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            raise TypeError("the model is sharded by DeepSpeed ZeRO-3; pass the engine instead of the model")
        if hasattr(parameter, "_fsdp_flattened"):
            raise TypeError("the model is the inside of a FullyShardedDataParallel; pass the outermost wrapper instead")


def _optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, (Mapping, str))
    given = list(optimizer) if several else [optimizer]
    for one in given:
        if not isinstance(one, torch.optim.Optimizer):
            inner = isinstance(getattr(one, "optimizer", None), torch.optim.Optimizer)
            remedy = "pass its .optimizer" if inner else "pass what updates the model, or None to prune it by hand"
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer (or a list of them), got {type(one).__name__}; {remedy}"
            )
    return given

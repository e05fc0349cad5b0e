"""Which of a Trainer's strategies EMP works with, and which object of them knows the shards."""

from __future__ import annotations

from typing import Any

_WRAPPING = ("DeepSpeed", "FSDP", "DDP")  # strategies whose own model object, not the module, knows shards and ranks


def sharding_model(trainer: Any, pl_module: Any) -> Any:
    """Return what knows where the parameters are, and on which ranks: the module, or what the strategy made of it."""
    name = type(trainer.strategy).__name__
    return trainer.strategy.model if any(kind in name for kind in _WRAPPING) else pl_module


def check_strategy(trainer: Any) -> None:
    """Raise NotImplementedError where the strategy is one that was never tried."""
    name = type(trainer.strategy).__name__
    if "XLA" in name:
        raise NotImplementedError(f"EMPCallback does not support {name}; use one device, DDP, FSDP or DeepSpeed")

"""Modules that stand in for another one: compiled, sharded, checkpointed, adapted by PEFT."""

from __future__ import annotations

from torch import nn

from emp_callbacks.targets.adapters import adapted

__all__ = ["inner", "innermost"]

_WRAPPED = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)


def inner(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds; None if this is none."""
    wrapped = (module._modules[name] for name in _WRAPPED if name in module._modules)
    return next(wrapped, None) or adapted(module)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module that all wrappers around it stand in for."""
    while (found := inner(module)) is not None:
        module = found
    return module

"""The shapes that parameters have in the unsharded model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["FullShape", "own_shape"]

FullShape = Callable[[nn.Parameter], torch.Size]
"""Gives the shape that a parameter has in the unsharded model."""


def own_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that is not sharded."""
    return parameter.shape

"""Which positions of a batch count as evidence: padding does not.

Letters in shapes: B samples, T positions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from emp_callbacks.targets.dotted_path import function_at

PositionsSource = str | Callable[[Any], Tensor | None]
"""Where a batch holds its mask of positions: a key, 'module.function', or a function of the batch."""


def positions_of(batch: Any, source: PositionsSource | None) -> Tensor | None:
    """Return the mask of positions, shape (B, T), that a batch brings; None where it brings none.

    Args:
        batch: What the training loop hands to the model.
        source: A key, looked up where the batch is a mapping that has it; a function of the batch, in a recipe
            'module.function'; None: every position counts.

    Raises:
        TypeError: What was found is no tensor.
        ValueError: It is not of shape (B, T), or 'module.function' cannot be imported.
    """
    if source is None:
        return None
    reads = function_for(source)
    if reads is not None:
        found = reads(batch)
    elif isinstance(batch, Mapping):
        found = batch.get(source)
    else:
        return None
    return None if found is None else check_positions(found, f"positions={source!r}")


def function_for(source: PositionsSource) -> Callable[[Any], Tensor | None] | None:
    """Return the function that reads the mask out of a batch; None where `source` is a key.

    Raises:
        ValueError: 'module.function' cannot be imported.
    """
    if not isinstance(source, str):
        return source
    return function_at(source, "positions") if "." in source else None


def check_positions(mask: Any, what: str) -> Tensor:
    """Return the mask if it can be one of positions.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not of shape (B, T).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must give a tensor of shape (B, T), got {type(mask).__name__}; or use None")
    if mask.dim() != 2:
        raise ValueError(
            f"{what} must have shape (B, T), one number for each position, got {tuple(mask.shape)}; name another mask, "
            "or use None to count every position"
        )
    return mask


def counted_rows(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the mask over the leading dimensions of an activation whose features come last, bool; None: all count.

    Args:
        mask: Shape (B, T), bool.
        shape: Of the activation: (B, T, ..., F) or (B * T, ..., F); any other shape has other positions.
    """
    if mask is None or len(shape) < 2:
        return None
    if len(shape) > 2 and tuple(shape[:2]) == tuple(mask.shape):
        return mask
    return mask.flatten() if shape[0] == mask.numel() else None

"""Numbers read as their bit patterns: integers in which non-negative floats have the same order, and -1 is all bits."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """Return the signed integer of the same size."""
    return _INTEGERS[dtype.itemsize]


def as_bits(values: Tensor) -> Tensor:
    """Return the bit patterns as signed integers of the same size, in the same memory."""
    return values.view(integer_of(values.dtype))


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that have these bit patterns."""
    return bits.to(integer_of(dtype)).view(dtype)

"""Masks as packed bits: one bit per component."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Return the mask's bits in flat order, first bit highest, shape (ceil(n / 8),), uint8, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().reshape(-1).cpu().numpy()))


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Return the flat mask of `size` bits that `pack_bits` packed, shape (size,), bool, on the CPU.

    Raises:
        ValueError: `packed` has not the number of bytes that `size` bits need.
    """
    if packed.dtype != torch.uint8 or packed.numel() != (size + 7) // 8:
        raise ValueError(
            f"{size} mask bits need {(size + 7) // 8} bytes (uint8), got {packed.numel()} of {packed.dtype}; "
            "the mask belongs to another shape or is truncated"
        )
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=size).astype(bool))

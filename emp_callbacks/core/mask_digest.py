"""A number that tells two masks apart, made where the mask is."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunks
from emp_callbacks.core.device import on_host
from emp_callbacks.core.packing import pack_bits

_FIRST, _SECOND = 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51  # odd: multiplying by them, modulo 2^64, loses nothing


def mask_digest(mask: Tensor) -> Tensor:
    """Return a digest of a bool mask, shape (), int64, on its device: the same on devices of one kind."""
    if on_host(mask):
        return torch.tensor(zlib.crc32(pack_bits(mask).numpy().tobytes()))
    flat = mask.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    for at in chunks(flat):  # sums of integers: in whatever order a device adds, it wraps around to the same
        mixed = torch.arange(at.start + 1, at.stop + 1, device=mask.device).mul_(_FIRST)
        mixed.bitwise_xor_(mixed >> 32).mul_(_SECOND)
        total += mixed.mul_(flat[at]).sum()
    return total

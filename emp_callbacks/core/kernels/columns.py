"""One mask over the columns of a table, as of features: read once for many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.kernels.tables import launching

BLOCK = 1024
ROWS = 8  # of one program


def mask_columns(values: Tensor, mask: Tensor) -> Tensor:
    """Return values, contiguous, shape (..., F), with the pruned columns 0.

    Args:
        values: Any dtype; read as bits, so NaN and Inf are like any other.
        mask: F entries, bool, True = kept, contiguous.
    """
    masked = torch.empty_like(values)
    width = mask.numel()
    rows = values.numel() // max(1, width)
    block = min(BLOCK, triton.next_power_of_2(max(1, width)))
    if values.numel():
        grid = triton.cdiv(width, block), triton.cdiv(rows, ROWS)
        with launching(values.device):
            _mask_columns[grid](as_bits(values), mask.view(torch.uint8), as_bits(masked), rows, width, block, ROWS)
    return masked


@triton.jit
def _mask_columns(values, mask, masked, rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kept = tl.load(mask + column, mask=inside, other=0) != 0
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * width + column[None, :]
    held = (row < rows)[:, None]
    # A pruned value is not even read.
    bits = tl.load(values + at, mask=kept[None, :] & held, other=0)
    tl.store(masked + at, bits, mask=inside[None, :] & held)

"""The highest scores of every row of a matrix, each row its own group, without a Python loop over rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import CHUNK
from emp_callbacks.core.selection import AllSum, key_dtype, longest_in_bits, score_bits


def top_rows(scores_gn: Tensor, keep_g: Tensor) -> Tensor:
    """Return the mask of the keep_g[g] highest scores of each row, ties by lowest index.

    Args:
        scores_gn: Shape (G, N), any floating dtype, either sign.
        keep_g: Shape (G,), int64, each in [0, N].

    Returns:
        Shape (G, N), bool, True = kept.
    """
    rows = max(1, CHUNK // max(1, scores_gn.shape[1]))
    blocks = zip(torch.split(scores_gn, rows), torch.split(keep_g.to(scores_gn.device), rows), strict=True)
    return torch.cat([_top_rows_block(block, keep) for block, keep in blocks])


def _top_rows_block(scores_gn: Tensor, keep_g: Tensor) -> Tensor:
    dtype = key_dtype([scores_gn.dtype])
    bits = score_bits(scores_gn, dtype)
    keep = keep_g[:, None]
    key = torch.zeros_like(keep)
    # Bisection over the bit pattern: the largest key that at least `keep` scores of the row reach.
    for bit in reversed(range(63 if dtype == torch.float64 else 31)):
        candidate = key | (1 << bit)
        reached = (bits >= candidate).sum(1, keepdim=True) >= keep
        key = torch.where(reached, candidate, key)
    above = bits > key
    ties = bits == key
    return above | (ties & (ties.cumsum(1) <= keep - above.sum(1, keepdim=True)))


def top_rows_sharded(
    scores_n: Tensor, row_n: Tensor, column_n: Tensor, keep_g: Tensor, all_sum: AllSum
) -> tuple[Tensor, Tensor]:
    """Return what `top_rows` would, for rows that are spread over ranks. Collective.

    Args:
        scores_n: This rank's part, flat, shape (n,), floating, either sign; may be empty.
        row_n: Row of each element, shape (n,), int64, in [0, G).
        column_n: Index of each element within its row, shape (n,), int64.
        keep_g: Shape (G,), int64, on the CPU, the same on every rank.
        all_sum: Returns the sum of an int64 tensor over all ranks.

    Returns:
        The mask, shape (n,), bool, and the bit pattern of each row's lowest kept score, shape (G,), int64.
    """
    dtype = key_dtype([scores_n.dtype])
    bits = score_bits(scores_n, dtype).long()

    def count(chosen: Tensor) -> Tensor:
        return all_sum(torch.bincount(row_n[chosen], minlength=keep_g.numel()).cpu())

    key = _largest_per_row(63 if dtype == torch.float64 else 31, lambda at: count(bits >= at[row_n]) >= keep_g, keep_g)
    above, ties = bits > key[row_n], bits == key[row_n]
    need = keep_g - count(above)
    cut = torch.full_like(key, torch.iinfo(torch.int64).max)
    if bool((count(ties) != need).any()):
        width = longest_in_bits(int(column_n.max()) + 1 if column_n.numel() else 0, all_sum)
        # the highest column that fewer than `need` ties lie below: the need-th tie itself
        cut = _largest_per_row(width, lambda at: count(ties & (column_n < at[row_n])) < need, keep_g)
        cut = cut.masked_fill(need == 0, -1)
    return above | (ties & (column_n <= cut.to(column_n.device)[row_n])), key


def _largest_per_row(width: int, holds: Callable[[Tensor], Tensor], like_g: Tensor) -> Tensor:
    """Return for each row the largest number of `width` bits for which `holds`, a falling condition, is true."""
    found = torch.zeros_like(like_g)
    for bit in reversed(range(width)):
        candidate = found | (1 << bit)
        found = torch.where(holds(candidate), candidate, found)
    return found

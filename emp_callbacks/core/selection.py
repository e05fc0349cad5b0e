"""The EMP mask of scores that are one group, and the share of the score mass that a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunks, longest_chunk, scratch
from emp_callbacks.core.effective_number import (
    check_beta,
    check_scores,
    effective_numbers,
    finite_moments,
    keep_counts,
    key_dtype,
    scaled_to_unit,
)
from emp_callbacks.core.threshold import ScoredPart, find_threshold


def emp_mask(scores: Tensor, beta: float = 1.0) -> Tensor:
    """Return the EMP mask: the floor(beta * N_eff) highest |scores|, ties by lowest index.

    Args:
        scores: Any shape, float16 to float64, any device, either sign; all of it is one group.
        beta: Factor on N_eff, > 0.

    Returns:
        Same shape and device, bool, True = kept. Exactly `keep_count` are True, but never a score of 0;
        if every score is 0 there is no information and all are kept.

    Raises:
        TypeError: `scores` is not a floating tensor.
        ValueError: `scores` is empty or `beta` is not > 0.
        FloatingPointError: A score is NaN or Inf.

    Source: arXiv:2509.25606, nu = floor(beta * N_eff), keep the nu highest scores.

    Examples:
        >>> emp_mask(torch.tensor([1.0, -3.0, 3.0, 0.0]))  # N_eff = 49 / 19
        tensor([False,  True,  True, False])
    """
    check_beta(beta)
    check_scores(scores)
    moments = finite_moments(scores)
    if not int(moments.nonzero[0]):
        return torch.ones_like(scores, dtype=torch.bool)
    keep = int(keep_counts(effective_numbers(moments), moments.nonzero, beta)[0])
    part = ScoredPart(scores.detach().reshape(-1), 0)
    return find_threshold([part], keep, key_dtype([scores.dtype])).mask(part).view(scores.shape)


def kept_mass(scores_n: Tensor, mask_n: Tensor) -> Tensor:
    """Return the sum of |scores| over the kept ones; both flat, shape (n,); shape (), float64."""
    dtype, device, length = key_dtype([scores_n.dtype]), scores_n.device, longest_chunk(scores_n)
    parts = [torch.zeros((), dtype=torch.float64, device=device)]
    with scratch(length, dtype, device) as buffer, scratch(length, torch.float64, device) as wide_buffer:
        for at in chunks(scores_n):
            kept = buffer[: at.stop - at.start].copy_(mask_n[at]).mul_(scores_n[at].detach()).abs_()
            parts.append(wide_buffer[: len(kept)].copy_(kept).sum())
    return torch.stack(parts).sum()


def preserved_mass(scores: Tensor, mask: Tensor) -> float:
    """Return s_eff, the share of the score mass that `mask` keeps: sum of kept |s| / sum |s|.

    Args:
        scores: Any shape, floating dtype.
        mask: Same shape, bool, True = kept.

    Returns:
        A fraction in [0, 1]; 1 if every score is 0 (nothing was lost).

    Raises:
        TypeError: `mask` is not bool, or `scores` is not floating.
        ValueError: The shapes differ or `scores` is empty.
        FloatingPointError: A score is NaN or Inf.

    Source: arXiv:2509.25606, preserved effective mass.

    Examples:
        >>> preserved_mass(torch.tensor([3.0, 1.0]), torch.tensor([True, False]))
        0.75
    """
    check_scores(scores)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = kept), got {mask.dtype}; call .bool()")
    if mask.shape != scores.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, scores have {tuple(scores.shape)}; they must be equal")
    finite_moments(scores)
    flat, kept = scaled_to_unit(scores.detach().reshape(-1)), mask.reshape(-1)
    total = float(kept_mass(flat, torch.ones_like(kept)))
    return float(kept_mass(flat, kept)) / total if total else 1.0

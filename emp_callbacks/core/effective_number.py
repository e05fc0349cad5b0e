"""N_eff: how many scored components effectively carry the score mass.

Source: Wang, Guralnik, Akbari, Dixon, "Effective Model Pruning", arXiv:2509.25606.
Every function takes scores of either sign and works on their absolute values, as the paper's
w_i = |s_i| / sum |s| does. A signed weight tensor is therefore its own magnitude score: no copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length, scratch

# N_eff of equal scores is an integer that float64 sums can miss by a few ulp from below
# (10 scores of 0.1 give 9.999999999999998): without the slack, floor() would drop one.
FLOOR_SLACK = 1e-12


@dataclass(frozen=True, slots=True)
class ScoreMoments:
    """Sums that determine N_eff; moments of disjoint parts of a group add.

    Attributes:
        total: sum |s|, shape (G,), float64.
        total_sq: sum s^2, shape (G,), float64.
        nonzero: Number of scores that are not 0, shape (G,), float64 (exact below 2^53).
    """

    total: Tensor
    total_sq: Tensor
    nonzero: Tensor

    def stack(self) -> Tensor:
        """Return the three sums as one tensor, shape (G, 3), float64: one all-reduce adds them."""
        return torch.stack([self.total, self.total_sq, self.nonzero], dim=1)

    @classmethod
    def unstack(cls, sums: Tensor) -> ScoreMoments:
        """Return the moments held in `sums`, shape (G, 3)."""
        return cls(*sums.unbind(1))

    def sum(self) -> ScoreMoments:
        """Return the moments of all G groups taken as one group, shape (1,)."""
        return ScoreMoments.unstack(self.stack().sum(0, keepdim=True))


def key_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the dtype in which scores of these dtypes compare exactly: float64 if any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_scores(scores: Tensor) -> None:
    """Raise unless `scores` is a non-empty real floating tensor."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}; use torch.as_tensor(scores)")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}; call .float()")
    if scores.numel() == 0:
        raise ValueError("scores are empty (0 components); N_eff needs at least one score")


def score_moments(scores_gn: Tensor) -> ScoreMoments:
    """Return the moments of N scores in each of G groups, accumulated in float64.

    Args:
        scores_gn: Shape (G, N), any floating dtype, either sign. float64 scores must lie within
            1e-150 and 1e150 of each other's square (see `effective_number`, which rescales).

    Returns:
        Fields of shape (G,). NaN or Inf in a group makes its `total` non-finite.
    """
    length = chunk_length(scores_gn.device)
    rows = max(1, length // max(1, scores_gn.shape[1]))
    sums = [_row_moments(block, length) for block in torch.split(scores_gn.detach(), rows)]
    return ScoreMoments.unstack(torch.cat(sums))


def _row_moments(block_gn: Tensor, length: int) -> Tensor:
    dtype, device, most = key_dtype([block_gn.dtype]), block_gn.device, block_gn[:, :length].numel()
    parts = []
    with scratch(most, dtype, device) as buffer, scratch(most, torch.float64, device) as wide_buffer:
        for part in torch.split(block_gn, length, dim=1):
            magnitude = buffer[: part.numel()].view(part.shape).copy_(part).abs_()
            wide = wide_buffer[: part.numel()].view(part.shape).copy_(magnitude)
            total, total_sq = _sum_rows(wide), _sum_rows(wide.square_())
            # Written as floats, which is three times as fast as bool; exact up to 2^24 of them.
            count = _sum_rows(torch.gt(magnitude, 0, out=magnitude))
            parts.append(torch.stack([total, total_sq, count.double()], dim=1))
    # Stacked and summed at the end: torch's cascade keeps the rounding error near one ulp.
    return torch.stack(parts).sum(0)


def _sum_rows(values_gn: Tensor) -> Tensor:
    # Of one row, torch sums all of it on all threads twice as fast as along a dimension.
    return values_gn.sum()[None] if len(values_gn) == 1 else values_gn.sum(1)


def effective_numbers(moments: ScoreMoments) -> Tensor:
    """Return N_eff of each group, shape (G,), float64, in components; 0 where every score is 0.

    Raises:
        FloatingPointError: Squares of the scores under- or overflow float64.
    """
    empty = moments.total == 0
    broken = (~empty) & ((moments.total_sq == 0) | ~torch.isfinite(moments.total_sq))
    if bool(broken.any()):
        raise FloatingPointError(
            f"squares of the scores leave float64 (sum |s| = {float(moments.total[broken][0]):g}); "
            "multiply all scores by one constant: N_eff does not depend on it"
        )
    return torch.where(empty, 0.0, moments.total.square() / moments.total_sq.masked_fill(empty, 1.0))


def keep_counts(n_eff: Tensor, limit: Tensor, beta: float, least: int = 1) -> Tensor:
    """Return floor(beta * n_eff) brought into [least, limit], shape (G,), int64.

    Args:
        n_eff: Shape (G,), float64.
        limit: Shape (G,), most components that may be kept: those whose score is not 0. Wins over `least`.
        beta: Factor, > 0.
        least: Fewest components to keep where there are as many, >= 1.
    """
    counts = (beta * n_eff * (1.0 + FLOOR_SLACK)).floor().clamp(min=least)
    return torch.minimum(counts, limit.to(counts.dtype)).long()


def effective_number(scores: Tensor) -> float:
    """Return N_eff = (sum |s|)^2 / sum s^2, the inverse Simpson index of the scores.

    Args:
        scores: Any shape, float16 to float64, any device.

    Returns:
        Number of components: 1 if one score holds all the mass, N if all N scores are equal,
        0 if every score is 0.

    Raises:
        TypeError: `scores` is not a floating tensor.
        ValueError: `scores` is empty.
        FloatingPointError: A score is NaN or Inf.

    Source: arXiv:2509.25606, definition of the effective number.

    Examples:
        >>> effective_number(torch.tensor([3.0, 3.0, 0.0, 0.0]))
        2.0
        >>> effective_number(torch.tensor([3.0, 1.0]))
        1.6
    """
    return float(effective_numbers(finite_moments(scores))[0])


def finite_moments(scores: Tensor) -> ScoreMoments:
    """Return the moments of all `scores` as one group, shape (1,), after checking them.

    Float64 scores are scaled by a power of two first (N_eff does not depend on scale), so that their squares
    neither vanish nor overflow; `total` then carries that scale.
    """
    check_scores(scores)
    flat = scaled_to_unit(scores.detach().reshape(1, -1))
    moments = score_moments(flat)
    if not bool(torch.isfinite(moments.total).all()):
        raise FloatingPointError(
            f"scores hold {int((~torch.isfinite(flat)).sum())} NaN or Inf of {flat.numel()}; "
            "EMP needs finite scores: look for a diverged run or an overflow in the scores"
        )
    return moments


def scaled_to_unit(scores: Tensor) -> Tensor:
    """Return float64 `scores` times the power of two that brings the largest near 1; others as they are."""
    if scores.dtype != torch.float64:
        return scores
    largest = float(scores.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return scores
    exponent = math.frexp(largest)[1]
    # Two exact steps: 2^-exponent itself overflows for denormal scores.
    half = exponent // 2
    return scores * 2.0**-half * 2.0 ** -(exponent - half)


def keep_count(n_eff: float, size: int, beta: float = 1.0) -> int:
    """Return how many of `size` components EMP keeps: floor(beta * n_eff), at least 1, at most `size`.

    Args:
        n_eff: Effective number, in components, 0 <= n_eff <= size.
        size: Number of components, >= 1.
        beta: Factor, > 0; above 1 keeps more, below 1 keeps fewer.

    Returns:
        An int in [1, size]. n_eff = 0 (every score is 0) carries no information: all are kept.

    Raises:
        ValueError: An argument lies outside its range.

    Source: arXiv:2509.25606, nu = floor(beta * N_eff).

    Examples:
        >>> keep_count(9.999999999999998, 10)  # ten equal scores: a sum in float64 falls just short
        10
        >>> keep_count(6.4, 10, beta=0.5)
        3
    """
    check_beta(beta)
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    if not 0.0 <= n_eff <= size * (1.0 + 1e-9):
        raise ValueError(f"n_eff must lie in [0, size={size}], got {n_eff}")
    if n_eff == 0.0:
        return size
    one = torch.tensor([float(n_eff)], dtype=torch.float64)
    return int(keep_counts(one, torch.tensor([size]), beta)[0])


def check_beta(beta: float) -> None:
    """Raise ValueError unless `beta` is a finite number > 0."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number > 0, got {beta!r}; beta=1 keeps N_eff components")

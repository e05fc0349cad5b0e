"""Exactly the nu highest scores of one group, by value and then by lowest index, without a sort.

A non-negative IEEE float and its bit pattern read as an integer have the same order. The nu-th highest value
is therefore found by counting the leading bits in histograms, digit by digit (radix select): every pass adds
integers, so the answer does not depend on chunk size, order of summation or number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.effective_number import (
    check_beta,
    check_scores,
    chunks,
    effective_numbers,
    finite_moments,
    keep_counts,
    scaled_to_unit,
)

AllSum = Callable[[Tensor], Tensor]
DIGIT_BITS = 11  # 2048 bins of int64: 16 KiB to communicate per round


def local_sum(value: Tensor) -> Tensor:
    """Return `value`: the sum over ranks when there is one rank."""
    return value


class ScoredPart(NamedTuple):
    """A part of a group's scores and where it lies in the group.

    `scores` is flat, shape (n,), of either sign. `positions` is the group position of its first element, the others
    following, or the position of each, shape (n,), int64, ascending.
    """

    scores: Tensor
    positions: int | Tensor

    def positions_at(self, inside: Tensor) -> Tensor:
        """Return the group positions of the elements with indices `inside`, shape (k,), int64."""
        return inside + self.positions if isinstance(self.positions, int) else self.positions[inside]

    def count_up_to(self, position: int) -> int:
        """Return how many elements have a group position <= `position`: they come first."""
        if isinstance(self.positions, int):
            return min(max(position - self.positions + 1, 0), self.scores.numel())
        return int(torch.searchsorted(self.positions, position, right=True))

    @property
    def end(self) -> int:
        """One more than the highest group position; 0 if there are no elements."""
        size = self.scores.numel()
        return int(self.positions_at(torch.tensor([size - 1]))[0]) + 1 if size else 0


@dataclass(frozen=True, slots=True)
class Threshold:
    """The rule "keep above `key`, and of those equal to it the positions up to `last_tie`".

    Attributes:
        key: Bit pattern of the lowest kept score.
        last_tie: Highest group position kept among the scores equal to the lowest kept one.
        dtype: float32 or float64, in which `key` is to be read.
    """

    key: int
    last_tie: int
    dtype: torch.dtype

    @property
    def value(self) -> float:
        """The lowest kept score."""
        return float(torch.tensor(self.key, dtype=_integer(self.dtype)).view(self.dtype))

    def mask(self, part: ScoredPart) -> Tensor:
        """Return the mask of a part of the group, shape (n,), bool, True = kept."""
        kept = torch.empty(part.scores.numel(), dtype=torch.bool, device=part.scores.device)
        up_to_last_tie = part.count_up_to(self.last_tie)
        for at in chunks(part.scores.numel()):
            bits = score_bits(part.scores[at], self.dtype)
            torch.gt(bits, self.key, out=kept[at])
            inside = up_to_last_tie - at.start
            if inside > 0:
                kept[at][:inside] |= bits[:inside] == self.key
        return kept


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def key_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the dtype in which scores of these dtypes compare exactly: float64 if any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def score_bits(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |scores| as integers of the same order; same shape, int32 for float32, int64 for float64."""
    return scores.detach().to(dtype).abs().view(_integer(dtype))


def find_threshold(
    parts: Sequence[ScoredPart], keep: int, dtype: torch.dtype, all_sum: AllSum = local_sum
) -> Threshold:
    """Return the threshold that keeps exactly `keep` scores of a group. Collective through `all_sum`.

    Args:
        parts: What this rank counts of the group; over all ranks the parts cover it once. May be empty.
        keep: Between 1 and the number of scores of the group.
        dtype: The same on every rank, see `key_dtype`.
        all_sum: Returns the sum of an int64 tensor over all ranks.
    """
    key, missing, ties = _kth_highest(parts, keep, dtype, all_sum)
    if missing == ties:
        return Threshold(key, torch.iinfo(torch.int64).max // 2, dtype)
    return Threshold(key, _nth_tie(parts, key, missing, dtype, all_sum), dtype)


def _kth_highest(parts: Sequence[ScoredPart], keep: int, dtype: torch.dtype, all_sum: AllSum) -> tuple[int, int, int]:
    """Return the key of the keep-th highest score, how many equal ones to keep, how many there are."""
    prefix, need, ties = 0, keep, 0
    done = 63 if dtype == torch.float64 else 31  # the sign bit is 0
    whole = done
    while done:
        width = min(DIGIT_BITS, done)
        shift = done - width
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for scores in _score_chunks(parts):
            bits = score_bits(scores, dtype)
            if done < whole:
                bits = bits[(bits >> done) == prefix]
            counts += torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
        counts = all_sum(counts)
        at_least = counts.flip(0).cumsum(0).flip(0)  # scores whose digit is >= the bin's
        digit = int((at_least >= need).sum()) - 1
        ties = int(counts[digit])
        need -= int(at_least[digit]) - ties
        prefix = (prefix << width) | digit
        done = shift
    return prefix, need, ties


def _nth_tie(parts: Sequence[ScoredPart], key: int, rank: int, dtype: torch.dtype, all_sum: AllSum) -> int:
    """Return the group position of the rank-th lowest score equal to `key` (rank >= 1)."""
    end = max((part.end for part in parts), default=0)
    whole = done = max(1, longest_in_bits(end, all_sum))
    prefix, need = 0, rank
    while done:
        width = min(DIGIT_BITS, done)
        shift = done - width
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for positions in _tie_positions(parts, key, dtype):
            if done < whole:
                positions = positions[(positions >> done) == prefix]
            counts += torch.bincount((positions >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
        up_to = all_sum(counts).cumsum(0)
        digit = int((up_to < need).sum())
        need -= int(up_to[digit - 1]) if digit else 0
        prefix = (prefix << width) | digit
        done = shift
    return prefix


def longest_in_bits(number: int, all_sum: AllSum) -> int:
    """Return the length in bits of the highest `number` of any rank, found by summing one-hot lengths."""
    lengths = torch.zeros(64, dtype=torch.int64)
    lengths[number.bit_length()] = 1
    return int(all_sum(lengths).nonzero().max())


def _score_chunks(parts: Sequence[ScoredPart]) -> Iterator[Tensor]:
    for part in parts:
        for at in chunks(part.scores.numel()):
            yield part.scores[at]


def _tie_positions(parts: Sequence[ScoredPart], key: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for part in parts:
        for at in chunks(part.scores.numel()):
            ties = (score_bits(part.scores[at], dtype) == key).nonzero().squeeze(1)
            yield part.positions_at(ties + at.start)


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

    Example:
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


def kept_mass(scores_n: Tensor, mask_n: Tensor) -> float:
    """Return the sum of |scores| over the kept ones; both flat, shape (n,); accumulated in float64."""
    parts = [(scores_n[at].detach().double().abs() * mask_n[at]).sum() for at in chunks(scores_n.numel())]
    return float(torch.stack(parts).sum()) if parts else 0.0


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

    Example:
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
    total = kept_mass(flat, torch.ones_like(kept))
    return kept_mass(flat, kept) / total if total else 1.0

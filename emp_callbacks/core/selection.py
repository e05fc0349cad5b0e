"""Exactly the nu highest scores of one group, by value and then by lowest index, without a sort.

A sample of the scores brackets the nu-th highest; one pass counts those above the bracket and takes out the few
inside it; the nu-th is selected among these. Where the bracket missed, or too many scores are equal, it is selected
among all. What is counted are integers, so the answer does not depend on chunk size, order or number of ranks.

A non-negative IEEE float and its bit pattern read as an integer have the same order. The last step therefore counts
the leading bits in histograms, digit by digit (radix select), which add over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.chunks import CHUNK, FEW, chunk_buffers, gather_rows, magnitudes, take
from emp_callbacks.core.effective_number import (
    check_beta,
    check_scores,
    effective_numbers,
    finite_moments,
    keep_counts,
    key_dtype,
    scaled_to_unit,
)

AllSum = Callable[[Tensor], Tensor]
DIGIT_BITS = 11  # 2048 bins of int64: 16 KiB to communicate per round
SAMPLE = 1 << 16  # scores of a group that bracket its threshold; below eight times as many, all are looked at
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread most evenly
DEVIATIONS = 4.0  # of the sample's rank to each side of the threshold: a random order misses once in 10,000 times
_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # bit patterns


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
        return _value(self.key, self.dtype)

    def mask(self, part: ScoredPart) -> Tensor:
        """Return the mask of a part of the group, shape (n,), bool, True = kept."""
        kept = torch.empty(part.scores.numel(), dtype=torch.bool, device=part.scores.device)
        value, tied = self.value, part.count_up_to(self.last_tie)
        for at, own in magnitudes(part.scores, self.dtype):
            split = min(max(tied - at.start, 0), len(own))  # up to here ties are kept
            torch.ge(own[:split], value, out=own[:split])
            torch.gt(own[split:], value, out=own[split:])
            kept[at].copy_(own)
        return kept


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _value(key: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(key, dtype=_integer(dtype)).view(dtype))


def score_bits(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |scores| as integers of the same order; same shape, int32 for float32, int64 for float64."""
    return scores.detach().to(dtype).abs().view(_integer(dtype))


def find_threshold(
    parts: Sequence[ScoredPart], keep: int, dtype: torch.dtype, all_sum: AllSum = local_sum
) -> Threshold:
    """Return the threshold that keeps exactly `keep` scores of a group. Collective through `all_sum`.

    Args:
        parts: What this rank counts of the group; over all ranks the parts cover it once. May be empty.
        keep: Between 1 and the number of scores of the group that are not 0.
        dtype: The same on every rank, see `key_dtype`.
        all_sum: Returns the sum of an int64 tensor over all ranks.
    """
    scores = [part.scores for part in parts]
    found = _in_bracket(scores, keep, dtype, all_sum) or _kth_highest(scores, keep, dtype, all_sum)
    if found.missing == found.ties:
        return Threshold(found.key, torch.iinfo(torch.int64).max // 2, dtype)
    return Threshold(found.key, _nth_tie(parts, found.key, found.missing, dtype, all_sum), dtype)


class _Found(NamedTuple):
    """The key of the lowest kept score, how many equal ones to keep, how many there are."""

    key: int
    missing: int
    ties: int


def _in_bracket(scores: Sequence[Tensor], keep: int, dtype: torch.dtype, all_sum: AllSum) -> _Found | None:
    """Return the keep-th highest score where a bracket around it holds few; None where it has to be looked for."""
    size = int(all_sum(torch.tensor([sum(values.numel() for values in scores)]))[0])
    if size < 8 * SAMPLE:
        return None
    low, high = _bracket([_sample(values, size / SAMPLE) for values in scores], keep / size, dtype, all_sum)
    divided = _divide(scores, low, high, dtype)
    above, within, taken = all_sum(divided.counts).tolist()
    if taken < within or not above < keep <= above + within:
        return None
    return _kth_highest([divided.inside], keep - above, dtype, all_sum)


def _sample(scores_n: Tensor, step: float) -> Tensor:
    """Return one of every `step` scores, each time at another place, so as not to beat with the rows of a matrix."""
    i = torch.arange(int(scores_n.numel() / step), dtype=torch.float64, device=scores_n.device)
    return scores_n.detach()[((i + i * GOLDEN % 1) * step).long()]


def _bracket(samples: Sequence[Tensor], share: float, dtype: torch.dtype, all_sum: AllSum) -> tuple[float, float]:
    """Return two scores between which very likely lies the one that `share` of the scores reach."""
    size = int(all_sum(torch.tensor([sum(values.numel() for values in samples)]))[0])
    margin = DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1
    lowest, highest = math.ceil(size * share + margin), math.floor(size * share - margin)
    low, high = 1, _INFINITE[dtype]  # a score of 0 is never kept
    if lowest <= size:
        low = max(low, _kth_highest(samples, lowest, dtype, all_sum).key)
    if highest >= 1:
        high = _kth_highest(samples, highest, dtype, all_sum).key
    return _value(low, dtype), _value(high, dtype)


class _Divided(NamedTuple):
    """How many scores lie above a bracket, how many in it, how many of these were taken out; and the latter."""

    counts: Tensor
    inside: Tensor


def _divide(scores: Sequence[Tensor], low: float, high: float, dtype: torch.dtype) -> _Divided:
    room = sum(values.numel() for values in scores) // FEW + CHUNK
    counts, inside, taken = [torch.zeros(2, dtype=dtype)], [torch.zeros(0, dtype=dtype)], 0
    for values in scores:
        above_of, within_of = chunk_buffers(2, values, dtype)
        for _, own in magnitudes(values, dtype):
            above = torch.gt(own, high, out=above_of[: len(own)])
            within = torch.ge(own, low, out=within_of[: len(own)]).sub_(above)
            counts.append(torch.stack([above.sum(), within.sum()]))
            if taken < room:
                inside.append(take(own, within))
                taken += len(inside[-1])
    few = torch.cat([values.to(inside[-1].device) for values in inside])
    sums = gather_rows(counts).long().sum(0)
    return _Divided(torch.cat([sums, torch.count_nonzero(few).cpu()[None]]), few)


def _kth_highest(scores: Sequence[Tensor], keep: int, dtype: torch.dtype, all_sum: AllSum) -> _Found:
    """Return the keep-th highest of all scores by looking at each a few times."""
    prefix, need, ties = 0, keep, 0
    done = 63 if dtype == torch.float64 else 31  # the sign bit is 0
    whole = done
    while done:
        width = min(DIGIT_BITS, done)
        shift = done - width
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for bits in _score_bits(scores, dtype):
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
    return _Found(prefix, need, ties)


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


def _score_bits(scores: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for values in scores:
        for _, own in magnitudes(values, dtype):
            yield own.view(_integer(dtype))


def _tie_positions(parts: Sequence[ScoredPart], key: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for part in parts:
        for at, own in magnitudes(part.scores, dtype):
            ties = (own == _value(key, dtype)).nonzero().squeeze(1)
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


def kept_mass(scores_n: Tensor, mask_n: Tensor) -> Tensor:
    """Return the sum of |scores| over the kept ones; both flat, shape (n,); shape (), float64."""
    dtype = key_dtype([scores_n.dtype])
    (kept_of,), (wide_of,) = chunk_buffers(1, scores_n, dtype), chunk_buffers(1, scores_n, torch.float64)
    parts = [torch.zeros((), dtype=torch.float64, device=scores_n.device)]
    for at, own in magnitudes(scores_n, dtype):
        kept = kept_of[: len(own)].copy_(mask_n[at]).mul_(own)
        parts.append(wide_of[: len(own)].copy_(kept).sum())
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
    total = float(kept_mass(flat, torch.ones_like(kept)))
    return float(kept_mass(flat, kept)) / total if total else 1.0

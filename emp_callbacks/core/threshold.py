"""The lowest kept score of one group, exact and without a sort: by value, and of equal scores by lowest index.

A sample brackets the nu-th highest score; one pass counts the scores above the bracket and takes out the few inside
it; the nu-th is selected among these. Where the bracket missed, or holds too many, it is selected among all. What is
counted are integers, so the answer does not depend on chunk size, order or number of ranks.

A non-negative IEEE float and its bit pattern read as an integer have the same order. The selection therefore counts
the leading bits in histograms, digit by digit (radix select), which add over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits, from_bits
from emp_callbacks.core.chunks import (
    CHUNK,
    FEW,
    chunk_length,
    chunks,
    gather_rows,
    longest_chunk,
    magnitudes,
    scratch,
    take,
)

AllSum = Callable[[Tensor], Tensor]
DIGIT_BITS = 11  # 2048 bins of int64: 16 KiB to communicate per round
SAMPLE = 1 << 18  # scores of a group that bracket its threshold; below four times as many, all are looked at
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

    def count_up_to(self, position: int) -> int:
        """Return how many elements have a group position <= `position`: they come first."""
        if isinstance(self.positions, int):
            return min(max(position - self.positions + 1, 0), self.scores.numel())
        return int(torch.searchsorted(self.positions, position, right=True))

    @property
    def end(self) -> int:
        """One more than the highest group position; 0 if there are no elements."""
        if not self.scores.numel():
            return 0
        return 1 + (
            self.positions + len(self.scores) - 1 if isinstance(self.positions, int) else int(self.positions[-1])
        )


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


def _value(key: int, dtype: torch.dtype) -> float:
    return float(from_bits(torch.tensor(key), dtype))


class _Found(NamedTuple):
    """The lowest kept score, how many scores equal to it are kept, how many there are, and where.

    `ties_of` counts them in each chunk of this rank's tensors, shape (chunks,), int64, on the CPU.
    """

    key: int
    missing: int
    ties: int
    ties_of: Callable[[], Tensor]


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
    found = _in_bracket(scores, keep, dtype, all_sum) or _among_all(scores, keep, dtype, all_sum)
    if found.missing == found.ties:
        return Threshold(found.key, torch.iinfo(torch.int64).max // 2, dtype)
    return Threshold(found.key, _nth_tie(parts, found, dtype, all_sum), dtype)


# ---- in a bracket ---------------------------------------------------------------------------------------------------


def _in_bracket(scores: Sequence[Tensor], keep: int, dtype: torch.dtype, all_sum: AllSum) -> _Found | None:
    """Return the keep-th highest score where a bracket around it holds few; None where it has to be looked for."""
    size = int(all_sum(torch.tensor([sum(values.numel() for values in scores)]))[0])
    if size < 4 * SAMPLE:
        return None
    sample = _join([_sample(values, size / SAMPLE).to(dtype) for values in scores])
    low, high = _bracket(sample, keep / size, dtype, all_sum)
    divided = _divide(scores, low, high, dtype)
    above, within, taken = all_sum(divided.sums).tolist()
    if not above < keep <= above + within:
        return None
    if low == high:
        return _Found(low, keep - above, within, lambda: divided.within)
    if taken < within:
        return None
    inside = _join(divided.taken)
    key, missing, ties = _kth_highest([inside], keep - above, dtype, all_sum)

    def ties_of_chunks() -> Tensor:
        ends = torch.tensor([len(values) for values in divided.taken]).cumsum(0)
        places = (inside == _value(key, dtype)).nonzero().squeeze(1).cpu()
        return torch.bincount(torch.searchsorted(ends, places, right=True), minlength=len(ends))

    return _Found(key, missing, ties, ties_of_chunks)


def _sample(scores_n: Tensor, step: float) -> Tensor:
    """Return one of every `step` scores, each time at another place, so as not to beat with the rows of a matrix."""
    i = torch.arange(int(scores_n.numel() / step), dtype=torch.float64, device=scores_n.device)
    return scores_n.detach()[((i + i * GOLDEN % 1) * step).long()]


def _bracket(sample: Tensor, share: float, dtype: torch.dtype, all_sum: AllSum) -> tuple[int, int]:
    """Return the keys of two scores between which very likely lies the one that `share` of the scores reach."""
    size = int(all_sum(torch.tensor([len(sample)]))[0])
    margin = DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1
    lowest, highest = math.ceil(size * share + margin), math.floor(size * share - margin)
    low, high = 1, _INFINITE[dtype]  # a score of 0 is never kept
    if lowest <= size:
        low = max(low, _kth_highest([sample], lowest, dtype, all_sum)[0])
    if highest >= 1:
        high = _kth_highest([sample], highest, dtype, all_sum)[0]
    return low, high


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([values.to(tensors[0].device) for values in tensors]) if tensors else torch.zeros(0)


class _Divided(NamedTuple):
    """How the scores lie to a bracket, chunk by chunk.

    Attributes:
        sums: Scores above the bracket, in it, and those of the latter that were taken out; shape (3,), int64, CPU.
        within: Scores in the bracket, shape (chunks,), int64, CPU.
        taken: Scores in the bracket of each chunk, flat.
    """

    sums: Tensor
    within: Tensor
    taken: list[Tensor]


def _divide(scores: Sequence[Tensor], low: int, high: int, dtype: torch.dtype) -> _Divided:
    room = sum(values.numel() for values in scores) // FEW + CHUNK if low < high else 0
    least, most, taken = _value(low, dtype), _value(high, dtype), [torch.zeros(0, dtype=dtype)]
    counts = [torch.zeros(2, dtype=dtype)]
    for values in scores:
        length = longest_chunk(values)
        with scratch(length, dtype, values.device) as above_buffer, scratch(length, dtype, values.device) as buffer:
            for _, own in magnitudes(values, dtype):
                above = torch.gt(own, most, out=above_buffer[: len(own)])
                within = torch.ge(own, least, out=buffer[: len(own)]).sub_(above)
                counts.append(torch.stack([above.sum(), within.sum()]))
                taken.append(take(own, within) if room > 0 else own[:0].clone())
                room -= len(taken[-1])
    above_within = gather_rows(counts).long()
    were_taken = gather_rows([torch.count_nonzero(values) for values in taken])
    return _Divided(torch.cat([above_within.sum(0), were_taken.sum()[None]]), above_within[1:, 1], taken[1:])


# ---- among all ------------------------------------------------------------------------------------------------------


def _among_all(scores: Sequence[Tensor], keep: int, dtype: torch.dtype, all_sum: AllSum) -> _Found:
    key, missing, ties = _kth_highest(scores, keep, dtype, all_sum)

    def ties_of_chunks() -> Tensor:
        value = _value(key, dtype)
        own_chunks = (own for values in scores for _, own in magnitudes(values, dtype))
        return gather_rows([torch.eq(own, value, out=own).sum() for own in own_chunks]).long()

    return _Found(key, missing, ties, ties_of_chunks)


def _kth_highest(scores: Sequence[Tensor], keep: int, dtype: torch.dtype, all_sum: AllSum) -> tuple[int, int, int]:
    """Return the key of the keep-th highest of some scores, how many equal ones to keep, and how many there are."""
    prefix, need, ties = 0, keep, 0
    done = 63 if dtype == torch.float64 else 31  # the sign bit is 0
    whole = done
    while done:
        width = min(DIGIT_BITS, done)
        shift = done - width
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for values in scores:
            for bits in _bits(values, dtype):
                candidates = bits[(bits >> done) == prefix] if done < whole else bits
                counts += torch.bincount((candidates >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
        counts = all_sum(counts)
        at_least = counts.flip(0).cumsum(0).flip(0)  # scores whose digit is >= the bin's
        digit = int((at_least >= need).sum()) - 1
        ties = int(counts[digit])
        need -= int(at_least[digit]) - ties
        prefix = (prefix << width) | digit
        done = shift
    return prefix, need, ties


def _bits(scores_n: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the bit patterns of the magnitudes, in small pieces: a histogram takes several times their memory."""
    for _, own in magnitudes(scores_n, dtype):
        yield from torch.split(as_bits(own), max(1, chunk_length(scores_n.device) // 8))


# ---- among equal scores ---------------------------------------------------------------------------------------------


def _nth_tie(parts: Sequence[ScoredPart], found: _Found, dtype: torch.dtype, all_sum: AllSum) -> int:
    """Return the group position of the last kept score of those equal to the lowest: so many come before it."""
    counts = torch.split(found.ties_of(), [len(list(chunks(part.scores))) for part in parts])
    upto = [torch.cat([torch.zeros(1, dtype=torch.int64), own.cumsum(0)]) for own in counts]
    last = 0
    for bit in reversed(range(longest_in_bits(max((part.end for part in parts), default=0), all_sum))):
        candidate = last | (1 << bit)
        before = sum(_ties_before(candidate, *each, _value(found.key, dtype)) for each in zip(parts, upto, strict=True))
        if int(all_sum(torch.tensor([before]))[0]) < found.missing:
            last = candidate
    return last


def _ties_before(position: int, part: ScoredPart, upto: Tensor, value: float) -> int:
    """Return how many scores of a part equal `value` and lie before a group position; `upto` is by whole chunks."""
    count, length = part.count_up_to(position - 1), chunk_length(part.scores.device)
    whole = count // length
    before = int(upto[whole])
    if count == whole * length or int(upto[whole + 1]) == before:
        return before
    return before + int((part.scores[whole * length : count].detach().abs() == value).sum())


def longest_in_bits(number: int, all_sum: AllSum) -> int:
    """Return the length in bits of the highest `number` of any rank, found by summing one-hot lengths."""
    lengths = torch.zeros(64, dtype=torch.int64)
    lengths[number.bit_length()] = 1
    return int(all_sum(lengths).nonzero().max())

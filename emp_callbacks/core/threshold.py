"""The lowest kept score of groups, exact and without a sort: by value, and of equal scores by lowest index.

A sample brackets the nu-th highest score; one pass counts the scores above the bracket and takes out the few inside
it; the nu-th is selected among these. Where the bracket missed, or holds too many, it is selected among all. What is
counted are integers, so the answer does not depend on chunk size, order or number of ranks.

A non-negative IEEE float and its bit pattern read as an integer have the same order. The selection therefore counts
the leading bits in histograms, digit by digit (radix select), which add over ranks. All groups are searched together:
the number of sums over ranks does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits
from emp_callbacks.core.chunks import (
    CHUNK,
    FEW,
    chunk_length,
    chunks,
    gather_rows,
    in_fewer,
    join,
    longest_chunk,
    magnitudes,
    scratch,
    take,
)

AllSum = Callable[[Tensor], Tensor]
DIGIT_BITS = 11  # 2048 bins of int64: 16 KiB to communicate per round
NARROW_DIGIT_BITS = 8  # of each of many groups 2 KiB
MANY_GROUPS = 8
ALL_TIES = torch.iinfo(torch.int64).max // 2
SAMPLE = 1 << 18  # scores of a group that bracket its threshold
TIE_BITS = 5  # of a place among equal scores, that one sum over ranks settles
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, spread most evenly
DEVIATIONS = 4.0  # of the sample's rank to each side of the threshold: a random order misses once in 10,000 times
_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # bit patterns


def is_large(size: int) -> bool:
    """Return whether a group of so many scores is looked at in a bracket; of smaller ones it is all of them."""
    return size >= 4 * SAMPLE


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
    wide = dtype == torch.float64
    return float(np.array(key, np.int64 if wide else np.int32).view(np.float64 if wide else np.float32))


class Group(NamedTuple):
    """Scores that compete.

    Attributes:
        parts: What this rank counts of them; over all ranks the parts cover the group once. May be empty.
        size: Number of scores of the group, over all ranks.
        keep: How many are kept: between 1 and the number of scores that are not 0.
    """

    parts: Sequence[ScoredPart]
    size: int
    keep: int

    @property
    def scores(self) -> list[Tensor]:
        """The scores of the parts, each flat."""
        return [part.scores for part in self.parts]


def find_threshold(parts: Sequence[ScoredPart], keep: int, dtype: torch.dtype) -> Threshold:
    """Return the threshold that keeps exactly `keep` scores of one group, all of which is here; see `Group`."""
    return find_thresholds([Group(parts, sum(part.scores.numel() for part in parts), keep)], dtype)[0]


def find_thresholds(groups: Sequence[Group], dtype: torch.dtype, all_sum: AllSum = local_sum) -> list[Threshold]:
    """Return the threshold that keeps exactly `keep` scores of each group. Collective through `all_sum`.

    Args:
        groups: The same on every rank but for the parts.
        dtype: The same on every rank, see `key_dtype`.
        all_sum: Returns the sum of an int64 tensor over all ranks.
    """
    if not groups:
        return []
    inside = [group.scores if is_large(group.size) else in_fewer(group.scores) for group in groups]
    need = torch.tensor([group.keep for group in groups])
    known: dict[int, _Divided] = {}
    for g, divided in _around_samples(groups, dtype, all_sum).items():
        above, within, taken = divided.sums.tolist()
        is_single = divided.low == divided.high
        if above < groups[g].keep <= above + within and (is_single or taken == within):
            known[g] = divided
            inside[g] = [] if is_single else [divided.taken]
            need[g] -= above
    keys, missing, ties = _kth_highest(inside, need, dtype, all_sum)
    for g, divided in known.items():
        if divided.low == divided.high:
            keys[g], missing[g], ties[g] = divided.low, need[g], divided.sums[1]
    cut = (missing < ties).nonzero().flatten().tolist()
    values = {g: _value(int(keys[g]), dtype) for g in cut}
    counts = {g: _ties_of_chunks(groups[g], values[g], known.get(g), dtype) for g in cut}
    tied = [_Tied(groups[g], values[g], int(missing[g]), counts[g]) for g in cut]
    last_tie = dict(zip(cut, _last_ties(tied, all_sum), strict=True))
    return [Threshold(key, last_tie.get(g, ALL_TIES), dtype) for g, key in enumerate(keys.tolist())]


class _Divided(NamedTuple):
    """How a group's scores lie to a bracket.

    Attributes:
        low: Key of the bracket's lower end.
        high: Key of its upper end.
        sums: Scores above it, in it, and those of the latter that were taken out; over all ranks, int64.
        within: Scores in it of each of this rank's chunks, int64, on the CPU.
        taken: Those, chunk after chunk.
        ends: How many of them there are up to the end of each chunk, int64, on the CPU.
    """

    low: int
    high: int
    sums: Tensor
    within: Tensor
    taken: Tensor
    ends: Tensor


def _around_samples(groups: Sequence[Group], dtype: torch.dtype, all_sum: AllSum) -> dict[int, _Divided]:
    """Return how the scores of each large group lie to a bracket that very likely holds the threshold. Collective."""
    large = [g for g, group in enumerate(groups) if is_large(group.size)]
    if not large:
        return {}
    samples = [join([_sample(values, groups[g].size / SAMPLE).to(dtype) for values in groups[g].scores]) for g in large]
    brackets = _brackets(samples, [groups[g].keep / groups[g].size for g in large], dtype, all_sum)
    divided = [_divide(groups[g].scores, *ends, dtype) for g, ends in zip(large, brackets, strict=True)]
    sums = all_sum(torch.stack([one.sums for one in divided]))
    return {g: one._replace(sums=total) for g, one, total in zip(large, divided, sums, strict=True)}


def _sample(scores_n: Tensor, step: float) -> Tensor:
    """Return one of every `step` scores, each time at another place, so as not to beat with the rows of a matrix."""
    i = torch.arange(int(scores_n.numel() / step), dtype=torch.float64, device=scores_n.device)
    return scores_n.detach()[((i + i * GOLDEN % 1) * step).long()]


def _brackets(
    samples: Sequence[Tensor], shares: Sequence[float], dtype: torch.dtype, all_sum: AllSum
) -> list[tuple[int, int]]:
    """Return the keys of two scores of each sample between which very likely lies what a share of all scores reach."""
    sizes = all_sum(torch.tensor([len(sample) for sample in samples])).tolist()
    ranks = []
    for size, share in zip(sizes, shares, strict=True):
        margin = DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1
        ranks += [math.ceil(size * share + margin), math.floor(size * share - margin)]
    inside = torch.tensor([min(max(rank, 1), max(1, sizes[i // 2])) for i, rank in enumerate(ranks)])
    keys = _kth_highest([[sample] for sample in samples], inside, dtype, all_sum)[0].tolist()
    ends = []
    for i, size in enumerate(sizes):
        low = max(1, keys[2 * i]) if ranks[2 * i] <= size else 1  # a score of 0 is never kept
        ends.append((low, keys[2 * i + 1] if ranks[2 * i + 1] >= 1 else _INFINITE[dtype]))
    return ends


def _divide(scores: Sequence[Tensor], low: int, high: int, dtype: torch.dtype) -> _Divided:
    """Return how this rank's scores lie to a bracket."""
    room = sum(values.numel() for values in scores) // FEW + CHUNK if low < high else 0
    least, most, counts = _value(low, dtype), _value(high, dtype), [torch.zeros(2, dtype=dtype)]
    taken: list[Tensor] = []
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
    ends = torch.tensor([len(values) for values in taken], dtype=torch.int64).cumsum(0)
    inside = join(taken)
    sums = torch.cat([above_within.sum(0), torch.count_nonzero(inside)[None].cpu()])
    return _Divided(low, high, sums, above_within[1:, 1], inside, ends)


# ---- by digits ------------------------------------------------------------------------------------------------------


def _kth_highest(
    scores: Sequence[Sequence[Tensor]], keep_t: Tensor, dtype: torch.dtype, all_sum: AllSum
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys of the keep-th highest of groups, how many equal ones to keep, and how many there are.

    `keep_t` has the same number of targets for each group, one group after the other; so has what is returned.
    """
    need, prefix = keep_t.numpy().copy(), np.zeros(len(keep_t), dtype=np.int64)
    targets, ties = np.arange(len(need)), np.zeros_like(prefix)
    group_of = targets * len(scores) // len(need)
    done = 63 if dtype == torch.float64 else 31  # the sign bit is 0
    most = NARROW_DIGIT_BITS if all_sum is not local_sum and len(need) > MANY_GROUPS else DIGIT_BITS
    while done:
        width = min(most, done)
        looks = list(zip(group_of.tolist(), prefix.tolist(), strict=True))
        # Targets of one group that have the same leading bits so far share a look.
        found = {(g, start): count_digits(scores[g], start, done, width, dtype) for g, start in dict.fromkeys(looks)}
        # In numpy, on one thread: waiting for another one takes longer than all of this.
        counts = all_sum(torch.from_numpy(np.stack([found[look].numpy() for look in looks]))).numpy()
        at_least = counts[:, ::-1].cumsum(1)[:, ::-1]  # scores whose digit is >= the bin's
        digit = ((at_least >= need[:, None]).sum(1) - 1).clip(min=0)
        ties = counts[targets, digit]
        need -= at_least[targets, digit] - ties
        prefix = (prefix << width) | digit
        done -= width
    return torch.from_numpy(prefix), torch.from_numpy(need), torch.from_numpy(ties)


def count_digits(scores: Sequence[Tensor], prefix: int, done: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return how often each digit of some bits follows a prefix, shape (2^width,), int64, on the CPU."""
    whole, shift = 63 if dtype == torch.float64 else 31, done - width
    counts = torch.zeros(1 << width, dtype=torch.int64)
    for values in scores:
        for bits in _bits(values, dtype):
            candidates = bits[(bits >> done) == prefix] if done < whole else bits
            counts += torch.bincount((candidates >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
    return counts


def _bits(scores_n: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the bit patterns of the magnitudes, in small pieces: a histogram takes several times their memory."""
    for _, own in magnitudes(scores_n, dtype):
        yield from torch.split(as_bits(own), max(1, chunk_length(scores_n.device) // 8))


# ---- among equal scores ---------------------------------------------------------------------------------------------


class _Tied(NamedTuple):
    """A group of whose scores equal to `value` only `missing` are kept; `counts` has them by this rank's chunks."""

    group: Group
    value: float
    missing: int
    counts: Tensor


def _ties_of_chunks(group: Group, value: float, divided: _Divided | None, dtype: torch.dtype) -> Tensor:
    """Return how many scores equal to a value lie in each of this rank's chunks, shape (chunks,), int64, on the CPU."""
    if divided is not None and divided.low == divided.high:
        return divided.within
    if divided is not None:
        places = (divided.taken == value).nonzero().squeeze(1).cpu()
        return torch.bincount(torch.searchsorted(divided.ends, places, right=True), minlength=len(divided.ends))
    own_chunks = (own for values in group.scores for _, own in magnitudes(values, dtype))
    return gather_rows([torch.eq(own, value, out=own).sum() for own in own_chunks]).long()


def _last_ties(tied: Sequence[_Tied], all_sum: AllSum) -> list[int]:
    """Return the group position of the last kept of the equal scores: fewer than are kept lie before it. Collective."""
    if not tied:
        return []
    upto = [_upto(one) for one in tied]
    last = torch.zeros(len(tied), dtype=torch.int64)
    missing = torch.tensor([one.missing for one in tied])
    width = 1 if all_sum is local_sum else TIE_BITS  # alone, each bit is one look
    bits = max((one.group.size - 1).bit_length() for one in tied)
    for shift in reversed(range(0, bits, width)):
        candidates = last[:, None] + (torch.arange(1, 1 << width) << shift)
        before = [
            [sum(map(partial(_ties_before, position, value=one.value), one.group.parts, of_parts)) for position in row]
            for row, one, of_parts in zip(candidates.tolist(), tied, upto, strict=True)
        ]
        last += (all_sum(torch.tensor(before)) < missing[:, None]).sum(1) << shift
    return last.tolist()


def _upto(one: _Tied) -> list[Tensor]:
    """Return, for each part, how many ties lie in its first chunks, shape (chunks + 1,)."""
    counts = torch.split(one.counts, [len(list(chunks(part.scores))) for part in one.group.parts])
    return [torch.cat([torch.zeros(1, dtype=torch.int64), own.cumsum(0)]) for own in counts]


def _ties_before(position: int, part: ScoredPart, upto: Tensor, value: float) -> int:
    """Return how many scores of a part equal `value` and lie before a group position; `upto` is by whole chunks."""
    count, length = part.count_up_to(position - 1), chunk_length(part.scores.device)
    whole = count // length
    before = int(upto[whole])
    if count == whole * length or int(upto[whole + 1]) == before:
        return before
    return before + int((part.scores[whole * length : count].detach().abs() == value).sum())

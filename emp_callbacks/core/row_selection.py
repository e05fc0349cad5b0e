"""The highest scores of every row of a matrix, each row its own group, without a Python loop over rows.

Few rows that lie whole on one device are sorted. Of many, or spread over ranks, the lowest kept score is searched for:
counts of the scores that reach a probe narrow a bracket, for all rows at once, until it parts exactly the wanted
number from the rest. What is counted are integers, so the answer does not depend on where the scores lie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length, scratch
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype, score_moments
from emp_callbacks.core.threshold import AllSum, local_sum

FEW = 1 << 17  # scores that are sorted rather than searched
BLOCK = 1 << 22  # scores that are searched at a time: 16 MiB of float32
FEW_INSIDE = 256  # brackets that hold one in so many of the scores are sorted
INTERPOLATIONS = 10  # probes after which every second one halves the bracket, which ends for any scores
# Of normal scores EMP keeps those above 0.6 times their mean, and there a threshold higher by its own size would keep
# a third of all scores less. For others this is only a first guess.
GUESS, SLOPE = 0.6, 0.35
ALL_TIES = FILLED = torch.iinfo(torch.int64).max
INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class RowPart(NamedTuple):
    """Scores of some rows, or of pieces of them.

    Attributes:
        scores: Shape (A, R, B), floating, either sign: of each of R rows, A pieces of B scores.
        rows: Index of each row, shape (R,), int64, ascending, on the CPU.
        columns: Place of each score in its row, int64, broadcastable to the scores; FILLED where a row was filled up
            with a 0 to the length of others: then of the scores' shape.
    """

    scores: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many scores of each row it holds, shape (R,), int64, on the CPU."""
        if self.columns.shape != self.scores.shape:
            return torch.full_like(self.rows, self.scores.shape[0] * self.scores.shape[2])
        return (self.columns < FILLED).sum((0, 2)).cpu()


def whole_rows(scores_gn: Tensor) -> RowPart:
    """Return all rows of a matrix as one part."""
    columns = torch.arange(scores_gn.shape[1], device=scores_gn.device)
    return RowPart(scores_gn.detach()[None], torch.arange(len(scores_gn)), columns[None, None])


@dataclass(frozen=True)
class RowThresholds:
    """The rule "keep above `value`, and of the scores equal to it the columns up to `last_tie`", for each row.

    Attributes:
        value: Shape (G,), in the scores' dtype: at most the lowest kept score, above all that are not kept. -inf
            keeps the whole row, also NaN; +inf stands where the row lies on other ranks.
        above: Shape (G,), more than the lowest kept score.
        last_tie: Shape (G,), int64.
    """

    value: Tensor
    above: Tensor
    last_tie: Tensor

    def mask(self, part: RowPart) -> Tensor:
        """Return the mask of a part of the rows, shape (A, R, B), bool, True = kept."""
        device = part.scores.device
        value, last_tie = (each[part.rows.to(each.device)].to(device) for each in (self.value, self.last_tie))
        kept = torch.empty(part.scores.shape, dtype=torch.bool, device=part.scores.device)
        for at, magnitude in _magnitudes(part.scores):
            # Not below: that keeps NaN where all is kept.
            below = torch.lt(magnitude, value[at[1], None], out=magnitude)
            kept[at].copy_(below).logical_not_()
        if kept.device.type != "cpu" or bool((last_tie < ALL_TIES).any()):  # an accelerator is not waited for
            for at, magnitude in _magnitudes(part.scores):
                surplus = part.columns.expand(kept.shape)[at] > last_tie[at[1], None]
                kept[at] &= ~(surplus.logical_and_(magnitude == value[at[1], None]))
        return kept

    def lowest_kept(self, part: RowPart) -> float:
        """Return the lowest kept score of a part of the rows; inf if it has none."""
        if not len(part.rows):
            return math.inf
        value, above = self.value[part.rows], self.above[part.rows]
        # Looked for only where it can be: most rows keep nothing as low as what some row keeps for certain.
        near = (value < above.min()).nonzero().squeeze(1)
        magnitude = part.scores[:, near.to(part.scores.device)].abs()
        kept = magnitude[magnitude >= value[near].to(magnitude.device)[:, None]]
        return float(kept.min()) if len(kept) else math.inf


def row_sums(parts: Sequence[RowPart], rows: int) -> Tensor:
    """Return the moments of each row over some parts of them, stacked, shape (rows, 3), float64, on the CPU."""
    sums = torch.zeros(rows, 3, dtype=torch.float64)
    for part in parts:
        own = torch.zeros(len(part.rows), 3, dtype=torch.float64, device=part.scores.device)
        wide_pieces = _pieces(part.scores, torch.float64)
        for (at, magnitude), (_, wide) in zip(_magnitudes(part.scores), wide_pieces, strict=True):
            own[at[1], 0] += wide.copy_(magnitude).sum((0, 2))
            own[at[1], 1] += wide.square_().sum((0, 2))
            own[at[1], 2] += torch.gt(magnitude, 0, out=magnitude).sum((0, 2))
        sums.index_add_(0, part.rows, own.cpu())
    return sums


def top_rows(scores_gn: Tensor, keep_g: Tensor, moments: ScoreMoments | None = None) -> Tensor:
    """Return the mask of the keep_g[g] highest scores of each row, ties by lowest index.

    Args:
        scores_gn: Shape (G, N), any floating dtype, either sign. A row with NaN or Inf must be kept whole.
        keep_g: Shape (G,), int64, each in [0, N].
        moments: Of each row, where they are known already.

    Returns:
        Shape (G, N), bool, True = kept.
    """
    rows = whole_rows(scores_gn)
    if scores_gn.device.type != "cpu" or scores_gn.numel() <= FEW:
        thresholds = _sort_rows(scores_gn.detach(), keep_g.to(scores_gn.device))
    else:
        known = moments or score_moments(scores_gn)
        thresholds = find_rows([rows], [rows], keep_g, known, scores_gn.shape[1], scores_gn.dtype)
    return thresholds.mask(rows)[0]


def _sort_rows(scores_gn: Tensor, keep_g: Tensor) -> RowThresholds:
    size, found = scores_gn.shape[1], []
    rows = max(1, chunk_length(scores_gn.device) // max(1, size))
    for scores, keep in zip(torch.split(scores_gn, rows), torch.split(keep_g[:, None], rows), strict=True):
        ordered = scores.abs().sort(dim=1, descending=True, stable=True)
        last = (keep - 1).clamp(min=0)
        value, column = ordered.values.gather(1, last), ordered.indices.gather(1, last)
        following = ordered.values.gather(1, keep.clamp(max=size - 1))
        last_tie = torch.where(following == value, column, ALL_TIES)
        found.append((_extremes(value, keep, size), value, last_tie.masked_fill(keep == size, ALL_TIES)))
    return RowThresholds(*(torch.cat(values).squeeze(1) for values in zip(*found, strict=True)))


def _extremes(value: Tensor, keep: Tensor, size: int) -> Tensor:
    return value.masked_fill(keep == 0, torch.inf).masked_fill(keep == size, -torch.inf)


def find_rows(
    held: Sequence[RowPart],
    counted: Sequence[RowPart],
    keep_g: Tensor,
    moments: ScoreMoments,
    size: int,
    dtype: torch.dtype,
    all_sum: AllSum = local_sum,
) -> RowThresholds:
    """Return the thresholds that keep exactly the keep_g[g] highest scores of each row. Collective through `all_sum`.

    Args:
        held: What lies on this rank of the rows; at least one part, which may be empty.
        counted: What this rank counts of them: over all ranks these cover the rows once.
        keep_g: Shape (G,), int64, each in [0, size], on the CPU.
        moments: Of each row, shape (G,), on the CPU.
        size: Scores in a row.
        dtype: Of the scores; the same on every rank.
        all_sum: Returns the sum of a tensor over all ranks.
    """
    whole, cut = _whole_and_cut(held, len(keep_g), size, all_sum)
    value, last_tie = torch.full(keep_g.shape, torch.inf, dtype=dtype), torch.full_like(keep_g, ALL_TIES)
    above, sums = value.clone(), moments.stack()
    for rows, parts, add in ((whole, held, local_sum), (cut, counted, all_sum)):
        for block in torch.split(rows, max(1, BLOCK // max(1, size))) if len(rows) else ():
            brackets = _Brackets(keep_g[block], ScoreMoments.unstack(sums[block]), size, dtype)
            last_tie[block] = _search(brackets, [_Searched(part, block) for part in parts], add)
            value[block], above[block] = brackets.low, brackets.high
    everything = keep_g == size
    return RowThresholds(_extremes(value, keep_g, size), above.masked_fill(everything, torch.inf), last_tie)


def _whole_and_cut(held: Sequence[RowPart], rows: int, size: int, all_sum: AllSum) -> tuple[Tensor, Tensor]:
    """Return the rows that lie whole on this rank, and those of which any rank holds a piece only. Collective."""
    count = torch.zeros(rows, dtype=torch.int64)
    for part in held:
        count.index_add_(0, part.rows, part.lengths)
    cut = all_sum(((count > 0) & (count < size)).long()) > 0
    return ((count == size) & ~cut).nonzero().squeeze(1), cut.nonzero().squeeze(1)


def _search(brackets: _Brackets, searched: Sequence[_Searched], all_sum: AllSum) -> Tensor:
    """Narrow the brackets of some rows to the lowest kept score and return the last tie of each. Collective."""
    rows = len(brackets.low)
    for i in itertools.count():
        is_open = brackets.is_open
        if not bool(is_open.any()):
            break
        if all_sum is local_sum and brackets.hold_few:
            return _pick(brackets, searched)
        unsettled = brackets.unsettled
        if int(unsettled.sum()) < 0.75 * max(len(part.rows) for part in searched):
            for part in searched:
                part.keep_only(unsettled)
        probe = brackets.probe(i)
        brackets.narrow(probe, all_sum(_sum(rows, [part.count_reaching(probe) for part in searched])))
    return _last_ties(brackets, searched, all_sum)


def _pick(brackets: _Brackets, searched: Sequence[_Searched]) -> Tensor:
    """Sort the few scores in the brackets that are not settled: the lowest kept one of each, and its last tie."""
    chosen = brackets.unsettled
    nowhere = torch.full_like(brackets.low, torch.inf)
    low, high = torch.where(chosen, brackets.low, nowhere), torch.where(chosen, brackets.high, nowhere)
    row, column, score = (
        torch.cat(found) for found in zip(*(part.between(low, high) for part in searched), strict=True)
    )
    order = score.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    row, column, score = row[order], column[order], score[order]
    end = torch.bincount(row, minlength=len(chosen)).cumsum(0)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), end[:-1]])
    at = (first + brackets.need.long() - 1)[chosen]
    following = (at + 1).clamp(max=len(row) - 1)
    is_tied = (at + 1 < end[chosen]) & (score[following] == score[at])
    brackets.settle(chosen, score[at])
    last_tie = torch.full_like(end, ALL_TIES)
    last_tie[chosen] = torch.where(is_tied, column[at], ALL_TIES)
    return last_tie


def _last_ties(brackets: _Brackets, searched: Sequence[_Searched], all_sum: AllSum) -> Tensor:
    """Return the column of the last kept score equal to the lowest: fewer than needed lie before it. Collective."""
    tied = brackets.unsettled
    last_tie = torch.full(tied.shape, ALL_TIES)
    if not bool(tied.any()):
        return last_tie
    ties = [part.equal_to(brackets.low.masked_fill(~tied, torch.nan)) for part in searched]
    row, column = (torch.cat(places) for places in zip(*ties, strict=True))
    found = torch.zeros_like(last_tie)
    for bit in reversed(range(brackets.size.bit_length())):
        candidate = found | (1 << bit)
        before = all_sum(torch.bincount(row[column < candidate[row]], minlength=len(tied)))
        found = torch.where(before < brackets.need, candidate, found)
    return torch.where(tied, found, last_tie)


class _Brackets:
    """Two values for each of some rows, between which the lowest kept score lies.

    Attributes:
        low: Shape (rows,), reached by at least as many scores as wanted.
        high: Shape (rows,), reached by fewer; at first above the l2 norm, which no score exceeds.
        reach_low: How many reach `low`, float64.
        reach_high: How many reach `high`, float64.
    """

    def __init__(self, keep: Tensor, moments: ScoreMoments, size: int, dtype: torch.dtype) -> None:
        self._keep, self.size = keep.double(), size
        self._all_or_none = (keep == 0) | (keep == size)
        self._last = GUESS * moments.total / size
        self._surplus = torch.zeros_like(self._keep)
        self.low = torch.zeros(len(keep), dtype=dtype)
        self.high = _value(_bits((1.01 * moments.total_sq.sqrt()).to(dtype)) + 1, dtype)
        self.reach_low, self.reach_high = torch.full_like(self._keep, size), torch.zeros_like(self._keep)

    @property
    def unsettled(self) -> Tensor:
        """Whether more scores than wanted reach `low`, shape (rows,), bool: in a closed bracket they are equal."""
        return (self.reach_low != self._keep) & ~self._all_or_none

    @property
    def is_open(self) -> Tensor:
        """Whether there are values between `low` and `high` that could settle it, shape (rows,), bool."""
        return self.unsettled & (_bits(self.high) - _bits(self.low) > 1)

    @property
    def need(self) -> Tensor:
        """How many of the scores in the bracket are kept."""
        return self._keep - self.reach_high

    @property
    def hold_few(self) -> bool:
        """Whether the scores in all unsettled brackets are few enough to be taken out and sorted."""
        inside = (self.reach_low - self.reach_high)[self.unsettled].sum()
        return bool(inside * FEW_INSIDE <= self.size * len(self.low))

    def settle(self, rows: Tensor, lowest: Tensor) -> None:
        """Close the brackets of some rows at their lowest kept score."""
        self.low[rows] = lowest.to(self.low.dtype)
        self.high[rows] = _value(_bits(self.low[rows]) + 1, self.low.dtype)

    def probe(self, i: int) -> Tensor:
        """Return the i-th value to try in each row, between `low` and `high`."""
        low, high = _bits(self.low), _bits(self.high)
        if i > INTERPOLATIONS and i % 2:
            return _value(low + (high - low) // 2, self.low.dtype)
        if i == 1:  # across to the other side, as far as normal scores ask for and chance may add
            step = 1.3 * self._surplus / self.size / SLOPE + 0.5 * self._surplus.sign() / math.sqrt(self.size)
            self._last = self._last * (1 + step).clamp(min=0.1)
        elif i > 1:
            self._last = self._between()
        return _value(_bits(self._last.to(self.low.dtype)).clamp(min=low + 1, max=high - 1), self.low.dtype)

    def _between(self) -> Tensor:
        """Return where the lowest kept score is expected, and a little beyond as seen from the nearer end.

        So the farther end comes close, too.
        """
        above, below = self.reach_low - self._keep, self._keep - self.reach_high
        inside = above + below
        aim = above + torch.where(above > below, -0.7, 0.7) * inside.sqrt() * (inside > 8)
        return self.low + (self.high.double() - self.low) * (aim / inside).clamp(0.02, 0.98)

    def narrow(self, probe: Tensor, reached: Tensor) -> None:
        """Move an end of each open bracket to the probe, which `reached` scores reach."""
        raised, lowered = self.is_open & (reached >= self._keep), self.is_open & (reached < self._keep)
        self._surplus = reached - self._keep
        self.low, self.reach_low = torch.where(raised, probe, self.low), torch.where(raised, reached, self.reach_low)
        self.high = torch.where(lowered, probe, self.high)
        self.reach_high = torch.where(lowered, reached, self.reach_high)


def _bits(value: Tensor) -> Tensor:
    return value.view(INTEGERS[value.dtype]).long()


def _value(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(INTEGERS[dtype]).view(dtype)


def _between(low: Tensor, high: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Return where to look next in brackets that hold `above` scores too many for `low`, `below` too few for `high`.

    A little beyond where the wanted one is expected, seen from the nearer end: so that the farther end comes close.
    """
    inside = above + below
    aim = above + torch.where(above > below, -0.7, 0.7) * inside.sqrt() * (inside > 8)
    share = (aim / inside).clamp(0.02, 0.98)
    return low.double() + (high.double() - low.double()) * share


def _sum(size: int, counts: Sequence[Tensor]) -> Tensor:
    return sum(counts, torch.zeros(size, dtype=torch.float64))


class _Searched:
    """Magnitudes of those of some rows that a part holds; rows drop out when they are found."""

    def __init__(self, part: RowPart, rows: Tensor) -> None:
        place = torch.searchsorted(rows, part.rows).clamp(max=len(rows) - 1)
        held = (rows[place] == part.rows).nonzero().squeeze(1)
        self.rows = place[held]
        at = _run(held, part.scores.device)
        scores = part.scores[:, at]
        self.columns = part.columns if part.columns.shape[1] == 1 else part.columns[:, at]
        self.magnitude = torch.empty(scores.shape, dtype=key_dtype([scores.dtype]), device=scores.device)
        self.magnitude.copy_(scores).abs_()

    def count_reaching(self, value: Tensor) -> Tensor:
        """Return how many scores of each row are >= value, shape (rows,), float64, on the CPU."""
        own_value = value[self.rows].to(self.magnitude)
        counts = torch.zeros(len(own_value), dtype=torch.float64, device=own_value.device)
        for at, out in _pieces(self.magnitude):
            # Compared into floats, which is three times as fast as into bool; exact up to 2^24 of them.
            counts[at[1]] += torch.ge(self.magnitude[at], own_value[at[1], None], out=out).sum((0, 2))
        return torch.zeros(len(value), dtype=torch.float64).index_add_(0, self.rows, counts.cpu())

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, column and value of each score with low <= score < high of its row, on the CPU, by position."""
        own_low, own_high = (each[self.rows].to(self.magnitude) for each in (low, high))
        rows, columns = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        scores = [torch.zeros(0, dtype=self.magnitude.dtype)]
        for (at, inside), (_, beyond) in zip(_pieces(self.magnitude), _pieces(self.magnitude), strict=True):
            magnitude = self.magnitude[at]
            torch.ge(magnitude, own_low[at[1], None], out=inside)
            inside -= torch.ge(magnitude, own_high[at[1], None], out=beyond)
            places = torch.unravel_index(_places(inside), inside.shape)
            rows.append(self.rows[places[1].cpu() + at[1].start])
            columns.append(self._columns[places[0] + at[0].start, places[1] + at[1].start, places[2]].cpu())
            scores.append(magnitude[places].cpu())
        return torch.cat(rows), torch.cat(columns), torch.cat(scores)

    def equal_to(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of each score that equals the value of its row, int64, on the CPU."""
        at = (self.magnitude == value[self.rows].to(self.magnitude)[:, None]).nonzero(as_tuple=True)
        return self.rows[at[1].cpu()], self._columns[at].cpu()

    @property
    def _columns(self) -> Tensor:
        return self.columns.expand(self.magnitude.shape)

    def keep_only(self, chosen: Tensor) -> None:
        """Drop the rows that are not chosen."""
        at = chosen[self.rows].nonzero().squeeze(1)
        self.rows = self.rows[at]
        at = at.to(self.magnitude.device)
        self.magnitude = self.magnitude[:, at]
        self.columns = self.columns if self.columns.shape[1] == 1 else self.columns[:, at]


def _places(flags: Tensor) -> Tensor:
    """Return the flat places of the flags that are not 0, on their device."""
    if flags.device.type == "cpu":  # numpy is twice as fast
        return torch.from_numpy(np.flatnonzero(flags.bool().numpy()))
    return flags.reshape(-1).nonzero().squeeze(1)


def _run(indices: Tensor, device: torch.device) -> slice | Tensor:
    """Return ascending indices as a slice if they follow each other: what it takes is then no copy."""
    if not len(indices) or int(indices[-1]) - int(indices[0]) + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)
    return indices.to(device)


def _pieces(scores: Tensor, dtype: torch.dtype | None = None) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield slices of the first two dimensions that cover (A, R, B) in chunks, and memory for each that is reused."""
    if not scores.numel():
        return
    pieces, rows, width = scores.shape
    length = chunk_length(scores.device)
    row_step = max(1, min(rows, length // width))
    piece_step = max(1, min(pieces, length // (row_step * width)))
    length = row_step * piece_step * width
    with scratch(length, dtype or key_dtype([scores.dtype]), scores.device) as buffer:
        for piece, row in itertools.product(range(0, pieces, piece_step), range(0, rows, row_step)):
            at = slice(piece, min(piece + piece_step, pieces)), slice(row, min(row + row_step, rows))
            shape = at[0].stop - piece, at[1].stop - row, width
            yield at, buffer[: math.prod(shape)].view(shape)


def _magnitudes(scores: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield slices of the first two dimensions that cover the scores in chunks, and the magnitudes of each."""
    for at, out in _pieces(scores):
        yield at, out.copy_(scores[at]).abs_()

"""The lowest kept score of many rows at once: counts narrow a bracket around each, until what is inside is sorted.

Rows that are cut between ranks are searched in `cut_rows`, with the same brackets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits, from_bits
from emp_callbacks.core.device import on_host
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype
from emp_callbacks.core.row_parts import RowPart, pieces_of
from emp_callbacks.core.threshold import AllSum, local_sum

FEW_INSIDE = 256  # brackets that hold one in so many of the scores are sorted
TIE_DIGIT = 3  # bits of a column that one sum settles, by eight counts for each row
INTERPOLATIONS = 10  # probes after which every second one halves the bracket, which ends for any scores
# Of normal scores EMP keeps those above 0.6 times their mean, and there a threshold higher by its own size would keep
# a third of all scores less. For others this is only a first guess.
GUESS, SLOPE = 0.6, 0.35
ALL_TIES = torch.iinfo(torch.int64).max


def search_rows(brackets: Brackets, searched: Sequence[SearchedRows]) -> Tensor:
    """Narrow the brackets of some rows to the lowest kept score and return the last tie of each."""
    rows = len(brackets.low)
    for i in itertools.count():
        is_open = brackets.is_open
        if not bool(is_open.any()):
            break
        if brackets.hold_few:
            return _pick(brackets, searched)
        unsettled = brackets.unsettled
        if int(unsettled.sum()) < 0.75 * max(len(part.rows) for part in searched):
            for part in searched:
                part.keep_only(unsettled)
        probe = brackets.probe(i)
        brackets.narrow(probe, _sum(rows, [part.count_reaching(probe) for part in searched]))
    tied = brackets.unsettled
    found = [part.equal_to(brackets.low.masked_fill(~tied, torch.nan)) for part in searched]
    row, column = (torch.cat(places) for places in zip(*found, strict=True))
    ties = Ties((tied.cumsum(0) - 1)[row], column, brackets.need[tied].long(), brackets.size)
    return brackets.of_every_row(last_ties([ties], local_sum)[0])


def _pick(brackets: Brackets, searched: Sequence[SearchedRows]) -> Tensor:
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


class Ties(NamedTuple):
    """Scores equal to the lowest kept one of their row, in n rows where not all of them stay.

    Attributes:
        rows: Which of the n rows each is in, int64, on the CPU.
        columns: Its place in the row, int64, on the CPU.
        need: How many of each row's stay, over all ranks, shape (n,), int64.
        size: Scores in a row.
    """

    rows: Tensor
    columns: Tensor
    need: Tensor
    size: int


def last_ties(ties: Sequence[Ties], all_sum: AllSum) -> list[Tensor]:
    """Return the column of the last tie that stays in each row, of one matrix after the other. Collective.

    The columns are counted digit by digit, from the leading one; what is counted adds over ranks.
    """
    last, need = [torch.zeros_like(each.need) for each in ties], [each.need for each in ties]
    if not sum(len(each) for each in need):
        return last
    digits = -(-max(each.size - 1 for each in ties).bit_length() // TIE_DIGIT)
    for shift in reversed(range(0, digits * TIE_DIGIT, TIE_DIGIT)):
        own = []
        for each, prefix in zip(ties, last, strict=True):
            among = each.columns >> (shift + TIE_DIGIT) == prefix[each.rows]
            digit = each.columns[among] >> shift & ((1 << TIE_DIGIT) - 1)
            own.append(torch.bincount((each.rows[among] << TIE_DIGIT) + digit, minlength=len(prefix) << TIE_DIGIT))
        counts = torch.split(all_sum(torch.cat(own)), [len(each) for each in own])
        for i, found in enumerate(counts):
            upto = found.view(-1, 1 << TIE_DIGIT).cumsum(1)
            digit = (upto < need[i][:, None]).sum(1, keepdim=True)
            need[i] = need[i] - (upto - found.view(upto.shape)).gather(1, digit).squeeze(1)
            last[i] = (last[i] << TIE_DIGIT) + digit.squeeze(1)
    return last


class Brackets:
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
        norm = (1.01 * moments.total_sq.sqrt()).clamp(max=torch.finfo(dtype).max)
        self.high = from_bits(_bits(norm.to(dtype)) + 1, dtype)
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

    def of_every_row(self, last_tie: Tensor) -> Tensor:
        """Return the last tie of every row, of which `last_tie` has those of the unsettled ones."""
        return torch.full(self.low.shape, ALL_TIES).masked_scatter_(self.unsettled, last_tie)

    def settle(self, rows: Tensor, lowest: Tensor) -> None:
        """Close the brackets of some rows at their lowest kept score."""
        self.low[rows] = lowest.to(self.low.dtype)
        self.high[rows] = from_bits(_bits(self.low[rows]) + 1, self.low.dtype)

    def probe(self, i: int) -> Tensor:
        """Return the i-th value to try in each row, between `low` and `high`."""
        low, high = _bits(self.low), _bits(self.high)
        if i > INTERPOLATIONS and i % 2:
            return from_bits(low + (high - low) // 2, self.low.dtype)
        if i == 1:  # across to the other side, as far as normal scores ask for and chance may add
            step = 1.3 * self._surplus / self.size / SLOPE + 0.5 * self._surplus.sign() / math.sqrt(self.size)
            self._last = self._last * (1 + step).clamp(min=0.1)
        elif i > 1:
            self._last = self._between()
        return from_bits(_bits(self._last.to(self.low.dtype)).clamp(min=low + 1, max=high - 1), self.low.dtype)

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

    def spread(self, count: int) -> Tensor:
        """Return `count` values to try in each row, ascending, shape (count, rows): they divide the bracket evenly."""
        low, pieces, steps = _bits(self.low), count + 1, torch.arange(1, count + 1)[:, None]
        width = _bits(self.high) - low  # of float64 too large to be multiplied
        return from_bits(low + width // pieces * steps + width % pieces * steps // pieces, self.low.dtype)

    def narrow_among(self, probes: Tensor, reached: Tensor) -> None:
        """Move both ends of each open bracket to neighbours among ascending probes, shape (probes, rows)."""
        values = torch.cat([self.low[None], probes, self.high[None]])
        counts = torch.cat([self.reach_low[None], reached, self.reach_high[None]])
        at, opened = (reached >= self._keep).sum(0, keepdim=True), self.is_open

        def moved(end: Tensor, ends: Tensor, place: Tensor) -> Tensor:
            return torch.where(opened, ends.gather(0, place)[0], end)

        self.low, self.reach_low = moved(self.low, values, at), moved(self.reach_low, counts, at)
        self.high, self.reach_high = moved(self.high, values, at + 1), moved(self.reach_high, counts, at + 1)


def _bits(value: Tensor) -> Tensor:
    return as_bits(value).long()


def _sum(size: int, counts: Sequence[Tensor]) -> Tensor:
    return sum(counts, torch.zeros(size, dtype=torch.float64))


class SearchedRows:
    """Magnitudes of those of some rows that a part holds; rows drop out when they are found."""

    def __init__(self, part: RowPart, rows: Tensor) -> None:
        place = torch.searchsorted(rows, part.rows).clamp(max=len(rows) - 1)
        held = (rows[place] == part.rows).nonzero().squeeze(1)
        self.rows = place[held]
        scores, _, self.columns = part.of_rows(held)
        self.magnitude = torch.empty(scores.shape, dtype=key_dtype([scores.dtype]), device=scores.device)
        self.magnitude.copy_(scores).abs_()

    def count_reaching(self, value: Tensor) -> Tensor:
        """Return how many scores of each row are >= value, shape (rows,), float64, on the CPU."""
        own_value = value[self.rows].to(self.magnitude)
        counts = torch.zeros(len(own_value), dtype=torch.float64, device=own_value.device)
        for at, out in pieces_of(self.magnitude):
            # Compared into floats, which is three times as fast as into bool; exact up to 2^24 of them.
            counts[at[1]] += torch.ge(self.magnitude[at], own_value[at[1], None], out=out).sum((0, 2))
        return torch.zeros(len(value), dtype=torch.float64).index_add_(0, self.rows, counts.cpu())

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, column and value of each score with low <= score < high of its row, on the CPU, by position."""
        own_low, own_high = (each[self.rows].to(self.magnitude) for each in (low, high))
        rows, columns = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        scores = [torch.zeros(0, dtype=self.magnitude.dtype)]
        for (at, inside), (_, beyond) in zip(pieces_of(self.magnitude), pieces_of(self.magnitude), strict=True):
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
    if on_host(flags):  # numpy is twice as fast
        return torch.from_numpy(np.flatnonzero(flags.bool().numpy()))
    return flags.reshape(-1).nonzero().squeeze(1)

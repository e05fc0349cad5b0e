"""The lowest kept score of many rows at once: counts narrow a bracket around each, until what is inside is sorted.

Counts of the scores that reach a probe add over ranks: so do rows that are cut between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emp_callbacks.core.bit_patterns import as_bits, from_bits
from emp_callbacks.core.device import on_host
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype
from emp_callbacks.core.row_parts import RowPart, pieces_of
from emp_callbacks.core.threshold import AllSum, local_sum

FEW_INSIDE = 256  # brackets that hold one in so many of the scores are sorted
INTERPOLATIONS = 10  # probes after which every second one halves the bracket, which ends for any scores
# Of normal scores EMP keeps those above 0.6 times their mean, and there a threshold higher by its own size would keep
# a third of all scores less. For others this is only a first guess.
GUESS, SLOPE = 0.6, 0.35
ALL_TIES = torch.iinfo(torch.int64).max


def search_rows(brackets: Brackets, searched: Sequence[SearchedRows], all_sum: AllSum) -> Tensor:
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


def _last_ties(brackets: Brackets, searched: Sequence[SearchedRows], all_sum: AllSum) -> Tensor:
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
        at = _run(held, part.scores.device)
        scores = part.scores[:, at]
        self.columns = part.columns if part.columns.shape[1] == 1 else part.columns[:, at]
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


def _run(indices: Tensor, device: torch.device) -> slice | Tensor:
    """Return ascending indices as a slice if they follow each other: what it takes is then no copy."""
    if not len(indices) or int(indices[-1]) - int(indices[0]) + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)
    return indices.to(device)

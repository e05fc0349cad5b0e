"""The highest scores of every row of a matrix, each row its own group, without a Python loop over rows.

Few rows that lie whole on one device are sorted, many are searched, see `row_search`; rows that are cut between ranks
are searched by all of them together, see `cut_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length
from emp_callbacks.core.cut_rows import CutRows, search_cut_rows
from emp_callbacks.core.device import on_host
from emp_callbacks.core.effective_number import ScoreMoments, key_dtype, score_moments
from emp_callbacks.core.kernels.choice import kernels_serve
from emp_callbacks.core.kernels.tables import to_device
from emp_callbacks.core.row_parts import RowCuts, RowPart, pieces_of, row_magnitudes, whole_rows
from emp_callbacks.core.row_search import ALL_TIES, Brackets, SearchedRows, search_rows
from emp_callbacks.core.threshold import AllSum, local_sum

FEW = 1 << 17  # scores that are sorted rather than searched
ROOM = 1 << 24  # scores of cut rows, of all matrices, that are copied: 64 MiB of float32
BLOCK = 1 << 22  # scores that are searched at a time: 16 MiB of float32


@dataclass(frozen=True)
class RowThresholds:
    """The rule "keep above `value`, and of the scores equal to it the columns up to `last_tie`", for each row.

    Attributes:
        value: Shape (G,), in the scores' dtype: at most the lowest kept score, above all that are not kept. -inf
            keeps the whole row, also NaN; +inf stands where the row lies on other ranks.
        above: Shape (G,), more than the lowest kept score.
        last_tie: Shape (G,), int64.
        cuts: What a kernel found of rows that all lie whole on one accelerator; None: a search has found the rest. All
            tensors are there, and `above` is the lowest kept score itself.
    """

    value: Tensor
    above: Tensor
    last_tie: Tensor
    cuts: RowCuts | None = None

    def put(self, rows: Tensor, found: Brackets, last_tie: Tensor) -> None:
        """Take what a search found of some rows."""
        self.value[rows], self.above[rows], self.last_tie[rows] = found.low, found.high, last_tie

    def mask(self, part: RowPart) -> Tensor:
        """Return the mask of a part of the rows, shape (A, R, B), bool, True = kept."""
        device = part.scores.device
        value, last_tie = (_of_rows(each, part.rows, device) for each in (self.value, self.last_tie))
        kept = torch.empty(part.scores.shape, dtype=torch.bool, device=part.scores.device)
        for at, magnitude in row_magnitudes(part.scores):
            # Not below: that keeps NaN where all is kept.
            below = torch.lt(magnitude, value[at[1], None], out=magnitude)
            kept[at].copy_(below).logical_not_()
        # Few rows have ties to cut; which, an accelerator is not asked: it would have to be waited for.
        everything = torch.arange(len(last_tie), device=device)
        tied = (last_tie < ALL_TIES).nonzero().squeeze(1) if on_host(device) else everything
        for rows in torch.split(tied, max(1, chunk_length(device) // max(1, kept[:, :1].numel()))):
            equal = part.scores[:, rows].abs() == value[rows, None]
            surplus = part.columns.expand(kept.shape)[:, rows] > last_tie[rows, None]
            kept[:, rows] &= ~equal.logical_and_(surplus)
        return kept

    def lowest_kept(self, part: RowPart) -> Tensor:
        """Return the lowest kept score of a part of the rows, shape (), float64; inf if it has none."""
        nothing = torch.full((), math.inf, dtype=torch.float64)
        if not len(part.rows):
            return nothing
        if self.cuts is not None:
            return self.above.min().double()
        value, above = self.value[part.rows], self.above[part.rows]
        # Looked for only where it can be: most rows keep nothing as low as what some row keeps for certain.
        near = (value < above.min()).nonzero().squeeze(1)
        magnitude = part.scores[:, near.to(part.scores.device)].abs()
        kept = magnitude[magnitude >= value[near].to(magnitude.device)[:, None]]
        return kept.min().double() if len(kept) else nothing


def _of_rows(values_g: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return to_device(values_g.index_select(0, to_device(rows, values_g.device)), device)


def row_sums(parts: Sequence[RowPart], rows: int) -> Tensor:
    """Return the moments of each row over some parts of them, stacked, shape (rows, 3), float64, on their device."""
    device = parts[0].scores.device
    sums = torch.zeros(rows, 3, dtype=torch.float64, device=device)
    for part in parts:
        own = _moments_by_kernel(part.scores) if kernels_serve([part.scores]) else _moments(part.scores)
        sums.index_add_(0, to_device(part.rows, device), own)
    return sums


def _moments(scores: Tensor) -> Tensor:
    sums = torch.zeros(scores.shape[1], 3, dtype=torch.float64, device=scores.device)
    wide_pieces = pieces_of(scores, torch.float64)
    for (at, magnitude), (_, wide) in zip(row_magnitudes(scores), wide_pieces, strict=True):
        sums[at[1], 0] += wide.copy_(magnitude).sum((0, 2))
        sums[at[1], 1] += wide.square_().sum((0, 2))
        sums[at[1], 2] += torch.gt(magnitude, 0, out=magnitude).sum((0, 2))
    return sums


def _moments_by_kernel(scores: Tensor) -> Tensor:
    from emp_callbacks.core.kernels.rows import row_moments

    return row_moments(_by_row(scores))


def _by_row(scores: Tensor) -> Tensor:
    """Return scores (A, R, B) as (R, A * B), contiguous; without a copy where the rows lie one after another."""
    return scores.transpose(0, 1).reshape(scores.shape[1], -1).contiguous()


def top_rows(scores_gn: Tensor, keep_g: Tensor, moments: ScoreMoments | None = None) -> Tensor:
    """Return the mask of the keep_g[g] highest scores of each row, ties by lowest index.

    Args:
        scores_gn: Shape (G, N), any floating dtype, either sign. A row with NaN or Inf must be kept whole.
        keep_g: Shape (G,), int64, each in [0, N].
        moments: Of each row, where they are known already.

    Returns:
        Shape (G, N), bool, True = kept.
    """
    if kernels_serve([scores_gn]):
        return _top_by_kernel(scores_gn.detach(), keep_g)
    rows = whole_rows(scores_gn)
    if not on_host(scores_gn) or scores_gn.numel() <= FEW:
        thresholds = _sort_rows(scores_gn.detach(), to_device(keep_g, scores_gn.device))
    else:
        known = moments or score_moments(scores_gn)
        matrix = RowMatrix([rows], [rows], keep_g, known, scores_gn.shape[1], scores_gn.dtype)
        (thresholds,) = find_rows([matrix])
    return thresholds.mask(rows)[0]


def _top_by_kernel(scores_gn: Tensor, keep_g: Tensor) -> Tensor:
    from emp_callbacks.core.kernels.rows import row_thresholds

    keep = to_device(keep_g, scores_gn.device)
    dtype = key_dtype([scores_gn.dtype])
    value, last_tie = row_thresholds(scores_gn.contiguous(), keep.clamp(min=1), dtype)
    value = _extremes(value, keep, scores_gn.shape[1])[:, None]
    magnitude = scores_gn.abs().to(dtype)
    beyond = torch.arange(scores_gn.shape[1], device=scores_gn.device) > last_tie[:, None]
    return ((magnitude < value) | ((magnitude == value) & beyond)).logical_not_()


def _sort_rows(scores_gn: Tensor, keep_g: Tensor) -> RowThresholds:
    size, found = scores_gn.shape[1], []
    rows = max(1, chunk_length(scores_gn.device) // max(1, size))
    for scores, keep in zip(torch.split(scores_gn, rows), torch.split(keep_g[:, None], rows), strict=True):
        ordered = scores.abs().sort(dim=1, descending=True, stable=True)
        last = (keep - 1).clamp(min=0)
        value, column = ordered.values.gather(1, last), ordered.indices.gather(1, last)
        following = ordered.values.gather(1, keep.clamp(max=size - 1))
        last_tie = torch.where(following == value, column, ALL_TIES)
        above = torch.full_like(value, torch.inf)
        found.append((_extremes(value, keep, size), above, last_tie.masked_fill(keep == size, ALL_TIES)))
    value, above, last_tie = (torch.cat(values).squeeze(1) for values in zip(*found, strict=True))
    return RowThresholds(value, above, last_tie)


def _extremes(value: Tensor, keep: Tensor, size: int) -> Tensor:
    return value.masked_fill(keep == 0, torch.inf).masked_fill(keep == size, -torch.inf)


class RowMatrix(NamedTuple):
    """Scores in rows, each its own group, and how many of each stay.

    Attributes:
        held: What lies on this rank of the rows; at least one part, which may be empty.
        counted: What this rank counts of them: over all ranks these cover the rows once.
        keep: Shape (G,), int64, each in [0, size], on the CPU.
        moments: Of each row, shape (G,), on the CPU.
        size: Scores in a row.
        dtype: Of the scores; the same on every rank.
    """

    held: Sequence[RowPart]
    counted: Sequence[RowPart]
    keep: Tensor
    moments: ScoreMoments
    size: int
    dtype: torch.dtype

    def brackets(self, rows: Tensor) -> Brackets:
        """Return where the search for the lowest kept scores of some rows begins."""
        return Brackets(self.keep[rows], ScoreMoments.unstack(self.moments.stack()[rows]), self.size, self.dtype)


def find_rows(matrices: Sequence[RowMatrix], all_sum: AllSum = local_sum) -> list[RowThresholds]:
    """Return, for each matrix, the thresholds that keep exactly the highest scores of each row. Collective.

    Args:
        matrices: All of them, in the same order on every rank: their sums travel together.
        all_sum: Returns the sum of a tensor over all ranks.
    """
    found, cut, room = [], [], ROOM
    for matrix, (whole, pieces) in zip(matrices, _whole_and_cut(matrices, all_sum), strict=True):
        if len(whole) == len(matrix.keep) and (exact := _by_kernel(matrix)) is not None:
            found.append(exact)
            continue
        one = RowThresholds(
            torch.full(matrix.keep.shape, torch.inf, dtype=matrix.dtype),
            torch.full(matrix.keep.shape, torch.inf, dtype=matrix.dtype),
            torch.full_like(matrix.keep, ALL_TIES),
        )
        for block in torch.split(whole, max(1, BLOCK // max(1, matrix.size))) if len(whole) else ():
            brackets = matrix.brackets(block)
            one.put(block, brackets, search_rows(brackets, [SearchedRows(part, block) for part in matrix.held]))
        found.append(one)
        if len(pieces):
            rows = CutRows(matrix.counted, pieces, matrix.brackets(pieces), room)
            room -= rows.copied
            cut.append((one, pieces, rows))
    last_ties = search_cut_rows([rows for *_, rows in cut], all_sum)
    for (one, pieces, rows), last_tie in zip(cut, last_ties, strict=True):
        one.put(pieces, rows.brackets, last_tie)
    searched = [(matrix, one) for matrix, one in zip(matrices, found, strict=True) if one.cuts is None]
    for matrix, one in searched:
        one.value.copy_(_extremes(one.value, matrix.keep, matrix.size))
        one.above.masked_fill_(matrix.keep == matrix.size, torch.inf)
    return found


def _by_kernel(matrix: RowMatrix) -> RowThresholds | None:
    """Return the thresholds of rows that lie whole on one accelerator; None where kernels do not serve them."""
    part = matrix.held[0]
    is_table = len(matrix.held) == 1 and part.columns.shape[1] == 1 and len(part.rows) == len(matrix.keep)
    if not is_table or not kernels_serve([part.scores]):
        return None
    from emp_callbacks.core.kernels.rows import row_thresholds

    keep = to_device(matrix.keep, part.scores.device)
    dtype = key_dtype([part.scores.dtype])
    lowest, last_tie = row_thresholds(_by_row(part.scores), keep.clamp(min=1), dtype)
    last_tie = last_tie.masked_fill(keep == matrix.size, ALL_TIES)
    value, above = _extremes(lowest, keep, matrix.size), lowest.masked_fill(keep == 0, torch.inf)
    return RowThresholds(value, above, last_tie, RowCuts(value, last_tie, part.scores.shape[2]))


def _whole_and_cut(matrices: Sequence[RowMatrix], all_sum: AllSum) -> list[tuple[Tensor, Tensor]]:
    """Return the rows that lie whole on this rank, and those of which any rank holds a piece only. Collective."""
    if not matrices:
        return []
    counts = [torch.zeros_like(matrix.keep) for matrix in matrices]
    for matrix, count in zip(matrices, counts, strict=True):
        for part in matrix.held:
            count.index_add_(0, part.rows, part.lengths)
    own = [((count > 0) & (count < matrix.size)).int() for matrix, count in zip(matrices, counts, strict=True)]
    cut = torch.split(all_sum(torch.cat(own)) > 0, [len(rows) for rows in own])
    return [
        (((count == matrix.size) & ~pieces).nonzero().squeeze(1), pieces.nonzero().squeeze(1))
        for matrix, count, pieces in zip(matrices, counts, cut, strict=True)
    ]

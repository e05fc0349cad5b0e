"""Scores that lie in rows, whole or in pieces, and passes over them that stay in a core's cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length, scratch
from emp_callbacks.core.effective_number import key_dtype

FILLED = torch.iinfo(torch.int64).max


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

    def of_rows(self, at: Tensor) -> RowPart:
        """Return the part of some of its rows, by ascending index; no copy of rows that follow each other."""
        columns = self.columns
        if len(at) and int(at[-1]) - int(at[0]) + 1 == len(at):
            chosen: slice | Tensor = slice(int(at[0]), int(at[-1]) + 1)
        else:
            chosen = at.to(self.scores.device)
        return RowPart(self.scores[:, chosen], self.rows[at], columns if columns.shape[1] == 1 else columns[:, chosen])

    def magnitudes(self) -> RowPart:
        """Return the part with a copy of its scores' magnitudes, in a dtype in which they compare exactly."""
        dtype = key_dtype([self.scores.dtype])
        return self._replace(scores=self.scores.to(dtype, copy=True).abs_())


class RowCuts(NamedTuple):
    """What is kept of scores of shape (A, R, B), of which each r is a row of A * B columns, in order.

    Attributes:
        value: The lowest kept score of each row, shape (R,), float32 or float64; -inf keeps all.
        last_tie: Of the scores equal to it, those up to this column are kept, shape (R,), int64.
        width: B.
    """

    value: Tensor
    last_tie: Tensor
    width: int


def whole_rows(scores_gn: Tensor) -> RowPart:
    """Return all rows of a matrix as one part, whose `rows` are on the scores' device."""
    rows = torch.arange(len(scores_gn), device=scores_gn.device)
    columns = torch.arange(scores_gn.shape[1], device=scores_gn.device)
    return RowPart(scores_gn.detach()[None], rows, columns[None, None])


def pieces_of(scores: Tensor, dtype: torch.dtype | None = None) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield slices of the first two dimensions that cover (A, R, B) in chunks, and memory for each that is reused."""
    if not scores.numel():
        return
    count, rows, width = scores.shape
    length = chunk_length(scores.device)
    row_step = max(1, min(rows, length // width))
    piece_step = max(1, min(count, length // (row_step * width)))
    length = row_step * piece_step * width
    with scratch(length, dtype or key_dtype([scores.dtype]), scores.device) as buffer:
        for piece, row in itertools.product(range(0, count, piece_step), range(0, rows, row_step)):
            at = slice(piece, min(piece + piece_step, count)), slice(row, min(row + row_step, rows))
            shape = at[0].stop - piece, at[1].stop - row, width
            yield at, buffer[: math.prod(shape)].view(shape)


def row_magnitudes(scores: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield slices of the first two dimensions that cover the scores in chunks, and the magnitudes of each."""
    for at, out in pieces_of(scores):
        yield at, out.copy_(scores[at]).abs_()

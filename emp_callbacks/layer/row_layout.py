"""How the components that a rank holds of one parameter lie in its rows, for `scope="row"`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emp_callbacks.core.row_parts import FILLED, RowPart
from emp_callbacks.layer.segment import Span


@dataclass(frozen=True)
class RowLayout:
    """A rank's scores of one parameter as parts of its rows: the output units, whose scores compete.

    Attributes:
        parts: At least one, which may be empty.
        order: Flat index of each score of the only part, -1 where it was filled up; None where the parts follow
            each other.
    """

    parts: list[RowPart]
    order: Tensor | None = None

    def flat(self, masks: list[Tensor]) -> Tensor:
        """Return the masks of the parts as one, in the order of the rank's components, shape (n,)."""
        if self.order is None:
            return torch.cat([mask.reshape(-1) for mask in masks]) if len(masks) > 1 else masks[0].reshape(-1)
        held = self.order >= 0
        return torch.empty(int(held.sum()), dtype=torch.bool, device=held.device).scatter_(
            0, self.order[held], masks[0].reshape(-1)[held]
        )


def row_layout(span: Span, scores_n: Tensor, part: slice) -> RowLayout:
    """Return how a flat part of a rank's components lies in rows.

    Args:
        span: Where the components lie in the parameter.
        scores_n: The scores of all components that this rank holds, shape (n,).
        part: Which of them.
    """
    positions = span.positions_of(part)
    rows, width = span.shape[span.output_dim], math.prod(span.shape[span.output_dim + 1 :])
    matrix = span.size // span.matrices
    if matrix == rows * width:  # rows follow each other, also beyond the end of a matrix
        rows, matrix = span.rows, span.size
    scores = scores_n[part]
    if not isinstance(positions, int):
        return _scattered(scores, positions.cpu(), (rows, width, matrix), span.rows)
    parts: list[RowPart] = []
    taken = 0
    while taken < len(scores) or not parts:
        number, inside = divmod(positions + taken, matrix)
        of_matrix = scores[taken : taken + matrix - inside]
        parts += [one._replace(rows=one.rows + number * rows) for one in _runs(of_matrix, inside, rows, width)]
        taken += len(of_matrix)
    return RowLayout(parts)


def _runs(scores: Tensor, start: int, rows: int, width: int) -> list[RowPart]:
    """Cut a run that starts at a flat position of (pieces, rows, width) where it stops being a box of these three."""
    parts: list[RowPart] = []
    taken, slab = 0, rows * width
    while taken < len(scores) or not parts:
        at, left = start + taken, len(scores) - taken
        inside = at % slab
        if inside % width or left < width:  # within one row
            count, shape = min(left, width - inside % width), (1, 1, -1)
        elif inside or left < slab:  # whole rows of one piece
            count = min(left, slab - inside) // width * width
            shape = (1, count // width, width)
        else:  # whole pieces
            count = left // slab * slab
            shape = (count // slab, rows, width)
        box = scores[taken : taken + count].view(shape)
        first, piece = inside // width, at // slab
        columns = torch.arange(piece, piece + box.shape[0], device=scores.device)[:, None, None] * width
        within = torch.arange(inside % width, inside % width + box.shape[2], device=scores.device)
        parts.append(RowPart(box, torch.arange(first, first + box.shape[1]), columns + within))
        taken += count
    return parts


def _scattered(scores: Tensor, positions: Tensor, sizes: tuple[int, int, int], total: int) -> RowLayout:
    """Sort the scores into rows of one length, those too short filled up with zeros that no column counts."""
    rows, width, matrix = sizes
    number, inside = positions // matrix, positions % matrix
    row = number * rows + inside // width % rows
    column = inside // (rows * width) * width + inside % width
    counts = torch.bincount(row, minlength=total)
    held = counts.nonzero().squeeze(1)
    longest = int(counts.max()) if len(positions) else 0
    by_row = row.argsort(stable=True)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row[by_row]]
    order = torch.full((total, longest), -1)
    order[row[by_row], place] = by_row
    order = order[held].reshape(-1)
    filled = order >= 0
    table, columns = scores.new_zeros(len(order)), torch.full_like(order, FILLED)
    table[filled.to(scores.device)] = scores[order[filled].to(scores.device)]
    columns[filled] = column[order[filled]]
    shape = 1, len(held), longest
    box = RowPart(table.view(shape), held, columns.view(shape).to(scores.device))
    return RowLayout([box], order.to(scores.device))

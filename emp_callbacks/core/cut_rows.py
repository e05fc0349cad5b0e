"""The lowest kept scores of rows that are cut between ranks: counts of their pieces add.

The rows of all matrices are searched side by side, so that one sum carries a probe of each. Few scores are copied
as magnitudes; more than that are counted where they lie, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emp_callbacks.core.chunks import chunk_length
from emp_callbacks.core.row_parts import RowPart, pieces_of
from emp_callbacks.core.row_search import INTERPOLATIONS, Brackets, Ties, last_ties
from emp_callbacks.core.threshold import AllSum

SPREAD = 7  # probes of a row at a time once interpolation has had its turn: three bits of its score


class CutRows:
    """Some rows of one matrix, of which ranks hold pieces.

    Args:
        parts: What this rank counts of the matrix.
        rows: Indices of the cut rows, ascending, int64; the same on every rank.
        brackets: Where the lowest kept score of each lies.
        room: Scores that may be copied: counting in a copy of magnitudes takes half as long. None are if all do not
            fit.
    """

    def __init__(self, parts: Sequence[RowPart], rows: Tensor, brackets: Brackets, room: int) -> None:
        self.brackets = brackets
        self._pieces = []
        for part in parts:
            place = torch.searchsorted(rows, part.rows).clamp(max=len(rows) - 1)
            held = (rows[place] == part.rows).nonzero().squeeze(1)
            self._pieces.append((part.of_rows(held), place[held]))
        size = sum(part.scores.numel() for part, _ in self._pieces)
        self.copied = size if size <= room else 0
        if self.copied:
            self._pieces = [(part.magnitudes(), of) for part, of in self._pieces]

    def count_reaching(self, probes: Tensor, wanted: Tensor) -> Tensor:
        """Return how many scores of this rank reach each probe, shape of `probes`, float64, on the scores' device.

        Args:
            probes: Shape (probes, rows).
            wanted: Of which rows it must be right, shape (rows,), bool.
        """
        self._drop_settled()
        device = self.device
        counts = torch.zeros(probes.shape, dtype=torch.float64, device=device)
        for part, of in self._held(wanted):
            values, own = probes[:, of].to(part.scores), torch.zeros(len(probes), len(of), device=device).double()
            pieces = zip(pieces_of(part.scores), pieces_of(part.scores), strict=True)
            for (at, out), (_, reached) in pieces:
                magnitude = part.scores[at] if self.copied else out.copy_(part.scores[at]).abs_()
                for probe, count in zip(values, own, strict=True):
                    # Compared into floats, which is three times as fast as into bool; exact up to 2^24 of them.
                    count[at[1]] += torch.ge(magnitude, probe[at[1], None].to(out), out=reached).sum((0, 2))
            counts.index_add_(1, of.to(device), own)
        return counts

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self._pieces[0][0].scores.device

    def _drop_settled(self) -> None:
        """Make the copy smaller once many rows are found."""
        unsettled = self.brackets.unsettled
        if not self.copied or int(unsettled.sum()) >= 0.75 * max(len(of) for _, of in self._pieces):
            return
        left = [(part, of, unsettled[of].nonzero().squeeze(1)) for part, of in self._pieces]
        self._pieces = [(part.of_rows(at), of[at]) for part, of, at in left]

    def ties(self) -> Ties:
        """Return this rank's scores equal to the lowest kept one, in the rows where not all such scores stay."""
        tied = self.brackets.unsettled
        lowest = self.brackets.low.masked_fill(~tied, torch.nan)
        rows, columns = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for part, of in self._held(tied):
            at = (part.scores.abs() == lowest[of].to(part.scores)[:, None]).nonzero(as_tuple=True)
            rows.append(of[at[1].cpu()])
            columns.append(part.columns.expand(part.scores.shape)[at].cpu())
        number = tied.cumsum(0) - 1
        return Ties(number[torch.cat(rows)], torch.cat(columns), self.brackets.need[tied].long(), self.brackets.size)

    def _held(self, wanted: Tensor) -> Iterator[tuple[RowPart, Tensor]]:
        """Yield what this rank holds of the rows that are wanted, in small parts, and the number of each part's rows.

        Where most are wanted all are taken: they lie together and are not copied.
        """
        for part, of in self._pieces:
            chosen = wanted[of].nonzero().squeeze(1)
            chosen = torch.arange(len(of)) if len(chosen) > 0.75 * len(of) else chosen
            step = max(1, chunk_length(part.scores.device) // max(1, part.scores[:, :1].numel()))
            for some in torch.split(chosen, step) if len(chosen) else ():
                yield part.of_rows(some), of[some]


def search_cut_rows(cut: Sequence[CutRows], all_sum: AllSum) -> list[Tensor]:
    """Narrow all brackets to the lowest kept scores and return the last tie of each row. Collective.

    Of n rows in all, a sum carries n counts or, for the few rows that take long, `SPREAD` times as many.
    """
    brackets = [rows.brackets for rows in cut]
    probe = 0
    while any(bool(each.is_open.any()) for each in brackets):
        several = probe > INTERPOLATIONS
        opened = [each.is_open for each in brackets]
        probes = [each.spread(SPREAD) if several else each.probe(probe)[None] for each in brackets]
        own = [
            rows.count_reaching(values, at)[:, at.to(rows.device)].flatten()
            for rows, values, at in zip(cut, probes, opened, strict=True)
        ]
        sums = all_sum(torch.cat([counts.to(own[0].device) for counts in own])).cpu()
        counts = torch.split(sums, [len(each) for each in own])
        for each, values, at, found in zip(brackets, probes, opened, counts, strict=True):
            reached = torch.zeros(values.shape, dtype=torch.float64)
            reached[:, at] = found.view(len(values), -1)
            if several:
                each.narrow_among(values, reached)
            else:
                each.narrow(values[0], reached[0])
        probe += 1
    ties = last_ties([rows.ties() for rows in cut], all_sum)
    return [each.of_every_row(last) for each, last in zip(brackets, ties, strict=True)]

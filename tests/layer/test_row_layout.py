import itertools

import pytest
import torch

from emp_callbacks.core.effective_number import score_moments
from emp_callbacks.core.row_selection import RowMatrix, find_rows, row_sums, top_rows
from emp_callbacks.layer.row_layout import row_layout
from emp_callbacks.layer.segment import Segment, Span

SHAPES = [
    ((5, 4), 0, False),
    ((5, 4), 1, False),
    ((3, 4, 2, 2), 0, False),
    ((3, 4, 2, 2), 1, False),
    ((6,), 0, False),
    ((3, 5, 4), 1, True),  # experts of (output, input)
    ((3, 5, 4), 2, True),  # experts of (input, output)
]


def span_at(shape, output_dim, stacked, positions, size):
    return Span(
        name="weight",
        shape=torch.Size(shape),
        output_dim=output_dim,
        stacked=stacked,
        positions=positions,
        replicated=False,
        counted=slice(0, size),
    )


def rows_and_columns(shape, output_dim, stacked):
    """Return row and column of every component, flat, by moving the output dimension to the front."""
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    matrices = places if stacked else places[None]
    places = torch.stack([matrix.movedim(output_dim - stacked, 0) for matrix in matrices.unbind()])
    places = places.reshape(places.shape[0] * places.shape[1], -1)
    row, column = torch.empty(2, places.numel(), dtype=torch.int64)
    row[places] = torch.arange(len(places))[:, None].expand(places.shape)
    column[places] = torch.arange(places.shape[1]).expand(places.shape)
    return row, column


def shards(size, ranks):
    """Cut a flat parameter into runs, and once into what lies at every `ranks`-th position."""
    cuts = [size * r // ranks for r in range(ranks + 1)]
    runs = [(a, torch.arange(a, b)) for a, b in itertools.pairwise(cuts)]
    scattered = [(torch.arange(r, size, ranks), torch.arange(r, size, ranks)) for r in range(ranks)]
    return {"runs": runs, "scattered": scattered}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("way", ["runs", "scattered"])
@pytest.mark.parametrize(("shape", "output_dim", "stacked"), SHAPES)
def test_parts_know_the_row_and_column_of_each_score(shape, output_dim, stacked, way, ranks):
    size = torch.Size(shape).numel()
    row, column = rows_and_columns(shape, output_dim, stacked)
    for positions, at in shards(size, ranks)[way]:
        scores = at.double() + 1  # each tells where it comes from; 0 fills up
        layout = row_layout(span_at(shape, output_dim, stacked, positions, len(at)), scores, slice(0, len(at)))
        for part in layout.parts:
            held = part.scores > 0
            come_from = part.scores[held].long() - 1
            assert torch.equal(part.rows[:, None].expand(part.scores.shape)[held], row[come_from])
            assert torch.equal(part.columns.expand(part.scores.shape)[held], column[come_from])
        marks = [part.scores.long() % 3 == 0 for part in layout.parts]
        assert torch.equal(layout.flat(marks), (at + 1) % 3 == 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("way", ["runs", "scattered"])
@pytest.mark.parametrize(("shape", "output_dim", "stacked"), SHAPES)
def test_rows_cut_up_in_any_way_keep_what_whole_rows_keep(shape, output_dim, stacked, way, ranks):
    generator = torch.Generator().manual_seed(ranks)
    scores = (torch.randn(shape, generator=generator) * 2).round()
    row, column = rows_and_columns(shape, output_dim, stacked)
    rows = torch.empty(int(row.max()) + 1, int(column.max()) + 1)
    rows[row, column] = scores.flatten()
    keep = torch.randint(1, rows.shape[1] + 1, (len(rows),), generator=generator)
    wanted = top_rows(rows, keep)[row, column]
    cuts = shards(scores.numel(), ranks)[way]
    layouts = [
        row_layout(span_at(shape, output_dim, stacked, p, len(at)), scores.flatten()[at], slice(None)) for p, at in cuts
    ]
    parts = [part for layout in layouts for part in layout.parts]
    moments = score_moments(rows)
    torch.testing.assert_close(row_sums(parts, len(rows)), moments.stack())
    (thresholds,) = find_rows([RowMatrix(parts, parts, keep, moments, rows.shape[1], scores.dtype)])
    for layout, (_, at) in zip(layouts, cuts, strict=True):
        assert torch.equal(layout.flat([thresholds.mask(part) for part in layout.parts]), wanted[at])


@pytest.mark.parametrize("positions", [7, torch.tensor([3, 50, 8, 59])])
def test_a_segment_knows_where_its_elements_lie_along_several_dimensions(positions):
    shape = (3, 5, 4)
    segment = Segment(
        name="experts",
        shape=torch.Size(shape),
        output_dim=2,
        stacked=True,
        positions=positions,
        replicated=False,
        counted=slice(0, 4),
        owner=torch.zeros(4),
        view=lambda tensor: tensor,
    )
    flat = torch.arange(7, 11) if isinstance(positions, int) else positions
    index = torch.unravel_index(flat, shape)
    for dims in ((0,), (2,), (0, 1), (0, 2)):
        expected = torch.zeros(4, dtype=torch.int64)
        for dim in dims:
            expected = expected * shape[dim] + index[dim]
        assert torch.equal(segment.indices_along(*dims), expected)
    assert torch.equal(segment.row_indices(), index[0] * 4 + index[2])
    assert (segment.matrices, segment.rows, segment.input_dim) == (3, 12, 1)

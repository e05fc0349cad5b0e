import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emp_callbacks.core import row_search, row_selection
from emp_callbacks.core.effective_number import score_moments
from emp_callbacks.core.row_parts import RowPart, whole_rows
from emp_callbacks.core.row_selection import RowMatrix, find_rows, row_sums, top_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(scores, keep):
    """The five-line twin: a stable sort of each row."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count, kept in zip(scores, keep.tolist(), mask, strict=True):
        kept[torch.sort(row.abs(), descending=True, stable=True).indices[:count]] = True
    return mask


def random_case(seed):
    """Normal, heavy-tailed, coarse or tiny scores of up to 12 rows, and keep counts from none to all."""
    rows, columns = (int(torch.randint(1, most, (1,), generator=rng(seed))) for most in (13, 40))
    scores = torch.randn(rows, columns, generator=rng(seed + 1))
    scores = [scores, scores**5, (scores * 2).round(), scores * 1e-3, torch.zeros_like(scores)][seed % 5]
    keep = torch.randint(0, columns + 1, (rows,), generator=rng(seed + 2))
    return scores.to(DTYPES[seed % 4]), keep


def cut_up(scores):
    """Return a matrix as three parts, one of them column by column, and what puts their masks together."""
    rows, columns = scores.shape
    r, c = rows // 3, columns // 2
    every = torch.arange(columns)
    parts = [
        RowPart(scores[None, :r], torch.arange(r), every[None, None]),
        RowPart(scores[None, r:, :c], torch.arange(r, rows), every[None, None, :c]),
        RowPart(scores[r:, c:].T[:, :, None], torch.arange(r, rows), every[c:, None, None]),
    ]

    def together(masks):
        return torch.cat([masks[0][0], torch.cat([masks[1][0], masks[2][:, :, 0].T], 1)])

    return parts, together


SLOW = pytest.mark.slow


@pytest.mark.parametrize("block", [pytest.param(1, marks=SLOW), pytest.param(50, marks=SLOW), 1 << 22])
def test_a_thousand_random_cases_equal_a_stable_sort_of_each_row(monkeypatch, block):
    monkeypatch.setattr(row_selection, "BLOCK", block)
    for seed in range(350):
        scores, keep = random_case(seed)
        whole, expected = whole_rows(scores), reference(scores, keep)
        moments = score_moments(scores)
        (searched,) = find_rows([RowMatrix([whole], [whole], keep, moments, scores.shape[1], scores.dtype)])
        parts, together = cut_up(scores)
        (in_parts,) = find_rows([RowMatrix(parts, parts, keep, moments, scores.shape[1], scores.dtype)])
        assert torch.equal(top_rows(scores, keep), expected), f"sorted, case {seed}"
        assert torch.equal(searched.mask(whole)[0], expected), f"searched, case {seed}"
        assert torch.equal(together([in_parts.mask(part) for part in parts]), expected), f"in parts, case {seed}"
        kept = scores.abs()[expected]
        assert not kept.numel() or searched.lowest_kept(whole) == float(kept.min())


@pytest.mark.parametrize("kind", ["normal", "heavy", "coarse", "one-large", "equal", "denormal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_searched_as_they_would_be_sorted(kind, dtype):
    scores = torch.randn(150, 1000, generator=rng(1))
    assert scores.numel() > row_selection.FEW
    scores = {
        "normal": scores,
        "heavy": torch.exp(3 * scores).clamp(max=6e4),
        "coarse": (scores * 2).round(),
        "one-large": scores.clone().index_fill_(1, torch.tensor([7]), 5e4),
        "equal": torch.ones_like(scores),
        "denormal": scores * 1e-39,
    }[kind].to(dtype)
    keep = torch.randint(1, 1000, (150,), generator=rng(2))
    assert torch.equal(top_rows(scores, keep), reference(scores, keep))


def test_normal_rows_need_few_probes(monkeypatch):
    probes = []
    count = row_search.SearchedRows.count_reaching
    monkeypatch.setattr(row_search.SearchedRows, "count_reaching", lambda *a: probes.append(1) or count(*a))
    scores = torch.randn(256, 4096, generator=rng(3))
    keep = torch.full((256,), 2600)
    assert int(top_rows(scores, keep).sum()) == 256 * 2600
    assert len(probes) <= 6  # bisection of the bit pattern takes 31


def test_rows_with_nan_or_inf_are_kept_whole():
    scores = torch.randn(200, 700, generator=rng(4))
    scores[3, 5], scores[9, 1] = torch.nan, torch.inf
    keep = torch.full((200,), 300)
    keep[[3, 9]] = 700
    for chosen in (scores, scores[:20]):  # searched, sorted
        mask = top_rows(chosen, keep[: len(chosen)])
        assert mask.sum(1).tolist() == keep[: len(chosen)].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_sums_over_parts_are_those_of_the_rows(rows, columns, seed, dtype):
    scores = torch.randn(rows, columns, generator=rng(seed)).to(dtype)
    parts, _ = cut_up(scores)
    torch.testing.assert_close(row_sums(parts, rows), score_moments(scores).stack(), rtol=1e-13, atol=0)

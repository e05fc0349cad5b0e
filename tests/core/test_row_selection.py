import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emp_callbacks.core import row_selection
from emp_callbacks.core.row_selection import top_rows, top_rows_sharded
from emp_callbacks.core.selection import local_sum

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_rows_equal_a_stable_sort_of_each_row(rows, columns, seed, dtype):
    scores = (torch.randn(rows, columns, generator=rng(seed)) * 2).round().to(dtype)
    keep = torch.randint(0, columns + 1, (rows,), generator=rng(seed + 1))
    mask = top_rows(scores, keep)
    for row, count, kept in zip(scores, keep.tolist(), mask, strict=True):
        expected = torch.zeros(columns, dtype=torch.bool)
        expected[torch.sort(row.abs(), descending=True, stable=True).indices[:count]] = True
        assert torch.equal(kept, expected)


def test_rows_in_blocks(monkeypatch):
    scores = torch.randn(50, 20, generator=rng())
    keep = torch.full((50,), 7)
    whole = top_rows(scores, keep)
    monkeypatch.setattr(row_selection, "CHUNK", 60)
    assert torch.equal(top_rows(scores, keep), whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31), st.sampled_from(DTYPES), st.booleans())
def test_rows_as_flat_shards_give_the_same_masks_and_lowest_scores(rows, columns, seed, dtype, transposed):
    scores = (torch.randn(rows, columns, generator=rng(seed)) * 2).round().to(dtype)
    keep = torch.randint(1, columns + 1, (rows,), generator=rng(seed + 1))
    row = torch.arange(rows)[:, None].expand(rows, columns)
    column = torch.arange(columns).expand(rows, columns)
    shard = [(t.T if transposed else t).reshape(-1) for t in (scores, row, column)]
    mask, key = top_rows_sharded(*shard, keep, local_sum)
    expected = top_rows(scores, keep)
    assert torch.equal(mask, (expected.T if transposed else expected).reshape(-1))
    lowest = scores.abs().masked_fill(~expected, torch.inf).min(1).values
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    assert torch.equal(key.to(bits).view(wide), lowest.to(wide))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emp_callbacks.core import chunks
from emp_callbacks.core.group_pattern import GroupPattern, group_mask, lowest_kept


def reference(scores, keep):
    """The N highest of each group by a loop, ties by lowest index."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for g in range(scores.shape[0]):
        for i in range(scores.shape[2]):
            order = sorted(range(scores.shape[1]), key=lambda j: (-abs(float(scores[g, j, i])), j))
            kept[g, order[:keep], i] = True
    return kept


@given(st.data())
def test_the_highest_of_each_group_are_kept(data):
    size = data.draw(st.integers(2, 7))
    keep = data.draw(st.integers(1, size - 1))
    groups, beside = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3.0, float("inf")])
    count = groups * size * beside
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    scores = scores.view(groups, size, beside).to(dtype)
    kept = group_mask(scores, keep)
    assert torch.equal(kept, reference(scores, keep))
    expected = scores.abs().double()[kept].min() if groups else torch.tensor(torch.inf).double()
    assert torch.equal(lowest_kept(scores, kept), expected)


def test_chunks_change_nothing(monkeypatch):
    scores = torch.randn(33, 4, 5)
    whole = group_mask(scores, 2)
    monkeypatch.setattr(chunks, "CHUNK", 60)
    assert torch.equal(group_mask(scores, 2), whole)


def test_patterns_are_read_and_refused():
    assert GroupPattern.parse("2:4") == (2, 4)
    assert GroupPattern.parse("1:16").density == 1 / 16
    for wrong in ("4:2", "2:2", "0:4", "2/4", "two of four", 2, "1:1000"):
        with pytest.raises(ValueError, match=r"pattern must be 'N:M'.*2:4"):
            GroupPattern.parse(wrong)

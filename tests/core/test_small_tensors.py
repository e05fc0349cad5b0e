"""Small tensors joined, so that a search does not pay for each of them."""

import torch

from emp_callbacks.core import chunks
from emp_callbacks.core.threshold import ScoredPart, find_threshold

ONE = chunks.ONE_THREAD


def test_small_neighbours_are_joined_in_order_and_large_ones_are_not_copied():
    tensors = [torch.arange(n, dtype=torch.float32) for n in (0, 10, 20, ONE, 0, 5, ONE + 1)]
    joined = chunks.in_fewer(tensors)
    assert [len(each) for each in joined] == [30, ONE, 5, ONE + 1]
    assert torch.equal(torch.cat(joined), torch.cat(tensors))
    assert joined[-1] is tensors[-1]
    assert chunks.in_fewer([]) == []


def test_a_search_goes_over_many_small_layers_as_over_few_tensors(monkeypatch):
    layers = torch.randn(60, 100, generator=torch.Generator().manual_seed(0)).unbind()
    parts = [ScoredPart(layer, 100 * i) for i, layer in enumerate(layers)]
    looked_at, bits = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *args, **kw: looked_at.append(len(args[0])) or bits(*args, **kw))
    threshold = find_threshold(parts, 1000, torch.float32)
    assert looked_at[0] == 6000
    assert len(looked_at) == 3  # digits
    assert sum(int(threshold.mask(part).sum()) for part in parts) == 1000

import itertools

import pytest
import torch

from emp_callbacks.core import threshold as search
from emp_callbacks.core.chunks import accelerator_take
from emp_callbacks.core.effective_number import key_dtype
from emp_callbacks.core.threshold import ScoredPart, find_threshold

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chunk", [1, 13, 100, 1 << 18])
@pytest.mark.parametrize("cuts", [[], [400], [0, 1, 999], [10, 10, 700]])
def test_parts_and_chunks_do_not_matter(monkeypatch, chunk, cuts):
    scores = (torch.randn(1000, generator=rng(5)) * 3).round()
    keep = 333
    whole = find_threshold([ScoredPart(scores, 0)], keep, torch.float32)
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", chunk)
    edges = [0, *cuts, 1000]
    parts = [ScoredPart(scores[a:b], a) for a, b in itertools.pairwise(edges)]
    threshold = find_threshold(parts, keep, torch.float32)
    masks = torch.cat([threshold.mask(part) for part in parts])
    assert threshold == whole
    assert int(masks.sum()) == keep
    order = torch.sort(scores.abs(), descending=True, stable=True).indices[:keep]
    assert bool(masks[order].all())


SAMPLE = 64  # 512 scores are then enough to be bracketed


@pytest.fixture
def bracketed(monkeypatch):
    """Let small groups be bracketed; return how many scores each full look went over."""
    monkeypatch.setattr(search, "SAMPLE", SAMPLE)
    looked_at, look = [], search._kth_highest

    def counted(scores, *args):
        looked_at.append(sum(values.numel() for values in scores))
        return look(scores, *args)

    monkeypatch.setattr(search, "_kth_highest", counted)
    return looked_at


@pytest.mark.parametrize("chunk", [100, 1 << 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_bracketed_cases_equal_a_stable_sort(monkeypatch, bracketed, dtype, chunk):
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", chunk)
    missed = 0
    for seed in range(125):
        scores = torch.randn(600 + seed, generator=rng(seed)) ** (1 + 2 * (seed % 3))
        scores = [scores, (scores * 4).round(), scores * (torch.rand(len(scores), generator=rng(seed)) < 0.5)][
            seed % 7 % 3
        ]
        scores = scores.clamp(-6e4, 6e4).to(dtype)
        keep = int(torch.randint(1, 1 + int(torch.count_nonzero(scores)), (1,), generator=rng(seed + 1)))
        parts = [ScoredPart(part, at * 250) for at, part in enumerate(scores.split(250))]
        mask = torch.cat([find_threshold(parts, keep, key_dtype([dtype])).mask(part) for part in parts])
        assert torch.equal(mask, reference_top(scores, keep)), f"case {seed}"
        missed += bracketed[-1] == len(scores)
    assert missed < 60  # the bracket found most


def test_a_bracket_that_misses_is_noticed(monkeypatch, bracketed):
    scores = torch.randn(1000, generator=rng(1))
    monkeypatch.setattr(search, "_bracket", lambda *_: (2.0, 3.0))
    threshold = find_threshold([ScoredPart(scores, 0)], 600, torch.float32)
    assert bracketed == [1000]  # all were looked at
    assert int(threshold.mask(ScoredPart(scores, 0)).sum()) == 600


def test_where_the_bracket_is_one_value_nothing_is_taken_out(monkeypatch, bracketed):
    monkeypatch.setattr(search, "take", None)
    scores = torch.where(torch.arange(2000) % 4 == 0, 1.0, 2.0)
    mask = find_threshold([ScoredPart(scores, 0)], 750, torch.float32).mask(ScoredPart(scores, 0))
    assert torch.equal(mask, reference_top(scores, 750))
    assert max(bracketed) <= SAMPLE


def test_more_equal_scores_than_are_taken_out_are_noticed(monkeypatch, bracketed):
    monkeypatch.setattr("emp_callbacks.core.threshold.CHUNK", 10)
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", 10)
    scores = torch.ones(1000)
    scores[::3] = 2.0
    mask = find_threshold([ScoredPart(scores, 0)], 500, torch.float32).mask(ScoredPart(scores, 0))
    assert torch.equal(mask, reference_top(scores, 500))
    assert bracketed[-1] == 1000


def test_a_sample_does_not_beat_with_the_rows_of_a_matrix(bracketed):
    scores = torch.randn(64, 64, generator=rng(2))
    scores[:, ::8] *= 100  # every eighth column, and a sample of one in 64
    flat = scores.flatten()
    assert int(find_threshold([ScoredPart(flat, 0)], 2000, torch.float32).mask(ScoredPart(flat, 0)).sum()) == 2000
    assert bracketed[-1] < len(flat)


def test_an_accelerator_takes_out_the_same_without_being_waited_for(monkeypatch, bracketed):
    def take(values, chosen):
        return accelerator_take(values, chosen, most=len(values) // 2)

    scores = torch.randn(2000, generator=rng(3))
    monkeypatch.setattr(search, "DEVIATIONS", 1.0)
    monkeypatch.setattr(search, "take", take)
    mask = find_threshold([ScoredPart(scores, 0)], 700, torch.float32).mask(ScoredPart(scores, 0))
    assert torch.equal(mask, reference_top(scores, 700))
    assert bracketed[-1] == 1000  # half of all: those in the bracket, filled up with zeros
    monkeypatch.setattr(search, "take", lambda values, chosen: accelerator_take(values, chosen, most=1))
    mask = find_threshold([ScoredPart(scores, 0)], 700, torch.float32).mask(ScoredPart(scores, 0))
    assert torch.equal(mask, reference_top(scores, 700))
    assert bracketed[-1] == 2000  # it had not taken all of them


def reference_top(scores, keep):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[torch.sort(scores.abs(), descending=True, stable=True).indices[:keep]] = True
    return mask


def test_threshold_value_is_the_lowest_kept_score():
    part = ScoredPart(torch.tensor([4.0, -2.0, 3.0, 1.0]), 0)
    assert find_threshold([part], 3, torch.float32).value == 2.0
    assert find_threshold([ScoredPart(part.scores.double(), 0)], 2, torch.float64).value == 3.0


def test_mixed_dtypes_compare_exactly():
    assert key_dtype([torch.float16, torch.float32]) == torch.float32
    assert key_dtype([torch.bfloat16, torch.float64]) == torch.float64
    parts = [ScoredPart(torch.tensor([1.0, 2.0]).half(), 0), ScoredPart(torch.tensor([1.5, 3.0]), 2)]
    threshold = find_threshold(parts, 2, torch.float32)
    assert torch.cat([threshold.mask(part) for part in parts]).tolist() == [False, True, False, True]

import itertools

import pytest
import torch

from emp_callbacks.core import threshold as search
from emp_callbacks.core.chunks import accelerator_take
from emp_callbacks.core.effective_number import key_dtype
from emp_callbacks.core.threshold import ALL_TIES, Group, ScoredPart, find_threshold, find_thresholds
from tests.core.pretended_ranks import PretendedRanks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SAMPLE = 64  # 256 scores are then enough to be bracketed


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scores_like(seed, size, dtype):
    """Return scores that spread over few or many orders of magnitude, with ties, or half of them 0."""
    scores = torch.randn(size, generator=rng(seed)) ** (1 + 2 * (seed % 3))
    kinds = [scores, (scores * 4).round(), scores * (torch.rand(size, generator=rng(seed)) < 0.5)]
    return kinds[seed % 7 % 3].clamp(-6e4, 6e4).to(dtype)


def keep_of(scores, seed):
    return int(torch.randint(1, 1 + max(1, int(torch.count_nonzero(scores))), (1,), generator=rng(seed)))


def group_of(scores, keep, length=250):
    parts = [ScoredPart(part, at * length) for at, part in enumerate(scores.split(length))]
    return Group(parts, len(scores), keep)


def mask_of(threshold, group):
    return torch.cat([threshold.mask(part) for part in group.parts])


def reference_top(scores, keep):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[torch.sort(scores.abs(), descending=True, stable=True).indices[:keep]] = True
    return mask


def check(scores, keep, dtype=torch.float32):
    """Assert that the threshold of one group, beside another one, keeps what a stable sort does."""
    beside = group_of(torch.arange(1.0, 40.0).to(dtype), 7)
    one = group_of(scores, keep)
    found = find_thresholds([beside, one], dtype)
    assert torch.equal(mask_of(found[1], one), reference_top(scores, keep))
    assert found[0].value == 33.0


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
    assert torch.equal(masks, reference_top(scores, keep))


def test_no_groups_have_no_thresholds():
    assert find_thresholds([], torch.float32) == []


@pytest.fixture
def bracketed(monkeypatch):
    """Let small groups be bracketed; return how many scores of each group every full look went over."""
    monkeypatch.setattr(search, "SAMPLE", SAMPLE)
    looked_at, look = [], search._kth_highest

    def counted(scores, *args):
        looked_at.append([sum(values.numel() for values in own) for own in scores])
        return look(scores, *args)

    monkeypatch.setattr(search, "_kth_highest", counted)
    return looked_at


@pytest.mark.parametrize("chunk", [100, 1 << 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_bracketed_cases_equal_a_stable_sort(monkeypatch, bracketed, dtype, chunk):
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", chunk)
    missed = 0
    for seed in range(42):
        sizes = [600 + seed, 300 + 7 * seed, 900, 40]
        scores = [scores_like(seed + 5 * g, size, dtype) for g, size in enumerate(sizes)]
        groups = [group_of(own, keep_of(own, seed + g)) for g, own in enumerate(scores)]
        found = find_thresholds(groups, key_dtype([dtype]))
        for g, (own, group) in enumerate(zip(scores, groups, strict=True)):
            assert torch.equal(mask_of(found[g], group), reference_top(own, group.keep)), f"case {seed}, group {g}"
        missed += sum(looked == size for looked, size in zip(bracketed[-1][:3], sizes, strict=False))
        assert bracketed[-1][3] == 40  # too few to be bracketed
    assert missed < 0.2 * 3 * 42  # the brackets found most


def test_a_bracket_that_misses_is_noticed(monkeypatch, bracketed):
    scores = torch.randn(1000, generator=rng(1))
    ends = tuple(torch.tensor([2.0, 3.0]).view(torch.int32).tolist())
    monkeypatch.setattr(search, "_brackets", lambda samples, *_: [ends for _ in samples])
    check(scores, 600)
    assert bracketed == [[39, 1000]]  # all were looked at


def test_where_the_bracket_is_one_value_nothing_is_taken_out(monkeypatch, bracketed):
    monkeypatch.setattr(search, "take", None)
    scores = torch.where(torch.arange(2000) % 4 == 0, 1.0, 2.0)
    check(scores, 750)
    assert max(map(max, bracketed)) <= SAMPLE


def test_more_equal_scores_than_are_taken_out_are_noticed(monkeypatch, bracketed):
    monkeypatch.setattr("emp_callbacks.core.threshold.CHUNK", 10)
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", 10)
    scores = torch.ones(1000)
    scores[::3] = 2.0
    check(scores, 500)
    assert bracketed[-1] == [39, 1000]


def test_a_sample_does_not_beat_with_the_rows_of_a_matrix(bracketed):
    scores = torch.randn(64, 64, generator=rng(2))
    scores[:, ::8] *= 100  # every eighth column, and a sample of one in 64
    check(scores.flatten(), 2000)
    assert bracketed[-1][1] < scores.numel()


def test_an_accelerator_takes_out_the_same_without_being_waited_for(monkeypatch, bracketed):
    scores = torch.randn(2000, generator=rng(3))
    monkeypatch.setattr(search, "DEVIATIONS", 1.0)
    monkeypatch.setattr(search, "take", lambda values, chosen: accelerator_take(values, chosen, len(values) // 2))
    check(scores, 700)
    assert bracketed[-1][1] == 1000  # half of all: those in the bracket, filled up with zeros
    monkeypatch.setattr(search, "take", lambda values, chosen: accelerator_take(values, chosen, most=1))
    check(scores, 700)
    assert bracketed[-1][1] == 2000  # it had not taken all of them


def over_ranks(scores, keeps, dtype, count):
    """Return the thresholds of groups that lie in alternate pieces on some ranks, as each found them, and the sums."""
    ranks = PretendedRanks(count)

    def work(rank, all_sum):
        groups = []
        for own, keep in zip(scores, keeps, strict=True):
            pieces = list(enumerate(own.split(97)))[rank::count]
            groups.append(Group([ScoredPart(piece, 97 * at) for at, piece in pieces], len(own), keep))
        return find_thresholds(groups, dtype, all_sum)

    return ranks.run(work), ranks.sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_that_share_groups_find_what_one_finds(bracketed, dtype, count):
    for seed in range(6):
        scores = [scores_like(seed + g, size, dtype) for g, size in enumerate([800, 50, 333])]
        keeps = [keep_of(own, seed) for own in scores]
        groups = [group_of(own, keep) for own, keep in zip(scores, keeps, strict=True)]
        alone = find_thresholds(groups, key_dtype([dtype]))
        found, _ = over_ranks(scores, keeps, key_dtype([dtype]), count)
        for of_rank in found:
            assert [one.key for one in of_rank] == [one.key for one in alone]
            for one, group, own in zip(of_rank, groups, scores, strict=True):
                assert torch.equal(mask_of(one, group), reference_top(own, group.keep))


@pytest.mark.parametrize("ties", [False, True])
def test_the_number_of_sums_does_not_grow_with_the_groups(bracketed, ties):
    counts = {}
    for groups in (9, 30):
        scores = [torch.randn(400, generator=rng(g)) for g in range(groups)]
        scores = [(own * 2).round() for own in scores] if ties else scores
        _, counts[groups] = over_ranks(scores, [77] * groups, torch.float32, 2)
    assert counts[9] == counts[30] <= 12


def test_positions_may_be_given_one_by_one(bracketed):
    scores = (torch.randn(900, generator=rng(4)) * 2).round()
    at = torch.randperm(900, generator=rng(5)).sort().values[::2]
    others = torch.tensor(sorted(set(range(900)) - set(at.tolist())))
    group = Group([ScoredPart(scores[at], at), ScoredPart(scores[others], others)], 900, 333)
    (threshold,) = find_thresholds([group], torch.float32)
    mask = torch.empty(900, dtype=torch.bool)
    mask[at], mask[others] = threshold.mask(group.parts[0]), threshold.mask(group.parts[1])
    assert torch.equal(mask, reference_top(scores, 333))


def test_all_ties_are_kept_where_none_is_cut():
    assert find_threshold([ScoredPart(torch.tensor([1.0, 1.0, 2.0]), 0)], 3, torch.float32).last_tie == ALL_TIES
    assert find_threshold([ScoredPart(torch.tensor([1.0, 1.0, 2.0]), 0)], 2, torch.float32).last_tie == 0


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

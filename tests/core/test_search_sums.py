"""What a search for thresholds sums over ranks is what was said beforehand, each sum in its order."""

import pytest
import torch

from emp_callbacks.core import search_sums, threshold
from emp_callbacks.core.effective_number import key_dtype
from emp_callbacks.core.search_sums import kernel_sums, torch_sums
from emp_callbacks.core.threshold import Group, ScoredPart, find_thresholds
from tests.core.pretended_ranks import PretendedRanks

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
SIZES = {
    "small": [40],
    "many": [40] * 9,
    "large": [700],
    "large and small": [700, 40, 300],
    "many targets": [300] * 5,
}


def parts_of(scores, rank, ranks):
    """Return what one rank holds of each group."""
    held = [one.tensor_split(ranks) for one in scores]
    return [ScoredPart(own[rank], sum(len(part) for part in own[:rank])) for own in held]


def of_sizes(sizes, dtype, *, tied):
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [one.round() + 1 if tied else one for one in scores]


def are_made_of(sent, sums):
    if not sums:
        return not sent
    made = bool(sent) and sums[0].least <= sent[0] <= sums[0].most and are_made_of(sent[1:], sums[1:])
    return made or (not sums[0].certain and are_made_of(sent, sums[1:]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_torch_sums_what_was_said(monkeypatch, sizes, dtype, tied):
    monkeypatch.setattr(threshold, "SAMPLE", 64)
    scores, ranks, sent = of_sizes(sizes, dtype, tied=tied), PretendedRanks(2), []

    def work(rank, all_sum):
        def noted(value):
            if rank == 0:
                sent.append(value.nbytes)
            return all_sum(value)

        groups = [
            Group([part], size, size // 2 + 1) for part, size in zip(parts_of(scores, rank, 2), sizes, strict=True)
        ]
        return find_thresholds(groups, key_dtype([dtype]), noted)

    ranks.run(work)
    sums = [*torch_sums(sizes, dtype)]
    assert are_made_of(sent, sums)
    assert (len(sent) == len(sums)) >= tied  # all equal scores were told apart
    if tied and not any(map(threshold.is_large, sizes)):
        assert sum(sent) == sum(one.most for one in sums)


@pytest.mark.parametrize(("sizes", "dtype"), [([40], torch.bfloat16), ([700, 40], torch.float32)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU")
def test_kernels_sum_what_was_said(monkeypatch, sizes, dtype):
    pytest.importorskip("triton")
    from emp_callbacks.core.kernels import search, survey

    for module in (search, search_sums):
        monkeypatch.setattr(module, "LEAST_SAMPLE", 128)
        monkeypatch.setattr(module, "SAMPLE", 256)
    monkeypatch.setattr(survey, "BLOCK", 64)
    monkeypatch.setattr(survey, "TILE", 256)
    scores, ranks, sent = of_sizes(sizes, dtype, tied=True), PretendedRanks(2), []

    def work(rank, all_sum):
        def noted(value):
            if rank == 0:
                sent.append(value.nbytes)
            return all_sum(value)

        found = search.DeviceSearch(parts_of(scores, rank, 2), range(len(sizes)), sizes, key_dtype([dtype]), noted)
        found.look(lambda fraction: fraction)
        before = len(sent)
        return before, found.thresholds([size // 2 + 1 for size in sizes])

    before = ranks.run(work)[0][0]
    first, then = kernel_sums(sizes, dtype)
    assert sent[:before] == [one.most for one in first]
    assert are_made_of(sent[before:], then)

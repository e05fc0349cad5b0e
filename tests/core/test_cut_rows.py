"""Rows that are cut between ranks, here threads: they keep what a stable sort of the whole rows keeps."""

import pytest
import torch

from emp_callbacks.core import cut_rows, device, row_selection
from emp_callbacks.core.effective_number import score_moments
from emp_callbacks.core.row_selection import RowMatrix, find_rows
from tests.checkpoint.thread_ranks import on_ranks
from tests.core.test_row_selection import cut_up, random_case, reference

KINDS = {
    "normal": lambda scores: scores,
    "heavy": lambda scores: torch.exp(3 * scores).clamp(max=6e4),
    "coarse": lambda scores: (scores * 2).round(),
    "one-large": lambda scores: scores.clone().index_fill_(1, torch.tensor([7]), 5e4),
    "equal": torch.ones_like,
    "two-clusters": lambda scores: torch.where(scores > 0, 3e4, 1e-3) * (1 + 1e-3 * scores),
    "denormal": lambda scores: scores * 1e-39,
}


def search(cases):
    """Return the masks of some matrices, each (scores, keep), cut into three parts on three ranks, and the sums."""
    cut = [cut_up(scores) for scores, _ in cases]
    sums = []

    def on_rank(backend):
        def all_sum(value):
            if backend.rank == 0:
                sums.append(value)
            return backend.all_sum(value)

        matrices = [
            RowMatrix(
                [parts[backend.rank]], [parts[backend.rank]], keep, score_moments(scores), scores.shape[1], scores.dtype
            )
            for (scores, keep), (parts, _) in zip(cases, cut, strict=True)
        ]
        return [found.mask(m.held[0]) for found, m in zip(find_rows(matrices, all_sum), matrices, strict=True)]

    by_rank = on_ranks(3, on_rank)
    return [together([masks[i] for masks in by_rank]) for i, (_, together) in enumerate(cut)], sums


@pytest.mark.parametrize(("room", "first"), [(0, 0), (500, 80), (1 << 24, 160)])
@pytest.mark.parametrize(("at_once", "more"), [({"cpu"}, 0), (set(), 40)], ids=["host", "accelerator"])
def test_many_matrices_at_a_time_equal_a_stable_sort_of_each_row(monkeypatch, at_once, more, room, first):
    monkeypatch.setattr(device, "_AT_ONCE", at_once)
    monkeypatch.setattr(row_selection, "ROOM", room)
    for seed in (first + more, first + more + 20):  # 240 cases in all
        cases = [random_case(seed + i) for i in range(20)]
        for (scores, keep), mask in zip(cases, search(cases)[0], strict=True):
            assert torch.equal(mask, reference(scores, keep))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_do_not_grow_with_matrices_and_stay_few_for_any_scores(dtype):
    torch.manual_seed(0)
    cases = [(make(torch.randn(9, 700)).to(dtype), torch.randint(1, 700, (9,))) for make in KINDS.values()]
    masks, sums = search(cases)
    for (scores, keep), mask in zip(cases, masks, strict=True):
        assert torch.equal(mask, reference(scores, keep))
    longest = max(len(search([case])[1]) for case in cases)
    assert longest <= len(sums) <= 40


def test_no_more_is_copied_than_a_piece(monkeypatch):
    sizes = []
    held = cut_rows.CutRows._held

    def watched(*arguments):
        for part, rows in held(*arguments):
            sizes.append(part.scores.numel())
            yield part, rows

    monkeypatch.setattr(row_selection, "ROOM", 0)
    monkeypatch.setattr(cut_rows, "chunk_length", lambda _: 2000)
    monkeypatch.setattr(cut_rows.CutRows, "_held", watched)
    search([(torch.randn(300, 50), torch.full((300,), 20))])
    assert 0 < max(sizes) <= 2000

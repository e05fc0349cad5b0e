import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emp_callbacks.core.effective_number import key_dtype, score_moments
from emp_callbacks.core.streamed_threshold import StreamedScores
from emp_callbacks.core.threshold import ScoredPart, find_threshold

NARROW = [torch.float16, torch.bfloat16, torch.float32]


class Remade:
    """Makes the tensors anew at each look, counts how many it made, and fails where one before is still held."""

    def __init__(self, tensors):
        self.tensors, self.made, self._last = tensors, 0, lambda: None

    def __iter__(self):
        for values in self.tensors:
            assert self._last() is None, "a tensor was held while the next was made"
            yield self._new(values)

    def _new(self, values):
        self.made += 1
        made = values.clone()
        self._last = weakref.ref(made)
        return made


@st.composite
def groups(draw):
    """Draw tensors of several dtypes and sizes with ties and zeros, at least one score not 0."""
    dtypes = draw(st.sampled_from([[torch.bfloat16], [torch.float16], NARROW, [*NARROW, torch.float64]]))
    few = st.sampled_from([0.0, 0.5, -0.5, 1.0, 3.0])
    spread = st.floats(-6e4, 6e4, allow_subnormal=True)
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    tensors = [
        torch.tensor(draw(st.lists(draw(st.sampled_from([few, spread])), min_size=n, max_size=n))).to(
            draw(st.sampled_from(dtypes))
        )
        for n in sizes
    ]
    return [*tensors, torch.tensor([[2.0]], dtype=dtypes[0])]


@given(groups(), st.floats(0, 1))
def test_the_threshold_is_that_of_all_scores_at_once(tensors, share):
    dtype = key_dtype([values.dtype for values in tensors])
    group = StreamedScores(Remade(tensors), dtype)
    parts, start = [], 0
    for values in tensors:
        parts.append(ScoredPart(values.reshape(-1), start))
        start += values.numel()
    nonzero = int(group.moments.sum().nonzero)
    for keep in {1, max(1, round(share * nonzero)), nonzero}:
        expected = find_threshold(parts, keep, dtype)
        found = group.threshold(keep)
        assert found == expected
        assert sum(int(found.mask(part).sum()) for part in parts) == keep


def test_moments_are_those_of_each_tensor():
    tensors = [torch.randn(5, 7).half(), torch.zeros(0), torch.randn(3)]
    found = StreamedScores(Remade(tensors), torch.float32).moments
    expected = torch.cat([score_moments(values.reshape(-1)[None]).stack() for values in tensors])
    assert torch.equal(found.stack(), expected)


@pytest.mark.parametrize(
    ("dtype", "looks"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 2), (torch.float64, 4)]
)
def test_few_looks_suffice(dtype, looks):
    torch.manual_seed(0)
    scores = Remade([torch.arange(1.0, 101).to(dtype), torch.arange(101.0, 201).to(dtype)])
    group = StreamedScores(scores, key_dtype([dtype]))
    assert group.threshold(50).value == 151.0
    assert scores.made == 2 * looks
    ties = Remade([torch.ones(3, dtype=dtype), torch.ones(4, dtype=dtype), torch.ones(5, dtype=dtype)])
    assert StreamedScores(ties, key_dtype([dtype])).threshold(5).last_tie == 4
    assert ties.made == 3 * looks + 2  # the last of them lies in the second tensor


def test_not_a_number_shows_in_the_moments():
    tensors = [torch.ones(2), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])]
    assert StreamedScores(tensors, torch.float32).moments.total.isfinite().tolist() == [True, False, False]


def test_what_yields_once_is_refused():
    with pytest.raises(TypeError, match="list_iterator yields them once"):
        StreamedScores(iter([torch.ones(2)]), torch.float32)


def test_wide_scores_are_not_compared_as_narrow_ones():
    with pytest.raises(TypeError, match=r"float64 cannot be compared as torch\.float32"):
        StreamedScores([torch.ones(2, dtype=torch.float64)], torch.float32)


@pytest.mark.parametrize(("dtype", "changed"), [(torch.bfloat16, 8), (torch.float32, 8), (torch.float32, 4)])
def test_scores_that_change_between_looks_are_noticed(dtype, changed):
    scores = [torch.ones(8, dtype=dtype)]
    group = StreamedScores(scores, torch.float32)
    scores[0][:changed] = 2.0
    with pytest.raises(RuntimeError, match="not the same at each look"):
        group.threshold(3)

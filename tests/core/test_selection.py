import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emp_callbacks import effective_number, emp_mask, keep_count, preserved_mass
from tests.core.reference import reference_mask

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("kind", ["normal", "few-values", "mostly-zero", "one-hot", "denormal", "negative-zero"])
def test_equals_a_stable_sort(dtype, beta, kind):
    normal = torch.randn(2000, generator=rng(3))
    scores = {
        "normal": normal,
        "few-values": (normal * 2).round(),
        "mostly-zero": normal * (torch.rand(2000, generator=rng(4)) < 0.02),
        "one-hot": torch.eye(1, 2000)[0],
        "denormal": normal * 1e-40,
        "negative-zero": torch.where(normal > 0, normal, torch.tensor(-0.0)),
    }[kind].to(dtype)
    mask = emp_mask(scores, beta)
    assert torch.equal(mask, reference_mask(scores, beta))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, -1.0, 3.0]), min_size=1, max_size=40),
    st.sampled_from([0.3, 0.5, 1.0, 1.5]),
)
def test_equals_a_stable_sort_on_random_ties(values, beta):
    scores = torch.tensor(values)
    assert torch.equal(emp_mask(scores, beta), reference_mask(scores, beta))


def test_a_million_scores_with_heavy_ties_keep_exactly_nu():
    scores = torch.randn(1_000_000, generator=rng()).half()  # about 20,000 distinct values
    mask = emp_mask(scores)
    nu = keep_count(effective_number(scores), scores.numel())
    threshold = scores[mask].abs().min()
    at_threshold = (scores.abs() == threshold).nonzero().flatten()
    kept_ties = mask[at_threshold]
    assert int(mask.sum()) == nu
    assert not bool(mask[scores.abs() < threshold].any())
    assert 0 < int(kept_ties.sum()) < len(kept_ties)  # the case has a tie to break ...
    assert bool(kept_ties[: int(kept_ties.sum())].all())  # ... and lowest index wins


@pytest.mark.parametrize("dtype", DTYPES)
def test_corner_cases(dtype):
    assert emp_mask(torch.tensor([0.5], dtype=dtype)).tolist() == [True]
    assert emp_mask(torch.tensor(0.5, dtype=dtype)).item() is True
    assert emp_mask(torch.full((9,), 0.3, dtype=dtype)).all()
    assert emp_mask(torch.zeros(5, dtype=dtype)).all(), "no information: keep everything"
    zeros_to_fill = emp_mask(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype), beta=2.0)
    assert zeros_to_fill.tolist() == [True, True, False, False], "zeros never fill a quota"


def test_keeps_shape_layout_and_input():
    scores = torch.randn(4, 3, 5, 5, generator=rng()).to(memory_format=torch.channels_last)
    before = scores.clone()
    assert torch.equal(emp_mask(scores), reference_mask(scores))
    assert torch.equal(scores, before)
    assert torch.equal(emp_mask(scores.requires_grad_()), reference_mask(scores))


def test_values_that_float32_cannot_tell_apart():
    scores = 1.0 + torch.arange(8, dtype=torch.float64) * 1e-12
    assert emp_mask(scores, beta=0.5).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_scores_are_refused(bad):
    with pytest.raises(FloatingPointError, match="1 NaN or Inf of 3"):
        emp_mask(torch.tensor([1.0, bad, 2.0]))


def test_bad_beta_is_refused():
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got -1"):
        emp_mask(torch.ones(3), beta=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preserved_mass(dtype):
    scores = torch.tensor([3.0, -1.0, 4.0], dtype=dtype)
    assert preserved_mass(scores, torch.tensor([True, False, True])) == 7 / 8
    assert preserved_mass(scores, torch.ones(3, dtype=torch.bool)) == 1.0
    assert preserved_mass(torch.zeros(2, dtype=dtype), torch.tensor([True, False])) == 1.0


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [(torch.ones(2), TypeError, "mask must be bool"), (torch.ones(3, dtype=torch.bool), ValueError, "shape")],
)
def test_preserved_mass_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        preserved_mass(torch.ones(2), mask)

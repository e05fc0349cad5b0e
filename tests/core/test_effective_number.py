import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emp_callbacks import effective_number, keep_count
from emp_callbacks.core import effective_number as module
from emp_callbacks.core.effective_number import ScoreMoments, effective_numbers, keep_counts, score_moments

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([5.0, 0.0, 0.0], 1.0, id="one-score-holds-all"),
        pytest.param([3.0, 1.0], 1.6, id="16-over-10"),
        pytest.param([-3.0, 1.0], 1.6, id="sign-does-not-matter"),
        pytest.param([2.0] * 7, 7.0, id="all-equal"),
        pytest.param([0.0, 0.0], 0.0, id="all-zero"),
        pytest.param([4.0], 1.0, id="single"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_known_values(scores, expected, dtype):
    assert effective_number(torch.tensor(scores, dtype=dtype)) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=50), st.floats(1e-3, 1e3))
def test_ignores_scale_and_stays_within_bounds(values, factor):
    scores = torch.tensor(values, dtype=torch.float64)
    n_eff = effective_number(scores)
    assert 1 - 1e-9 <= n_eff <= len(values) * (1 + 1e-9)
    assert effective_number(scores * factor) == pytest.approx(n_eff, rel=1e-9)


@pytest.mark.parametrize("value", [1e-300, 5e-324, 1e-200, 1e200, 1.7e308])
def test_float64_squares_neither_vanish_nor_overflow(value):
    assert effective_number(torch.full((10,), value, dtype=torch.float64)) == pytest.approx(10.0)


def test_half_precision_sums_are_taken_in_float64():
    # In float16 a running sum of 4096 ones stops at 2048, and 300^2 is Inf.
    assert effective_number(torch.full((100_000,), 300.0, dtype=torch.float16)) == pytest.approx(100_000, rel=1e-12)


@pytest.mark.parametrize("n", [10, 49, 100, 1000, 12345, 1_000_000])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e-30])
def test_equal_scores_keep_every_one(n, value):
    assert keep_count(effective_number(torch.full((n,), value)), n) == n


def test_without_the_slack_the_floor_drops_one(monkeypatch):
    monkeypatch.setattr(module, "FLOOR_SLACK", 0.0)
    assert keep_count(effective_number(torch.full((1000,), 0.1)), 1000) == 999


@pytest.mark.parametrize(
    ("n_eff", "size", "beta", "expected"),
    [(6.9, 10, 1.0, 6), (6.9, 10, 2.0, 10), (6.9, 10, 0.5, 3), (1.0, 10, 0.1, 1), (0.0, 10, 1.0, 10), (1.0, 1, 1.0, 1)],
)
def test_keep_count(n_eff, size, beta, expected):
    assert keep_count(n_eff, size, beta) == expected


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, True, "1"])
def test_bad_beta_is_named(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        keep_count(2.0, 4, beta)


@pytest.mark.parametrize(("n_eff", "size"), [(5.0, 4), (-1.0, 4), (math.nan, 4), (1.0, 0)])
def test_keep_count_refuses_impossible_numbers(n_eff, size):
    with pytest.raises(ValueError, match=r"size|n_eff"):
        keep_count(n_eff, size)


def test_keep_counts_least_and_limit():
    counts = keep_counts(torch.tensor([2.5, 2.5, 2.5]).double(), torch.tensor([10, 3, 1]), 1.0, least=4)
    assert counts.tolist() == [4, 3, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_scores_are_counted_in_the_error(bad, dtype):
    with pytest.raises(FloatingPointError, match="2 NaN or Inf of 4"):
        effective_number(torch.tensor([1.0, bad, 2.0, bad], dtype=dtype))


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        (torch.tensor([]), ValueError),
        (torch.tensor([1, 2]), TypeError),
        (torch.tensor([1j]), TypeError),
        ([1.0, 2.0], TypeError),
    ],
)
def test_bad_scores(scores, error):
    with pytest.raises(error, match="scores"):
        effective_number(scores)


def test_moments_of_parts_add_up_to_the_whole():
    scores = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    whole = effective_numbers(score_moments(scores))
    parts = score_moments(scores[:, :317]).stack() + score_moments(scores[:, 317:]).stack()
    torch.testing.assert_close(effective_numbers(ScoreMoments.unstack(parts)), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("shape", [(1, 1000), (50, 20), (3, 0), (0, 5)])
def test_chunk_size_does_not_matter(monkeypatch, chunk, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([scores.double().abs().sum(1), scores.double().square().sum(1)], 1)
    monkeypatch.setattr("emp_callbacks.core.chunks.CHUNK", chunk)
    if shape[0]:
        torch.testing.assert_close(score_moments(scores).stack()[:, :2], expected)

"""The hard concrete distribution: values, gradients and probabilities by hand, and by drawing."""

import math

import pytest
import torch

from emp_callbacks.core.hard_concrete import (
    MOST_CERTAIN,
    OPEN,
    binary_entropy,
    hard_concrete,
    log_alpha_of,
    open_probability,
    proportional_probabilities,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_gates_and_gradients_of_three_heads_by_hand():
    log_alpha = torch.tensor([0.3, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.6, 0.5, 0.5], dtype=torch.float64)
    gate = hard_concrete(log_alpha, uniform)
    s = sigmoid((0.3 + math.log(0.6 / 0.4)) / 0.33)
    assert gate.tolist() == pytest.approx([1.2 * s - 0.1, 1.0, 0.0])
    (gate * torch.tensor([2.0, 5.0, 7.0])).sum().backward()
    # of a gate that was cut off at 0 or 1 there is none
    assert log_alpha.grad.tolist() == pytest.approx([2.0 * 1.2 * s * (1 - s) / 0.33, 0.0, 0.0])


def test_the_gradient_is_the_limit_of_differences():
    log_alpha = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.45, 0.55, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: hard_concrete(a, uniform), (log_alpha,))


def test_a_gate_is_open_as_often_as_its_probability_says():
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.tensor([-2.0, 0.0, 1.5]).expand(20_000, 3)
    gates = hard_concrete(log_alpha, torch.rand(20_000, 3, generator=generator))
    expected = open_probability(log_alpha[0])
    assert (gates > 0).double().mean(0).tolist() == pytest.approx(expected.tolist(), abs=0.01)
    assert bool((gates == 0).any()), "some are exactly closed"
    assert bool((gates == 1).any()), "some are exactly open"


def test_log_alpha_and_probability_are_inverse():
    probability = torch.tensor([0.01, 0.5, 0.97], dtype=torch.float64)
    torch.testing.assert_close(open_probability(log_alpha_of(probability)), probability)
    assert float(open_probability(torch.tensor(OPEN))) == pytest.approx(0.952, abs=1e-3)


def test_entropy_is_in_bits():
    found = binary_entropy(torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.0, 1.0, 0.0, 0.811278], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_proportional_where_they_are_not_cut_off_and_sum_to_what_is_expected(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(48, generator=generator) ** (1 + seed)
    n_eff = float(scores.sum() ** 2 / scores.square().sum())
    found = proportional_probabilities(scores, n_eff)
    assert float(found.sum()) == pytest.approx(n_eff, abs=1e-3)
    inside = (found > 1 - MOST_CERTAIN + 1e-9) & (found < MOST_CERTAIN - 1e-9)
    ratio = found[inside] / scores[inside]
    assert int(inside.sum()) > 10
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scores", [torch.zeros(6), torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.full((6,), 1e-30)])
@pytest.mark.parametrize("expected", [1.0, 3.0, 5.5])
def test_scores_that_say_little_give_the_expected_number_too(scores, expected):
    assert float(proportional_probabilities(scores, expected).sum()) == pytest.approx(expected, abs=1e-3)


def test_no_gate_begins_more_certain_than_it_can_learn_from():
    found = proportional_probabilities(torch.ones(10), 10.0)
    assert found.tolist() == pytest.approx([MOST_CERTAIN] * 10)

import pytest
import torch

from emp_callbacks.criteria import CRITERIA, Magnitude, Random


def test_magnitude_is_the_weight_itself():
    weight = torch.tensor([[1.0, -2.0]])
    assert Magnitude().score("w", weight) is weight, "EMP takes |.|; a copy would double the memory"


def test_random_scores_are_fixed_by_seed_and_name_only():
    weight = torch.zeros(4, 5)
    scores = Random(seed=1).score("a", weight)
    torch.manual_seed(123)
    assert torch.equal(scores, Random(seed=1).score("a", torch.ones(4, 5)))
    assert not torch.equal(scores, Random(seed=1).score("b", weight))
    assert not torch.equal(scores, Random(seed=2).score("a", weight))
    assert bool((scores > 0).all())
    assert bool((scores <= 1).all())


def test_random_scores_follow_the_run_seed():
    torch.manual_seed(7)
    one = Random().score("a", torch.zeros(3))
    torch.rand(5)
    assert torch.equal(one, Random().score("a", torch.zeros(3)))
    torch.manual_seed(8)
    assert not torch.equal(one, Random().score("a", torch.zeros(3)))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_leaves_the_weights_alone(name):
    weight = torch.randn(3, 4)
    before = weight.clone()
    CRITERIA[name]().score("w", weight)
    assert torch.equal(weight, before)

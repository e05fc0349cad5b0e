import pytest
import torch

from emp_callbacks.criteria import CRITERIA, Magnitude, Random
from emp_callbacks.segment import Segment


def segment(values: torch.Tensor, name: str = "w", **changes) -> Segment:
    whole = {"shape": values.shape, "positions": 0, "replicated": True, "counted": slice(0, values.numel())}
    return Segment(name=name, output_dim=0, owner=values, view=lambda t: t, **(whole | changes))


def test_magnitude_is_the_weight_itself():
    weight = torch.tensor([[1.0, -2.0]])
    score = Magnitude().score(segment(weight))
    assert score.data_ptr() == weight.data_ptr(), "EMP takes |.|; a copy would double the memory"


def test_random_scores_are_fixed_by_seed_and_name_only():
    weight = torch.zeros(4, 5)
    scores = Random(seed=1).score(segment(weight, "a"))
    torch.manual_seed(123)
    assert torch.equal(scores, Random(seed=1).score(segment(torch.ones(4, 5), "a")))
    assert not torch.equal(scores, Random(seed=1).score(segment(weight, "b")))
    assert not torch.equal(scores, Random(seed=2).score(segment(weight, "a")))
    assert bool((scores > 0).all())
    assert bool((scores <= 1).all())


def test_random_scores_of_a_shard_are_those_of_the_full_parameter():
    full = Random(seed=1).score(segment(torch.zeros(4, 5))).flatten()
    shard = segment(torch.zeros(7), shape=torch.Size([4, 5]), positions=6)
    assert torch.equal(Random(seed=1).score(shard), full[6:13])
    scattered = torch.tensor([0, 3, 19])
    shard = segment(torch.zeros(3), shape=torch.Size([4, 5]), positions=scattered)
    assert torch.equal(Random(seed=1).score(shard), full[scattered])


def test_random_scores_follow_the_run_seed():
    torch.manual_seed(7)
    one = Random().score(segment(torch.zeros(3)))
    torch.rand(5)
    assert torch.equal(one, Random().score(segment(torch.zeros(3))))
    torch.manual_seed(8)
    assert not torch.equal(one, Random().score(segment(torch.zeros(3))))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_leaves_the_weights_alone(name):
    weight = torch.randn(3, 4)
    before = weight.clone()
    CRITERIA[name]().score(segment(weight))
    assert torch.equal(weight, before)

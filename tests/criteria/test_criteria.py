import pytest
import torch

from emp_callbacks import EMPPruner
from emp_callbacks.criteria import CRITERIA, DEFAULT_CRITERIA, Criterion, fitting_criteria, make_criterion
from emp_callbacks.criteria.magnitude import Magnitude
from emp_callbacks.criteria.random import Random
from emp_callbacks.layer import WeightLayer
from emp_callbacks.layer.segment import Segment


class OneRank:
    rank, world_size = 0, 1

    def all_sum(self, value):
        return value


def layer(values: torch.Tensor, name: str = "w", **changes) -> Segment:
    whole = {"shape": values.shape, "positions": 0, "replicated": True, "counted": slice(0, values.numel())}
    one = Segment(name=name, output_dim=0, owner=values, view=lambda t: t, **(whole | changes))
    return WeightLayer(one, OneRank())


def test_magnitude_is_the_weight_itself():
    weight = torch.tensor([[1.0, -2.0]])
    score = Magnitude().score(layer(weight))
    assert score.data_ptr() == weight.data_ptr(), "EMP takes |.|; a copy would double the memory"


def test_random_scores_are_fixed_by_seed_and_name_only():
    weight = torch.zeros(4, 5)
    scores = Random(seed=1).score(layer(weight, "a"))
    torch.manual_seed(123)
    assert torch.equal(scores, Random(seed=1).score(layer(torch.ones(4, 5), "a")))
    assert not torch.equal(scores, Random(seed=1).score(layer(weight, "b")))
    assert not torch.equal(scores, Random(seed=2).score(layer(weight, "a")))
    assert bool((scores > 0).all())
    assert bool((scores <= 1).all())


def test_random_scores_of_a_shard_are_those_of_the_full_parameter():
    full = Random(seed=1).score(layer(torch.zeros(4, 5))).flatten()
    shard = layer(torch.zeros(7), shape=torch.Size([4, 5]), positions=6)
    assert torch.equal(Random(seed=1).score(shard), full[6:13])
    scattered = torch.tensor([0, 3, 19])
    shard = layer(torch.zeros(3), shape=torch.Size([4, 5]), positions=scattered)
    assert torch.equal(Random(seed=1).score(shard), full[scattered])


def test_random_scores_follow_the_run_seed():
    torch.manual_seed(7)
    one = Random().score(layer(torch.zeros(3)))
    torch.rand(5)
    assert torch.equal(one, Random().score(layer(torch.zeros(3))))
    torch.manual_seed(8)
    assert not torch.equal(one, Random().score(layer(torch.zeros(3))))


@pytest.mark.parametrize("target", DEFAULT_CRITERIA)
def test_a_criterion_that_does_not_fit_names_those_that_do(target):
    fitting = fitting_criteria(target)
    assert DEFAULT_CRITERIA[target] in fitting
    for name in CRITERIA:
        if name in fitting:
            assert isinstance(make_criterion(name, target), CRITERIA[name])
        else:
            with pytest.raises(ValueError, match=f"'{name}' does not fit target '{target}'.*{fitting[0]}"):
                make_criterion(name, target)


def test_a_function_or_its_import_path_is_a_criterion():
    def mine(layer):
        return layer.weight.square()

    weight = torch.tensor([[1.0, -2.0]])
    assert torch.equal(make_criterion(mine, "weights").score(layer(weight)), weight.square())
    assert isinstance(make_criterion("math.sqrt", "heads"), Criterion)
    with pytest.raises(ValueError, match=r"'nowhere\.at\.all' cannot be imported"):
        make_criterion("nowhere.at.all", "weights")
    with pytest.raises(TypeError, match="a name or a function, got int"):
        make_criterion(3, "weights")
    with pytest.raises(ValueError, match=r"returned \(2,\) of torch.float32 for 'w'; .* shape \(1, 2\)"):
        make_criterion(lambda _: torch.ones(2), "weights").score(layer(weight))


def test_a_class_in_place_of_a_criterion_is_told():
    with pytest.raises(TypeError, match=r"criterion is the class Magnitude: give an instance, Magnitude\(\)"):
        make_criterion(Magnitude, "weights")


def test_a_criterion_of_weights_on_units_is_told():
    pruner = EMPPruner(
        torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), target="neurons", criterion=square
    )
    with pytest.raises(ValueError, match=r"reads layer.weight, and '0' is pruned by units: .*layer.unit_sums"):
        pruner.refresh()


def test_a_criterion_that_divides_by_zero_is_told():
    model = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(model.weight)
    pruner = EMPPruner(model, criterion=lambda layer: layer.weight / layer.weight.abs().sum())
    with pytest.raises(
        FloatingPointError, match=r"in the scores of 'weight' .*; or a criterion of your own divides by 0"
    ):
        pruner.refresh()


def square(layer):
    return layer.weight.square()

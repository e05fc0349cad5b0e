"""Several pruners of one weight: kept is what all keep, over one store of dense values."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from emp_callbacks import EMPPruner

pytestmark = pytest.mark.usefixtures("either_path")


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def step(net, optimizer, *pruners):
    optimizer.zero_grad()
    net(torch.randn(8, 6, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    return [pruner.step() for pruner in pruners]


PAIRS = [({"target": "neurons", "density": 0.5}, {}), ({"exclude": ["2.weight"]}, {}), ({}, {"scope": "tensor"})]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("pair", PAIRS)
def test_no_dense_value_is_lost_and_feedback_does_not_compound(pair, order):
    net = net_of()
    dense = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruners = [EMPPruner(net, optimizer, every_n_steps=1, **settings) for settings in pair[::order]]
    alone = [
        EMPPruner(net_of(), density=s.get("density"), **{k: v for k, v in s.items() if k != "density"}) for s in pair
    ]
    for pruner in alone:
        pruner.refresh()
    for _ in range(4):
        step(net, optimizer, *pruners)
    for pruner, single in zip(pruners[::order], alone, strict=True):
        assert all(torch.equal(pruner.masks[name], mask) for name, mask in single.masks.items()), "as if it were alone"
    both = torch.ones(16, 6, dtype=torch.bool)
    for pruner in pruners:
        both &= pruner.weight_masks["0.weight"]
    assert torch.equal(net[0].weight, dense["0.weight"] * both)
    for pruner in pruners:
        with pruner.dense_weights():
            assert torch.equal(net[0].weight, dense["0.weight"])
        assert pruner.audit().clean


@pytest.mark.parametrize("order", [1, -1])
def test_both_resume_bit_for_bit(order):
    def begin():
        net = net_of()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return net, optimizer, [EMPPruner(net, optimizer, every_n_steps=2, **settings) for settings in PAIRS[0]]

    net, optimizer, pruners = begin()
    for _ in range(3):
        step(net, optimizer, *pruners)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), [p.state_dict() for p in pruners]])
    for _ in range(3):
        step(net, optimizer, *pruners)
    other, second, again = begin()
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for pruner, state in [*zip(again, saved[2], strict=True)][::order]:
        pruner.load_state_dict(state)
    for _ in range(3):
        step(other, second, *again)
    for a, b in zip(pruners, again, strict=True):
        with a.dense_weights(), b.dense_weights():
            assert all(torch.equal(x, y) for x, y in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["project", "freeze"])
def test_the_compounding_modes_compose_too(mode):
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruners = [EMPPruner(net, optimizer, every_n_steps=1, mode=mode, **settings) for settings in PAIRS[0]]
    for _ in range(2):
        step(net, optimizer, *pruners)
    for pruner in pruners:
        assert bool((net[0].weight[~pruner.weight_masks["0.weight"]] == 0).all())


def test_two_modes_on_one_weight_are_refused_by_name():
    net = net_of()
    first = EMPPruner(net, mode="freeze", include=["0.weight"])
    with pytest.raises(ValueError, match=r"'0.weight' is pruned already by another EMP pruner in mode 'freeze'"):
        EMPPruner(net, mode="feedback")
    EMPPruner(net, mode="feedback", include=["2.weight"]).finalize()
    first.finalize()
    EMPPruner(net, mode="feedback")


def test_a_cell_that_is_run_twice_is_said_and_loses_nothing():
    net = net_of()
    dense = net[0].weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    first = EMPPruner(net, optimizer, every_n_steps=1)
    step(net, optimizer, first)
    with pytest.warns(UserWarning, match=r"another EMP pruner is at work on the same weights.*finalize"):
        second = EMPPruner(net, optimizer, every_n_steps=1)
    step(net, optimizer, second)
    with second.dense_weights():
        assert torch.equal(net[0].weight, dense)
    assert first.trajectory[-1].n_eff == second.trajectory[-1].n_eff


def test_one_that_is_through_stays_in_force_until_all_are():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    units, weights = (EMPPruner(net, optimizer, **settings) for settings in PAIRS[0])
    units.refresh()
    weights.refresh()
    units.finalize()
    step(net, optimizer, weights)
    assert bool((net[0].weight[~units.weight_masks["0.weight"]] == 0).all())
    weights.finalize()
    zeros = int((net[0].weight == 0).sum())
    step(net, optimizer)
    assert int((net[0].weight == 0).sum()) < zeros, "the model is the user's again"


def test_what_torch_pruned_is_refused_by_name():
    net = net_of()
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"'0.weight' is pruned by torch.nn.utils.prune: make that final with prune.remove"
    ):
        EMPPruner(net)
    EMPPruner(net, exclude=["0.*"]).finalize()
    prune.remove(net[0], "weight")
    EMPPruner(net)


def test_what_torch_prunes_later_is_said():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    step(net, optimizer, pruner)
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.warns(UserWarning, match=r"EMP does not follow: '0.weight' is pruned by torch.nn.utils.prune"):
        step(net, optimizer, pruner)
    kept = pruner.masks["0.weight"] & (net[0].weight_mask != 0)
    net(torch.randn(2, 6))
    assert torch.equal(net[0].weight != 0, kept), "both masks hold"

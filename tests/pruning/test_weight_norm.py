"""Under a weight norm the effective weight is 0 where the mask says so, and never 0 / 0."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner

NORMS = {"old": nn.utils.weight_norm, "new": nn.utils.parametrizations.weight_norm}
DIRECTION = {"old": "weight_v", "new": "parametrizations.weight.original1"}


def model(kind, **settings):
    torch.manual_seed(0)
    layers = [NORMS[kind](nn.Conv1d(4, 6, 3), **settings), nn.Flatten(), nn.Linear(6 * 6, 3)]
    return nn.Sequential(*layers)


X = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_the_effective_weight_is_zero_where_the_mask_says(kind, scope):
    net = model(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, scope=scope, density=0.02, every_n_steps=1)
    for _ in range(3):
        net(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    mask = pruner.masks[f"0.{DIRECTION[kind]}"]
    assert mask.flatten(1).any(1).all(), "an output without direction would be NaN"
    net(X)
    assert not net[0].weight[~mask].any()
    assert torch.isfinite(net(X)).all()
    assert pruner.audit().clean
    last = [event for event in pruner.trajectory if event.step == 3]
    assert sum(int(kept.sum()) for kept in pruner.masks.values()) == sum(event.keep for event in last)


@pytest.mark.parametrize("kind", NORMS)
def test_scores_are_those_of_the_effective_weight(kind):
    net = model(kind)
    with torch.no_grad():
        net[0].get_parameter(DIRECTION[kind])[2] *= 100  # which changes nothing
    net(X)
    effective = net[0].weight.detach().double().abs().clone()
    (event,) = EMPPruner(net, include=[f"0.{DIRECTION[kind]}"], scope="tensor").refresh()
    assert event.n_eff == pytest.approx(float(effective.sum().square() / effective.square().sum()), rel=1e-6)


def test_a_norm_along_another_dimension_keeps_a_weight_of_each_of_its_slices():
    net = model("new", dim=2)
    pruner = EMPPruner(net, include=["0.*original1"], density=0.01, mode="project")
    pruner.refresh()
    (mask,) = pruner.masks.values()
    assert mask.any(0).any(0).all()
    assert mask.sum() == 3
    assert torch.isfinite(net(X)).all()
    with pytest.raises(ValueError, match="has no norm for each output, as this scope needs"):
        EMPPruner(model("new", dim=2), include=["0.*original1"], scope="row")


def test_rewiring_is_refused():
    with pytest.raises(ValueError, match=r"is not for mode='rewire': exclude it, or take the norm off"):
        EMPPruner(model("new"), mode="rewire", density=0.5)

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from emp_callbacks import EMPPruner
from emp_callbacks.core import bounds
from emp_callbacks.cost.pruning_cost import LOSS_BOUNDS, masked_parameters, prune_and_measure


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(3)]
    return net, lambda: (functional.cross_entropy(net(images), labels) for images, labels in batches)


def test_what_pruning_costs_is_what_the_loss_says(problem):
    net, losses = problem
    dense = {name: p.detach().clone() for name, p in net.named_parameters()}
    before = sum(loss.item() for loss in losses()) / 3
    pruner = EMPPruner(net, mode="project", beta=1.0)
    cost = prune_and_measure(pruner, net, losses, probes=64)
    masks = pruner.weight_masks
    assert cost.loss_before == pytest.approx(before)
    assert cost.loss_after == pytest.approx(sum(loss.item() for loss in losses()) / 3)
    assert (cost.n, cost.keep) == (42, sum(int(mask.sum()) for mask in masks.values()))
    removed = torch.cat([dense[name][~mask] for name, mask in masks.items()])
    every = torch.cat([dense[name].reshape(-1) for name in masks]).abs()
    assert cost.distance_sq == pytest.approx(float(removed.square().sum()))
    assert cost.l1_norm == pytest.approx(float(every.sum()))
    assert cost.n_eff == pytest.approx(float(every.sum() ** 2 / every.square().sum()))
    for name, mask in masks.items():  # the model is left masked
        assert torch.equal(dict(net.named_parameters())[name].detach(), dense[name] * mask)
    assert cost.quadratic == pytest.approx(cost.first_order + cost.second_order / 2)
    # Gradient and curvature are those of the dense weights, along what was taken away.
    for parameter, value in zip(net.parameters(), dense.values(), strict=True):
        parameter.data.copy_(value)
        parameter.grad = None
    (sum(losses()) / 3).backward()
    slope = -sum(
        float((p.grad * p)[~masks[name]].sum().detach()) for name, p in net.named_parameters() if name in masks
    )
    assert cost.first_order == pytest.approx(slope, rel=1e-6)
    mean_curvature = cost.trace.mean / 42
    assert cost.alignment == pytest.approx(cost.second_order / cost.distance_sq / mean_curvature)


def test_each_bound_is_its_formula(problem):
    net, losses = problem
    cost = prune_and_measure(EMPPruner(net, mode="project"), net, losses)
    trace = cost.trace.mean
    assert trace > 0
    found = cost.bounds()
    assert list(found) == list(LOSS_BOUNDS)
    assert found["distance"] == bounds.distance_loss_bound(trace, cost.distance_sq, cost.keep, cost.n)
    assert found["curvature"] == trace * cost.distance_sq / 2
    assert found["asymptotic"] == bounds.asymptotic_loss_bound(trace, cost.l1_norm, cost.keep, cost.n)
    assert found["inverse_trace"] == pytest.approx(found["asymptotic"] / trace**2)
    assert found["norm"] >= found["distance"]
    assert cost.bounds(trace=2 * trace)["distance"] == pytest.approx(2 * found["distance"])
    assert set(cost.bounds(trace=-1.0).values()) == {None}


def test_a_trace_that_is_known_is_not_taken_again(problem, monkeypatch):
    net, losses = problem
    first = prune_and_measure(EMPPruner(net, mode="project"), net, losses, probes=2)
    monkeypatch.setattr("emp_callbacks.cost.pruning_cost.hessian_trace", None)
    again = prune_and_measure(EMPPruner(net, mode="project", beta=0.5), net, losses, trace=first.trace)
    assert again.trace is first.trace
    assert again.keep < first.keep


def test_a_quadratic_loss_never_exceeds_what_curvature_allows():
    """At the minimum of a quadratic the curvature bound is a theorem; the lemma's form is not one."""
    torch.manual_seed(0)
    broken = 0
    for trial in range(30):
        layer = nn.Linear(20, 1, bias=False).double()
        basis = torch.randn(20, 20, dtype=torch.float64) * (
            torch.arange(20, dtype=torch.float64) ** (-trial / 10)
        ).clamp(max=1)
        minimum = layer.weight.detach().clone()

        def losses(layer=layer, basis=basis, minimum=minimum):
            return [((layer.weight - minimum) @ basis).square().sum() / 2]

        cost = prune_and_measure(EMPPruner(layer, mode="project", beta=0.8), layer, losses, probes=64)
        exact = float(basis.square().sum())
        assert cost.trace.low - 1e-9 <= exact * 1.5
        assert cost.change <= cost.bounds(trace=exact)["curvature"] * (1 + 1e-9)
        assert cost.change == pytest.approx(cost.second_order / 2)
        broken += cost.change > cost.bounds(trace=exact)["distance"]
    assert 0 < broken < 30


def test_a_target_that_moves_no_weights_is_refused():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="moves no weights"):
        masked_parameters(EMPPruner(net, target="features"), net)


def test_scores_are_those_of_the_next_refresh_and_change_nothing():
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    pruner = EMPPruner(net, criterion="wanda")
    with pytest.raises(RuntimeError, match="nothing passed"):
        pruner.scores()
    seen = torch.randn(7, 5)
    net(seen)
    scores = pruner.scores()
    assert torch.allclose(scores["weight"], net.weight.detach().abs() * seen.norm(dim=0), rtol=1e-5)
    (event,) = pruner.refresh()
    kept = scores["weight"][pruner.masks["weight"]]
    assert float(kept.min()) == pytest.approx(event.threshold)
    assert math.isclose(float(kept.sum() / scores["weight"].sum()), event.preserved_mass, rel_tol=1e-6)


def test_scores_of_samples_exist_in_the_forward_pass_only():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.raises(ValueError, match="in the forward pass only"):
        EMPPruner(net, target="features", dynamic=True).scores()

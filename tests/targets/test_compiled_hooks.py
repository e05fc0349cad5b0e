"""Hooks and compiled code in every order: nothing runs unmasked or unobserved because it was compiled before."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner

pytestmark = pytest.mark.compiler


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


X = torch.linspace(-2, 2, 48).view(8, 6)


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield


def pruned(net, **settings):
    """A pruner that has refreshed once, and how many samples it saw."""
    pruner = EMPPruner(net, target="features", beta=0.5, **settings)
    net.eval()
    with torch.no_grad():
        net(X)
    (site,) = pruner._refresher.evidence._sites
    seen = int(site.statistics()["samples"])
    pruner.refresh()
    return pruner, seen


def outputs(net, plain):
    with torch.no_grad():
        return net(X), plain(X)


@pytest.mark.parametrize("compiled", [whole, in_place])
@pytest.mark.parametrize(
    "settings", [{}, {"dynamic": True}, {"dynamic": True, "gradient": "straight_through", "rescale": True}], ids=str
)
def test_hooks_that_come_after_the_first_call_and_go_and_come_again(compiled, settings):
    plain, model = make(), make()
    net = compiled(model)
    torch.testing.assert_close(*outputs(net, plain))
    for _ in range(2):  # the second pruner is made after calls with the first one's hooks and without any
        reference, _ = pruned(plain, **settings)
        pruner, seen = pruned(net, **settings)
        assert seen == 8
        assert pruner.trajectory[0].keep == reference.trajectory[0].keep
        ours, expected = outputs(net, plain)
        torch.testing.assert_close(ours, expected)
        assert not torch.equal(ours, make()(X))
        pruner.detach()
        reference.detach()
        torch.testing.assert_close(*outputs(net, make()))


@pytest.mark.parametrize("first", ["the twin", "the pruned one"])
def test_a_compiled_twin_without_hooks(first):
    net, twin = whole(make()), whole(make())
    if first == "the twin":
        outputs(twin, twin)
    plain = make()
    pruned(plain)
    pruner, seen = pruned(net)
    assert seen == 8
    for _ in range(2):
        torch.testing.assert_close(*outputs(net, plain))
        torch.testing.assert_close(*outputs(twin, make()))
    pruner.detach()


def test_inputs_are_seen_by_hooks_that_come_after_the_first_call():
    net = whole(make())
    outputs(net, net)
    pruner = EMPPruner(net, criterion="wanda")
    net(X)
    (first, _) = pruner._refresher.evidence._sites
    torch.testing.assert_close(first.statistics()["total"], X.double().square().sum(0))


def test_compiled_code_is_dropped_once_and_not_at_every_attach(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    for _ in range(3):
        EMPPruner(make(), target="features").detach()
    assert len(resets) == 1
    EMPPruner(make()).detach()
    assert len(resets) == 1


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_compiled_code_counts_the_positions_of_each_forward(criterion):
    found = []
    for compiled in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        net = compiled(make())
        pruner = EMPPruner(net, target="features", criterion=criterion)
        evidence = pruner._refresher.evidence
        losses = []
        for mask in (None, torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])):
            evidence.count_positions(mask)
            losses.append(net(X.view(2, 4, 6)).square().sum())
        for loss in losses:
            loss.backward()
        found.append(evidence._sites[0].statistics())
    assert float(found[0]["samples"]) == 6
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)

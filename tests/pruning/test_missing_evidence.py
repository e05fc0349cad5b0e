"""A layer of which nothing is known keeps its mask, and a refresh goes on without it."""

import json

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.layer import MissingEvidence

UNSEEN = ("experts.1.0", "experts.1.1", "experts.1.2")


class Experts(nn.Module):
    """A router in front of two experts; `route` says which of them takes all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.route = nn.Linear(6, 6), 0
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x):
        return self.experts[self.route](self.first(x))


def steps(net, optimizer, pruner, count, *, set_to_none=True):
    for _ in range(count):
        optimizer.zero_grad(set_to_none=set_to_none)
        net(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        pruner.step()


def trained(count=3, **settings):
    net = Experts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=3, beta=0.8, **settings)
    steps(net, optimizer, pruner, count)
    return net, optimizer, pruner


def of_unseen(pruner):
    return {name: mask for name, mask in pruner.masks.items() if name.startswith(UNSEEN)}


EVIDENCE = [
    {"criterion": "wanda"},
    {"criterion": "taylor"},
    {"criterion": "saliency", "mode": "freeze"},
    {"criterion": "taylor", "mode": "project"},
    {"target": "neurons", "criterion": "activation", "scope": "global"},
    {"target": "neurons", "criterion": "taylor", "scope": "global"},
]


@pytest.mark.parametrize("settings", EVIDENCE, ids=lambda s: "-".join(map(str, s.values())))
def test_an_expert_that_nothing_reached_stays_whole(settings):
    net, optimizer, pruner = trained(**settings)
    (event,) = pruner.trajectory
    assert of_unseen(pruner)
    assert all(bool(mask.all()) for mask in of_unseen(pruner).values())
    assert not any(layer.name.startswith(UNSEEN) for layer in event.layers)
    seen = [mask for name, mask in pruner.masks.items() if not name.startswith(UNSEEN)]
    assert event.n == sum(mask.numel() for mask in seen)
    assert event.keep == sum(int(mask.sum()) for mask in seen) < event.n
    assert event.density == event.keep / event.n
    assert "no evidence for 'experts.1." in event.note
    assert ("its mask stays" if len(of_unseen(pruner)) == 1 else "their masks stay") in event.note
    kept = sum(int(mask.sum()) for mask in pruner.masks.values())
    assert pruner.density == kept / sum(mask.numel() for mask in pruner.masks.values())
    net.route = 1  # now it is the other one that stays as it is
    before = {name: mask for name, mask in pruner.masks.items() if name.startswith("experts.0")}
    steps(net, optimizer, pruner, 3)
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in before.items())
    assert any(not bool(mask.all()) for mask in of_unseen(pruner).values())
    assert "no evidence for 'experts.0." in pruner.trajectory[-1].note
    kept = sum(int(mask.sum()) for mask in pruner.masks.values())
    assert pruner.density == kept / sum(mask.numel() for mask in pruner.masks.values())
    assert pruner.audit().clean or settings.get("mode") == "project"


@pytest.mark.parametrize("criterion", ["taylor", "saliency"])
@pytest.mark.parametrize("target", ["weights", "neurons"])
def test_gradients_of_zero_are_none(criterion, target):
    net = Experts()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, target=target, criterion=criterion, scope="global")
    steps(net, optimizer, pruner, 2, set_to_none=False)
    assert of_unseen(pruner)
    assert all(bool(mask.all()) for mask in of_unseen(pruner).values())
    assert "no gradient reached it" in pruner.trajectory[0].note


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_where_every_layer_is_a_group_it_has_a_row_that_says_how_it_stands(scope):
    net, optimizer, pruner = trained(criterion="wanda", scope=scope)
    net.route = 1
    steps(net, optimizer, pruner, 3)
    events = pruner.last_events
    assert [event.group for event in events] == list(pruner.masks)
    for event in events:
        mask = pruner.masks[event.group]
        assert (event.n, event.keep) == (mask.numel(), int(mask.sum()))
        assert event.density == event.layers[0].density == float(mask.double().mean())
        unscored = event.group.startswith("experts.0")
        assert (event.note == f"no evidence for {event.group!r} (nothing passed it): its mask stays") == unscored
        assert (event.n_eff == event.churn == 0.0) == unscored
        assert event.from_record(json.loads(json.dumps(event.record()))) == event
    assert sum(event.keep for event in events) / sum(event.n for event in events) == pruner.density


@pytest.mark.parametrize("dynamic", [False, True])
def test_features_of_a_module_that_was_not_called(dynamic):
    net, optimizer, pruner = trained(target="features", dynamic=dynamic)
    assert len(pruner.trajectory) == (1 if dynamic else 2)
    told = "not in these numbers" if dynamic else "its mask stays"
    reason = "nothing passed it" if dynamic else "it was not called"
    assert pruner.trajectory[-1].note == f"no evidence for 'experts.1.1' ({reason}): {told}"
    assert [layer.name for layer in pruner.layers] == ["experts.0.1"]
    assert pruner.density == pruner.layers[0].density
    net.route = 1
    steps(net, optimizer, pruner, 3)
    assert "experts.1.1" in [layer.name for layer in pruner.layers]
    assert "'experts.0.1' (nothing passed it)" in " ".join(event.note for event in pruner.last_events)


@pytest.mark.parametrize("settings", [*EVIDENCE, {"target": "features"}, {"target": "features", "dynamic": True}])
def test_without_any_evidence_nothing_changes(settings):
    net = Experts()
    weights = [p.detach().clone() for p in net.parameters()]
    pruner = EMPPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), **settings)
    with pytest.raises(MissingEvidence, match="no mask was changed"):
        pruner.refresh()
    assert not pruner.trajectory
    assert pruner.density == 1.0
    assert all(bool(mask.all()) for mask in pruner.masks.values())
    assert not any(site.active for site in pruner._refresher.dynamic)
    assert all(torch.equal(p, before) for p, before in zip(net.parameters(), weights, strict=True))


@pytest.mark.parametrize("settings", [{"criterion": "wanda"}, {"target": "features"}, {"target": "neurons"}])
def test_density_after_a_checkpoint_is_that_before(settings, tmp_path):
    net, _, pruner = trained(**settings)
    pruner.save(tmp_path)
    state, other = pruner.state_dict(), Experts()
    other.load_state_dict(net.state_dict())
    for way in ("memory", "folder"):
        again = EMPPruner(other, torch.optim.SGD(other.parameters(), lr=0.1), every_n_steps=3, beta=0.8, **settings)
        again.load_state_dict(state) if way == "memory" else again.load(tmp_path)
        assert again.density == pruner.density < 1.0
        assert {name: mask.tolist() for name, mask in again.masks.items()} == {
            name: mask.tolist() for name, mask in pruner.masks.items()
        }
        again.detach()


@pytest.mark.parametrize("settings", [{"criterion": "wanda"}, {"target": "features"}])
def test_a_layer_that_is_called_in_evaluation_only_is_told(settings):
    net = Experts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=3, **settings)
    net.eval()
    net(torch.randn(4, 6))
    with pytest.raises(MissingEvidence, match="called in evaluation mode only"):
        pruner.refresh()
    net.train()
    steps(net, optimizer, pruner, 2)
    net.eval().route = 1
    net(torch.randn(4, 6))
    net.train().route = 0
    steps(net, optimizer, pruner, 1)
    notes = " ".join(event.note for event in pruner.last_events)
    assert "(it was called in evaluation mode only)" in notes
    steps(net, optimizer, pruner, 3)
    notes = " ".join(event.note for event in pruner.last_events)
    assert "(nothing passed it)" in notes, "that was before the last refresh"
    assert "evaluation" not in notes


def test_scores_are_of_layers_with_evidence():
    _, _, pruner = trained(2, criterion="wanda")
    assert list(pruner.scores()) == ["first.weight", "experts.0.0.weight", "experts.0.2.weight"]


def test_a_layer_of_which_freeze_left_nothing_is_counted_as_before():
    net, optimizer, pruner = trained(criterion="saliency", mode="freeze", include=["first.weight", "experts.0.*weight"])
    with torch.no_grad():
        for weight in pruner._weights:
            if weight.name == "first.weight":
                weight.mask.zero_()
                weight.weight.zero_()
    steps(net, optimizer, pruner, 3)
    first, event = pruner.trajectory[0], pruner.trajectory[-1]
    assert event.n == first.n
    assert not event.note
    assert not pruner.masks["first.weight"].any()
    assert [layer.keep for layer in event.layers if layer.name == "first.weight"] == [0]

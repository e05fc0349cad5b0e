"""Whose weights are pruned: those that the optimizers update, as they do now; the rest is said."""

import warnings

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.backends.local import LocalBackend


def block(width=6):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


def step(net, optimizer, pruner):
    optimizer.zero_grad()
    net(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    return pruner.step()


def begun(**settings):
    """One step, and so a refresh, of a block whose weights are all pruned."""
    torch.manual_seed(0)
    net = block()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, **settings)
    step(net, optimizer, pruner)
    return net, optimizer, pruner


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = block(8), block(16)

    def forward(self, x):
        return self.student(x)


def test_what_no_given_optimizer_updates_is_left_out_and_said():
    net = Pair()
    before = {name: p.detach().clone() for name, p in net.teacher.named_parameters()}
    with pytest.warns(UserWarning, match=r"left out of pruning: 59% .*no given optimizer updates it: teacher.0.weight"):
        pruner = EMPPruner(net, torch.optim.SGD(net.student.parameters(), lr=0.1))
    pruner.refresh()
    assert list(pruner.masks) == ["student.0.weight", "student.2.weight"]
    assert pruner.trajectory[-1].n == 8 * 6 + 4 * 8
    assert all(torch.equal(p, before[name]) for name, p in net.teacher.named_parameters())
    left = {one.name: (one.reason, one.size) for one in pruner.left_out}
    assert left["teacher.0.weight"] == ("no given optimizer updates it", 96)
    assert left["student.0.bias"] == ("a vector: bias, norm or scale", 8)
    total = sum(p.numel() for p in net.parameters())
    assert pruner.left_out_share == pytest.approx(1 - 80 / total)
    assert pruner.left_out_line.startswith(f"not pruned: {1 - 80 / total:.1%} of all weights (")


def test_include_prunes_it_all_the_same():
    net = Pair()
    pruner = EMPPruner(net, torch.optim.SGD(net.student.parameters(), lr=0.1), include=["teacher.*.weight"])
    pruner.refresh()
    assert list(pruner.masks) == ["teacher.0.weight", "teacher.2.weight"]
    assert int((net.teacher[0].weight == 0).sum()) == int((~pruner.masks["teacher.0.weight"]).sum()) > 0


def test_units_follow_the_same_rule():
    net = Pair()
    pruner = EMPPruner(net, torch.optim.SGD(net.student.parameters(), lr=0.1), target="neurons")
    assert list(pruner.masks) == ["student.0"]
    with pytest.raises(ValueError, match="no optimizer updates the neurons of Pair"):
        EMPPruner(net, torch.optim.SGD(block().parameters(), lr=0.1), target="neurons")


def test_an_optimizer_of_another_model_is_an_error():
    masters = [p.detach().clone().requires_grad_() for p in block().parameters()]
    with pytest.raises(ValueError, match=r"no optimizer updates '0.weight'.*from this model's parameters"):
        EMPPruner(block(), torch.optim.SGD(masters, lr=0.1))


def test_frozen_complex_and_nameless_weights_are_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
            self.weight1 = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))

    net = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 4))
    net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="left out of pruning") as told:
        pruner = EMPPruner(net)
    text = str(told[0].message)
    assert "frozen (requires_grad=False): 2.weight" in text
    assert "not a real floating-point tensor: 1.weight1" in text
    assert "nothing says that it is a matrix of weights: 1.weights.0" in text
    assert list(pruner.masks) == ["0.weight"]


def test_a_usual_model_is_not_talked_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = nn.Sequential(nn.Embedding(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        net.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 5)))  # below a tenth of all weights
        EMPPruner(net, torch.optim.SGD(net.parameters(), lr=0.1))


# ---- the set changes while training -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:left out of pruning")
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_thawed_layers_are_pruned_from_the_next_refresh(mode):
    torch.manual_seed(0)
    net = block()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, mode=mode)
    step(net, optimizer, pruner)
    (event,) = step(net, optimizer, pruner)
    assert event.n == 24
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters())})
    step(net, optimizer, pruner)
    with pytest.warns(UserWarning, match=r"pruned from here on, too: 0.weight"):
        (event,) = step(net, optimizer, pruner)
    assert event.n == 24 + 36
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    step(net, optimizer, pruner)
    for name, p in (("0.weight", net[0].weight), ("2.weight", net[2].weight)):
        assert mode == "project" or int((p == 0).sum()) == int((~pruner.masks[name]).sum()) > 0
    assert [one.name for one in pruner.left_out] == ["0.bias", "2.bias"]


@pytest.mark.filterwarnings("ignore:left out of pruning")
def test_a_new_head_takes_the_place_of_the_old_one():
    net, optimizer, pruner = begun()
    old = net[2]
    with pruner.dense_weights():
        dense = old.weight.detach().clone()
    net[2] = nn.Linear(6, 3)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    with pytest.warns(UserWarning, match=r"replaced, so that its mask begins anew: 2.weight"):
        (event,) = step(net, optimizer, pruner)
    assert event.n == 36 + 18
    assert pruner.masks["2.weight"].shape == (3, 6)
    assert torch.equal(old.weight, dense), "what left the model has its dense values back"
    assert torch.equal(net[2].weight == 0, ~pruner.masks["2.weight"])


@pytest.mark.filterwarnings("ignore:left out of pruning")
def test_where_weights_cannot_be_followed_it_is_said_once(monkeypatch):
    monkeypatch.setattr(LocalBackend, "can_follow", False)  # as sharded backends
    torch.manual_seed(0)
    net = block()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    step(net, optimizer, pruner)
    optimizer.add_param_group({"params": list(net[0].parameters())})
    with pytest.warns(UserWarning, match=r"sharded \(local\), EMP goes on with those that it began with"):
        step(net, optimizer, pruner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimizer, pruner)
    assert list(pruner.masks) == ["2.weight"]


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("target", ["weights", "neurons"])
def test_a_layer_that_is_frozen_keeps_its_mask(mode, target):
    torch.manual_seed(0)
    net = block()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, mode=mode, target=target, density=0.5)
    step(net, optimizer, pruner)
    layers = list(pruner.masks)
    pruned = ~pruner.weight_masks["0.weight"]
    net[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimizer, pruner)
    assert list(pruner.masks) == layers
    assert not {*pruner.weight_masks} & {one.name for one in pruner.left_out}
    net[0].requires_grad_(True)
    step(net, optimizer, pruner)
    assert list(pruner.masks) == layers
    if mode == "freeze":
        assert not net[0].weight[pruned].any()
    pruner.finalize()
    assert torch.equal(net[0].weight == 0, ~pruner.weight_masks["0.weight"])


def replaced_at_the_end(net, optimizer):
    net[2] = nn.Linear(6, 3)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    return optimizer


def loaded_by_assignment(net, optimizer):
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    return torch.optim.SGD(net.parameters(), lr=0.1)


def parametrized(net, optimizer):
    nn.utils.parametrizations.weight_norm(net[2])
    optimizer.add_param_group({"params": list(net[2].parametrizations.parameters())})
    return optimizer


@pytest.mark.parametrize("change", [replaced_at_the_end, loaded_by_assignment, parametrized])
@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_weights_that_no_mask_reaches_are_said_at_the_end(change, mode):
    net, optimizer, pruner = begun(stop=1, mode=mode)
    optimizer = change(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimizer, pruner)
    others = {loaded_by_assignment: r"0\.weight, ", parametrized: r"2\.parametrizations\.weight\.original1, "}
    named = others.get(change, "") + r"2\.weight"
    with pytest.warns(UserWarning, match=f"no mask is on {named}, which came into the model after the last refresh"):
        pruner.finalize()


def test_an_optimizer_of_replaced_weights_is_said_after_a_hundred_calls():
    net, optimizer, pruner = begun()
    optimizer = loaded_by_assignment(net, optimizer)
    for _ in range(99):
        step(net, optimizer, pruner)
    with pytest.warns(UserWarning, match=r"no mask is on 0\.weight, 2\.weight"):
        step(net, optimizer, pruner)


def test_a_hundred_accumulated_batches_are_nothing_to_talk_about():
    _, _, pruner = begun()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            assert pruner.step() == []

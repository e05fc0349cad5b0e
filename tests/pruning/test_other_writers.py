"""Who else writes weights between two steps: seen before old dense values overwrite the new ones."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from emp_callbacks import EMPPruner
from emp_callbacks.core import device

pytestmark = pytest.mark.usefixtures("either_path")


def net_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def masked(mode, **settings):
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner = EMPPruner(net, optimizer, mode=mode, **settings)
    pruner.refresh()
    return net, optimizer, pruner


def step(net, optimizer, pruner, by_closure=False):
    def closure():
        optimizer.zero_grad()
        loss = net(torch.randn(8, 6, dtype=net[0].weight.dtype)).square().mean()
        loss.backward()
        return loss

    if by_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    return pruner.step()


def copied(net, values):
    with torch.no_grad():
        for p, value in zip(net.parameters(), values, strict=True):
            p.copy_(value)


def through_data(net, values):
    for p, value in zip(net.parameters(), values, strict=True):
        p.data.copy_(value)


def replaced(net, values):
    for p, value in zip(net.parameters(), values, strict=True):
        p.data = value.clone()


def loaded(net, values):
    net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))


def from_vector(net, values):
    vector_to_parameters(parameters_to_vector(values), net.parameters())


WAYS = [copied, through_data, replaced, loaded, from_vector]


def test_a_masked_state_that_is_loaded_without_the_pruners_own_is_said():
    net, optimizer, pruner = masked("feedback")
    state, own = copy.deepcopy(net.state_dict()), pruner.state_dict()
    net.load_state_dict(state)
    pruner.load_state_dict(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimizer, pruner)
    net.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"zeros for what is pruned of '0.weight'.*Load the pruner's own state"):
        step(net, optimizer, pruner)


@pytest.mark.filterwarnings("ignore:load_state_dict brought zeros")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_of_weights_that_diverged_a_masked_state_brings_back_all(bad):
    net, optimizer, pruner = masked("feedback")
    good = copy.deepcopy(net.state_dict())
    with torch.no_grad(), pruner.dense_weights():
        net[0].weight[:, 1] = bad
    net.load_state_dict(good)
    step(net, optimizer, pruner)
    with pruner.dense_weights():
        gone = ~pruner.masks["0.weight"][:, 1]
        assert torch.equal(net[0].weight[:, 1] == 0, gone)
        assert net[0].weight.isfinite().all()
    pruner.refresh()


CLOSURE = pytest.mark.parametrize("by_closure", [False, True], ids=["plain", "closure"])


@CLOSURE
@pytest.mark.parametrize("way", WAYS)
def test_in_feedback_new_values_become_the_dense_ones(way, by_closure):
    net, optimizer, pruner = masked("feedback")
    new = [p.detach().clone() for p in net_of(1).parameters()]
    way(net, new)
    step(net, optimizer, pruner, by_closure)
    assert torch.equal(net[0].weight == 0, ~pruner.masks["0.weight"])
    with pruner.dense_weights():
        assert all(torch.equal(p, value) for p, value in zip(net.parameters(), new, strict=True))


def test_a_row_that_is_written_through_data_becomes_dense():
    torch.manual_seed(0)
    net = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner = EMPPruner(net, optimizer)
    pruner.refresh()
    mask = pruner.masks["weight"]
    for row in range(64):
        new = torch.arange(1.0, 65) + row
        net.weight.data[row] = new
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        assert torch.equal(net.weight[row], new * mask[row])
        with pruner.dense_weights():
            assert torch.equal(net.weight[row], new)


@pytest.mark.parametrize("channels", [slice(None), 5])
def test_so_does_a_filter_in_channels_last(channels):
    torch.manual_seed(0)
    net = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner = EMPPruner(net, optimizer)
    pruner.refresh()
    with pruner.dense_weights():
        expected = net.weight.detach().clone()
    expected[channels] = torch.arange(1.0, 1 + expected[channels].numel()).view_as(expected[channels])
    net.weight.data[channels] = expected[channels]
    net(torch.randn(2, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    assert torch.equal(net.weight == 0, ~pruner.masks["weight"])
    with pruner.dense_weights():
        assert torch.equal(net.weight, expected)


@CLOSURE
@pytest.mark.parametrize("way", WAYS)
def test_in_freeze_they_are_masked_and_the_loss_is_said_once(way, by_closure, either_path):
    net, optimizer, pruner = masked("freeze")
    new = [p.detach().clone() for p in net_of(1).parameters()]
    name, mask = max(pruner.masks.items(), key=lambda item: int((~item[1]).sum()))
    lost = int((~mask).sum())

    def twice():
        for _ in range(2):
            way(net, new)
            step(net, optimizer, pruner, by_closure)
        pruner.state_dict()  # an accelerator is asked no earlier

    said = rf"wrote {lost} pruned entries of '{name}'.*mode='feedback'"
    if either_path == "accelerator" and way is through_data:
        said = "through .data between two steps"
    with pytest.warns(UserWarning, match=said) as told:
        twice()
    assert len(told) == 1
    mask = pruner.masks["0.weight"]
    assert torch.equal(net[0].weight, new[0] * mask)


def test_load_state_dict_is_masked_at_once():
    net, _, pruner = masked("feedback")
    new = net_of(1).state_dict()
    net.load_state_dict(new)
    mask = pruner.masks["0.weight"]
    assert torch.equal(net[0].weight, new["0.weight"] * mask)


def test_a_masked_state_of_the_same_masks_leaves_the_dense_values_behind_them():
    net, _, pruner = masked("feedback")
    with pruner.dense_weights():
        dense = net[0].weight.detach().clone()
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    with pruner.dense_weights():
        assert torch.equal(net[0].weight, dense)


@pytest.mark.parametrize("target", ["weights", "neurons"])
def test_one_entry_written_between_two_steps_stays(target):
    net, optimizer, pruner = masked("feedback", target=target)
    row, column = (~pruner.weight_masks["0.weight"]).nonzero()[0].tolist()
    with torch.no_grad():
        net[0].weight[row, column] = 7.0
    step(net, optimizer, pruner, by_closure=True)
    assert net[0].weight[row, column] == 0
    with pruner.dense_weights():
        assert net[0].weight[row, column] == 7.0


@pytest.mark.parametrize("way", [copied, loaded])
def test_a_weight_that_is_written_as_zeros_has_no_values_of_before_behind_its_mask(way):
    net, optimizer, pruner = masked("feedback")
    way(net, [torch.zeros_like(p) for p in net.parameters()])
    step(net, optimizer, pruner)
    with pruner.dense_weights():
        assert not net[0].weight.any()


def test_what_is_called_inside_a_dense_block_leaves_it_dense(tmp_path):
    net, optimizer, pruner = masked("feedback")
    with pruner.dense_weights():
        dense = net[0].weight.detach().clone()
    with pruner.dense_weights():
        for call in (pruner.scores, pruner.state_dict, lambda: pruner.save(tmp_path), pruner.refresh):
            call()
            assert torch.equal(net[0].weight, dense)
        with pruner.dense_weights():
            pass
        step(net, optimizer, pruner)
        assert torch.equal(net[0].weight, dense)
    assert torch.equal(net[0].weight, dense * pruner.masks["0.weight"])
    assert int((~pruner.masks["0.weight"]).sum()) == pruner.state_dict()["stash"]["0.weight"].numel()


@CLOSURE
@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_the_model_may_change_its_dtype(mode, by_closure):
    net, optimizer, pruner = masked(mode)
    with pruner.dense_weights():
        dense = net[0].weight.detach().double()
    net.double()
    step(net, optimizer, pruner, by_closure)
    assert torch.equal(net[0].weight == 0, ~pruner.masks["0.weight"])
    with pruner.dense_weights():
        assert torch.equal(net[0].weight, dense)


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_values_that_are_there_for_an_evaluation_are_masked_in_it_and_come_back(mode):
    net, optimizer, pruner = masked(mode)
    with pruner.dense_weights():
        dense = net[0].weight.detach().clone()
    own, average = [p.detach().clone() for p in net.parameters()], [p.detach().clone() for p in net_of(1).parameters()]
    copied(net, average)
    with pruner.masked_forward():
        assert torch.equal(net[0].weight, average[0] * pruner.masks["0.weight"])
    assert torch.equal(net[0].weight, average[0])
    copied(net, own)  # swapped back
    step(net, optimizer, pruner)
    with pruner.dense_weights():
        assert torch.equal(net[0].weight, dense)


def test_quiet_steps_read_no_values(monkeypatch):
    net, optimizer, pruner = masked("feedback")
    looked = []
    monkeypatch.setattr(type(pruner._weights[0].store), "take_over", lambda *_, **__: looked.append(1))
    step(net, optimizer, pruner)
    step(net, optimizer, pruner)
    assert not looked
    copied(net, [p * 2 for p in net.parameters()])
    step(net, optimizer, pruner)
    assert looked


def test_copies_of_an_attached_model_are_plain():
    net, _, pruner = masked("feedback")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.load_state_dict(net_of(1).state_dict())
        assert torch.equal(other[0].weight, net_of(1)[0].weight)
    pruner.finalize()
    assert not net._load_state_dict_post_hooks
    net.load_state_dict(net_of(1).state_dict())
    assert torch.equal(net[0].weight, net_of(1)[0].weight), "the model is the user's again"


def test_a_sparse_model_that_begins_to_train_is_said():
    net = net_of()
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=5, mode="freeze", density=1.0)
    with pytest.warns(UserWarning, match=r"30% of the weights to prune are 0 already.*density='found', mode='freeze'"):
        step(net, optimizer, pruner)
    assert not (net[0].weight[:, ::2] == 0).all()


def test_on_an_accelerator_a_write_through_data_is_said_where_waiting_costs_nothing(monkeypatch):
    monkeypatch.setattr(device, "_AT_ONCE", set())
    net, optimizer, pruner = masked("freeze")
    for _ in range(2):
        step(net, optimizer, pruner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.state_dict()
    step(net, optimizer, pruner)
    through_data(net, list(net_of(1).parameters()))
    for _ in range(2):
        step(net, optimizer, pruner)
    with pytest.warns(UserWarning, match=r"wrote '\d.weight' through .data between two steps.*torch.no_grad"):
        pruner.state_dict()

"""Averages and other copies of the weights obey the masks."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emp_callbacks import EMPPruner

MODES = ["feedback", "project", "freeze"]

pytestmark = pytest.mark.usefixtures("either_path")


def net_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def backward(net, seed):
    net.zero_grad()
    net(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def torch_ema(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def timm_ema(net):
    return ModelEmaV3(net, decay=0.9)


def update(ema, net):
    (ema.update_parameters if isinstance(ema, AveragedModel) else ema.update)(net)


def is_masked(module, masks):
    return all(bool((p[~masks[name]] == 0).all()) for name, p in module.named_parameters() if name in masks)


@pytest.mark.parametrize("make", [torch_ema, timm_ema])
@pytest.mark.parametrize("mode", MODES)
def test_an_average_is_masked_at_all_times(make, mode):
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = make(net)
    pruner = EMPPruner(net, optimizer, mode=mode, every_n_steps=3)
    pruner.add_average(ema)
    for step in range(9):
        backward(net, step)
        optimizer.step()
        pruner.step()
        update(ema, net)
        assert is_masked(ema.module, pruner.masks)
        assert is_masked(copy.deepcopy(ema).module, pruner.masks)
    assert sum(int((~m).sum()) for m in pruner.masks.values()) > 0
    pruner.finalize()
    assert is_masked(ema.module, pruner.masks)


@pytest.mark.parametrize("make", [torch_ema, timm_ema])
def test_in_feedback_the_average_is_of_dense_values(make):
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=3)
    ema, reference = make(net), make(net)
    average = pruner.add_average(ema)
    for step in range(9):
        backward(net, step)
        optimizer.step()
        pruner.step()
        update(ema, net)
        with pruner.dense_weights():
            update(reference, net)
    average.unhide()
    for a, b in zip(ema.module.parameters(), reference.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_dense_average_survives_a_checkpoint():
    averages = []

    def begin():
        net = net_of()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ema = torch_ema(net)
        pruner = EMPPruner(net, optimizer, every_n_steps=2)
        averages.append(pruner.add_average(ema))
        return net, optimizer, ema, pruner

    def train(parts, steps):
        net, optimizer, ema, pruner = parts
        for step in steps:
            backward(net, step)
            optimizer.step()
            pruner.step()
            ema.update_parameters(net)

    first, second = begin(), begin()
    train(first, range(5))
    for a, b in zip(first, second, strict=True):
        b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(first, range(5, 9))
    train(second, range(5, 9))
    for average in averages:
        average.unhide()
    for a, b in zip(first[2].parameters(), second[2].parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_average_inside_the_model_is_found_by_itself_and_not_pruned():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net_of()
            self.mean = torch_ema(self.net)

        def forward(self, x):
            return self.net(x)

    model = Teacher()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=1)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        pruner.step()
        model.mean.update_parameters(model.net)
    assert list(pruner.masks) == ["net.0.weight", "net.2.weight"]
    assert is_masked(model.mean.module, {n.removeprefix("net."): m for n, m in pruner.masks.items()})
    assert {x.reason for x in pruner.left_out if x.name.startswith("mean")} == {"an average, which is kept masked"}


def test_what_is_no_average_is_refused():
    pruner = EMPPruner(net_of())
    with pytest.raises(ValueError, match=r"Sequential is no model average.*pruner.mask\(copy\)"):
        pruner.add_average(net_of())
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(2,\) in AveragedModel"):
        pruner.add_average(AveragedModel(nn.PReLU(2)))


# ---- pruner.mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, AveragedModel, timm_ema, nn.DataParallel])
def test_any_model_of_the_same_parameters_is_masked_in_place(wrap):
    pruner = EMPPruner(net_of())
    pruner.refresh()
    other = net_of(1)
    dense = copy.deepcopy(other.state_dict())
    other = wrap(other)
    pruner.mask(other)
    for p, name in zip(other.parameters(), dense, strict=True):
        assert torch.equal(p, dense[name] * pruner.masks.get(name, torch.tensor(1)))


def test_or_inside_a_block():
    pruner = EMPPruner(net_of())
    pruner.refresh()
    other = net_of(1)
    with pruner.mask(other):
        assert is_masked(other, pruner.masks)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net_of(1).parameters(), strict=True))


def test_merged_adapters_are_matched_by_the_name_of_the_base():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x)

    net = net_of()
    net[0] = Adapted(net[0])
    pruner = EMPPruner(net)
    pruner.refresh()
    merged = net_of(1)
    pruner.mask(merged)
    assert torch.equal(merged[0].weight == 0, ~pruner.masks["0.weight"])


def test_features_are_masked_by_hooks():
    net = net_of()
    pruner = EMPPruner(net, target="features", density=0.5)
    x = torch.randn(8, 6)
    net(x)
    pruner.refresh()
    other = copy.deepcopy(net_of())
    wanted, dense = net(x), other(x)
    with pruner.mask(other):
        assert torch.equal(other(x), wanted)
    assert torch.equal(other(x), dense)
    assert not torch.equal(dense, wanted)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(6, 16), r"Linear has no parameter '2.weight' \(1 of 2"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), r"'0.weight' has shape \(8, 6\)"),
    ],
)
def test_another_architecture_is_refused_before_anything_changed(other, message):
    pruner = EMPPruner(net_of())
    pruner.refresh()
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pruner.mask(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_state_of_a_pruner_that_is_through_still_holds_the_dense_average():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = torch_ema(net)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    pruner.add_average(ema)
    backward(net, 0)
    optimizer.step()
    pruner.step()
    ema.update_parameters(net)
    before = pruner.state_dict()["averages"]
    pruner.finalize()
    (after,) = pruner.state_dict()["averages"]
    assert after.keys() == before[0].keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(value, before[0][name]) for name, value in after.items())


def test_a_mask_folder_says_that_it_holds_no_dense_averages(tmp_path):
    net = net_of()
    pruner = EMPPruner(net)
    pruner.add_average(torch_ema(net))
    pruner.refresh()
    with pytest.warns(UserWarning, match=r"no dense values behind the masks of averages.*state_dict"):
        pruner.save(tmp_path)


def test_an_average_of_the_old_head_does_not_end_the_training_of_the_new_one():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    ema = torch_ema(net)
    pruner.add_average(ema)
    backward(net, 0)
    optimizer.step()
    pruner.step()
    net[2] = nn.Linear(16, 3)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    backward(net, 1)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"an average does not follow .*'2.weight' has shape \(4, 16\)"):
        pruner.step()
    assert torch.equal(ema.module[0].weight == 0, ~pruner.masks["0.weight"])


def test_what_was_written_into_an_average_is_nothing_to_a_later_checkpoint():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = torch_ema(net)
    pruner = EMPPruner(net, optimizer, every_n_steps=2)
    pruner.add_average(ema)

    def train(first, last):
        for step in range(first, last):
            backward(net, step)
            optimizer.step()
            pruner.step()
            update(ema, net)

    train(0, 3)
    states = copy.deepcopy([part.state_dict() for part in (net, ema, optimizer, pruner)])
    train(3, 6)
    with torch.no_grad():
        for p in ema.module.parameters():
            p.fill_(7.0)
    train(6, 8)
    for part, state in zip((net, ema, optimizer, pruner), copy.deepcopy(states), strict=True):
        part.load_state_dict(state)
    for name, value in states[1].items():
        assert torch.equal(ema.state_dict()[name], value), name

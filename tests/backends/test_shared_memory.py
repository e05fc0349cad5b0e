"""Two parameters over one memory are refused by name; neighbours in one buffer are as any others."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.backends.shared_memory import check_apart
from emp_callbacks.targets import WeightTarget


def net_of(second):
    """Return a net whose second weight is a view of the first one's memory."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    net[2].weight.data = second(net[0].weight.data)
    return net


SAME = {
    "same": lambda first: first,
    "transposed": lambda first: first.t(),
    "flipped blocks": lambda first: first.view(2, 4, 8).transpose(0, 1),
    "one row": lambda first: first[7:],
    "one element": lambda first: first.view(-1)[63:].view(1, 1),
    "every other": lambda first: first[:, 1::2],
    "other dtype": lambda first: first.view(torch.bfloat16)[3:4, 1:2],
    "expanded": lambda first: first[3:4].expand(8, 8),
}


@pytest.mark.parametrize("way", SAME)
def test_two_parameters_over_one_memory_are_refused_by_name(way):
    message = r"'0.weight' and '2.weight' are two parameters over one memory.*\(2.weight = 0.weight\), or exclude one"
    with pytest.raises(ValueError, match=message):
        EMPPruner(net_of(SAME[way]))


def test_so_are_neurons_of_such_weights():
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are two parameters over one memory"):
        EMPPruner(net_of(SAME["same"]), target="neurons", include=["0", "2"])


def targets(*tensors):
    return [WeightTarget(str(i), nn.Parameter(values), 0) for i, values in enumerate(tensors)]


def test_views_of_one_buffer_that_share_no_element_are_apart():
    flat, table = torch.randn(60), torch.randn(6, 10)
    check_apart(targets(flat[:20].view(4, 5), flat[20:50].view(5, 6).t(), flat[50:].view(2, 5)))
    check_apart(targets(table[:, :4], table[:, 4:9], table[:, 9:], flat.view(6, 10)[::2], flat.view(6, 10)[1::2]))
    with pytest.raises(ValueError, match=r"'1' and '2' are two parameters over one memory"):
        check_apart(targets(table[:, :4], table[:, 5:9], table[:, 8:]))


def test_what_has_no_memory_is_apart():
    meta, empty = torch.empty(4, 4, device="meta"), torch.empty(0, 4)
    check_apart(targets(meta, meta, empty, empty, torch.empty(4, 0), torch.ones(2, 2)))
    assert list(EMPPruner(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta"))._weights)


def test_one_parameter_under_two_names_is_one():
    net = net_of(lambda first: first.clone())
    net[2].weight = net[0].weight
    pruner = EMPPruner(net)
    pruner.refresh()
    assert pruner.trajectory[-1].n == 64


@pytest.mark.parametrize("way", ["same", "transposed"])
@pytest.mark.parametrize("left_out", ["0.weight", "2.weight"])
def test_with_one_excluded_the_dense_values_are_those_of_training_by_hand(way, left_out):
    ours, theirs = net_of(SAME[way]), net_of(SAME[way])
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (ours, theirs)]
    pruner = EMPPruner(ours, optimizers[0], every_n_steps=2, exclude=[left_out])
    dense, kept = theirs[0].weight.detach().clone(), torch.ones(8, 8)
    for step in range(8):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        theirs[0].weight.data.copy_(dense * kept)
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if net is theirs:
                theirs[0].weight.data.copy_(dense)
            optimizer.step()
        pruner.step()
        dense = theirs[0].weight.detach().clone()
        if step % 2:
            (mask,) = pruner.masks.values()
            kept = (mask.t() if (left_out, way) == ("0.weight", "transposed") else mask).float()
        assert torch.equal(ours[0].weight, dense * kept)
        with pruner.dense_weights():
            assert torch.equal(ours[0].weight, dense)

"""Dense values on an accelerator: where they are, who else holds the memory, what is written in between."""

import copy
import os

import pytest
import torch
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder

from emp_callbacks import EMPPruner
from emp_callbacks.core import device
from emp_callbacks.layer.hiding import hide_all, prepare, unhide_all
from emp_callbacks.layer.mask_mode import MASK_MODES, Feedback
from emp_callbacks.layer.masked_weight import MaskedWeight
from emp_callbacks.layer.segment import Segment
from tests.accelerator import accelerator_path

SHAPES = [(70, 90), (5000,), (3, 4, 5), (1,), (64, 64)]


@pytest.fixture(autouse=True, params=[True, False], ids=["triton", "torch"])
def path(request):
    with accelerator_path(request.param):
        yield


def segment_of(owner, view=lambda tensor: tensor, name="w"):
    values = view(owner.detach())
    whole = slice(0, values.numel())
    return Segment(
        name=name, shape=values.shape, output_dim=0, owner=owner, view=view, positions=0, replicated=True, counted=whole
    )


def masked(segments, mode="feedback"):
    weights = [MaskedWeight(segment) for segment in segments]
    masks = [torch.rand(weight.weight.shape) > 0.4 for weight in weights]
    MASK_MODES[mode]().install_all(weights, masks, [[] for _ in weights])
    return weights


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    made[0].data[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    return made


def bits(values):
    return values.detach().contiguous().view(torch.uint8)


def same(one, other):
    return torch.equal(bits(one), bits(other))


def shown(dense, weight):
    return dense.masked_fill(~weight.mask, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_a_parameter_keeps_its_memory_but_for_the_update(dtype):
    owners = parameters(dtype)
    dense, at = [p.detach().clone() for p in owners], [p.data_ptr() for p in owners]
    weights = masked([segment_of(p) for p in owners])
    for _ in range(3):
        assert [p.data_ptr() for p in owners] == at
        for p, values, weight in zip(owners, dense, weights, strict=True):
            assert same(p, shown(values, weight))
            assert same(weight.stash, values[~weight.mask])
        Feedback().before_update(weights)
        assert all(p.data_ptr() != own for p, own in zip(owners, at, strict=True))
        for p, values in zip(owners, dense, strict=True):
            assert same(p, values)
            p.data += 1
            values += 1
        Feedback().after_update(weights)
    Feedback().reveal(weights, in_place=True)
    assert [p.data_ptr() for p in owners] == at
    assert all(same(p, values) for p, values in zip(owners, dense, strict=True))


def test_other_layouts_are_masked_in_place():
    base = torch.randn(4, 6, 5, 5)
    owners = [
        nn.Parameter(base.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(9, 5).t()),
        nn.Parameter(torch.randn(6, 10)[:, ::2]),
    ]
    dense, strides = [p.detach().clone() for p in owners], [p.stride() for p in owners]
    weights = masked([segment_of(p) for p in owners])
    for _ in range(2):
        assert all(same(p, shown(d, w)) for p, d, w in zip(owners, dense, weights, strict=True))
        Feedback().before_update(weights)
        assert all(same(p, d) for p, d in zip(owners, dense, strict=True))
        Feedback().after_update(weights)
    assert [p.stride() for p in owners] == strides


def sharing():
    flat = torch.randn(100)
    twins = nn.Parameter(torch.randn(7, 9))
    return {
        "a flat buffer": (flat, [segment_of(flat, lambda t, i=i: t[i : i + 40].view(4, 10)) for i in (0, 50)]),
        "a view": (flat, [segment_of(nn.Parameter(flat[20:80].view(6, 10)))]),
        "another parameter": (other := nn.Parameter(twins.data), [segment_of(twins)], other)[:2],
    }


@pytest.mark.parametrize("kind", sharing())
def test_memory_that_others_hold_gets_the_values_themselves(kind):
    held, segments = sharing()[kind]
    dense = held.detach().clone()
    weights = masked(segments)
    at = [weight.weight.data_ptr() for weight in weights]
    Feedback().before_update(weights)
    assert same(held, dense)
    held.data.add_(1)
    Feedback().after_update(weights)
    expected = dense + 1
    for weight in weights:
        assert [weight.weight.data_ptr() for weight in weights] == at
        assert bool((weight.weight[~weight.mask] == 0).all())
    Feedback().before_update(weights)
    assert same(held, expected)


def test_what_something_else_writes_without_a_trace_is_dense_from_then_on():
    owners = parameters()
    weights = masked([segment_of(p) for p in owners])
    dense = []
    for weight in weights:
        weight.seal()
        values = weight.weight.clone()
        values[~weight.mask] = weight.stash
        dense.append(values)
    version = owners[0]._version
    kept, pruned = weights[0].mask.nonzero()[0], (~weights[0].mask).nonzero()[-1]
    owners[0].data[tuple(kept)] = 5
    owners[0].data[tuple(pruned)] = 7
    owners[1].data.clamp_(-0.1, 0.1)
    assert owners[0]._version == version
    Feedback().before_update(weights)
    dense[0][tuple(kept)], dense[0][tuple(pruned)] = 5, 7
    dense[1] = torch.where(weights[1].mask, dense[1].clamp(-0.1, 0.1), dense[1])
    assert all(same(p, values) for p, values in zip(owners, dense, strict=True))


def test_an_optimizer_may_give_parameters_other_memory():
    owners = parameters()
    at = [p.data_ptr() for p in owners]
    weights = masked([segment_of(p) for p in owners])
    Feedback().before_update(weights)
    for p in owners:
        p.data = p.data + 2
    dense = [p.detach().clone() for p in owners]
    Feedback().after_update(weights)
    assert [p.data_ptr() for p in owners] == at
    assert all(same(p, shown(d, w)) for p, d, w in zip(owners, dense, weights, strict=True))
    for p in owners:
        p.data = p.data.clone()  # the user
    Feedback().before_update(weights)
    assert all(same(p, d) for p, d in zip(owners, dense, strict=True))


def test_a_model_that_moves_takes_its_dense_values_along():
    owners = parameters()
    dense = [p.detach().clone() for p in owners]
    weights = masked([segment_of(p) for p in owners])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_AT_ONCE", {"cpu"})  # to a host, whose store is another
        for weight, values in zip(weights, dense, strict=True):
            assert same(weight.stash, values[~weight.mask])
            assert weight.store.buffer is None
        Feedback().before_update(weights)
        assert all(same(p, d) for p, d in zip(owners, dense, strict=True))
        Feedback().after_update(weights)
        assert all(weight.store.packed is not None for weight in weights)
    Feedback().before_update(weights)  # and back
    assert all(same(p, d) for p, d in zip(owners, dense, strict=True))
    Feedback().after_update(weights)
    assert all(weight.store.packed is None for weight in weights)


def test_copies_in_the_middle_are_copies():
    owners = parameters()
    weights = masked([segment_of(p) for p in owners])
    twins = copy.deepcopy(weights)
    Feedback().before_update(twins)
    for p, weight, twin in zip(owners, weights, twins, strict=True):
        assert same(p, shown(p.detach(), weight))
        assert same(twin.weight[~twin.mask], weight.stash)


@pytest.mark.parametrize("mode", MASK_MODES)
def test_a_refresh_may_write_masked_values_itself(mode):
    owners = parameters()
    dense, at = [p.detach().clone() for p in owners], [p.data_ptr() for p in owners]
    weights = [MaskedWeight(segment_of(p)) for p in owners]
    for again in range(2):
        masks = [torch.rand(p.shape) > 0.3 + 0.2 * again for p in owners]
        if mode == "feedback":
            unhide_all(weights, in_place=False)
        else:
            dense = [p.detach().clone() for p in owners]
        for weight, mask in zip(weights, masks, strict=True):
            places = MASK_MODES[mode]().places(weight)
            places.target.copy_(places.source.masked_fill(~mask, 0))
        MASK_MODES[mode]().install_all(weights, masks, [[] for _ in weights], written=True)
        assert [p.data_ptr() for p in owners] == at
        assert all(same(p, shown(d, w)) for p, d, w in zip(owners, dense, weights, strict=True))
    if mode == "feedback":
        unhide_all(weights, in_place=False)
        assert all(same(p, d) for p, d in zip(owners, dense, strict=True))


def test_a_weight_of_several_pruners_has_no_place_beforehand():
    segment = segment_of(nn.Parameter(torch.randn(5, 6)))
    one, other = MaskedWeight(segment), MaskedWeight(segment)
    assert not one.join("feedback")
    assert other.join("feedback")
    assert prepare(one) is None


def test_hiding_twice_is_once():
    owners = parameters()
    dense = [p.detach().clone() for p in owners]
    weights = masked([segment_of(p) for p in owners])
    hide_all(weights)
    hide_all(weights)
    assert all(same(p, shown(d, w)) for p, d, w in zip(owners, dense, weights, strict=True))
    for in_place in (False, True, False):
        unhide_all(weights, in_place=in_place)
        assert all(same(p, d) for p, d in zip(owners, dense, strict=True))


MEMORY = {"freeze": 1.0, "rewire": 1.0, "project": 1.0, "feedback": 5.002}
"""Bytes held for each fp32 weight: mask and store. docs/modes say them."""
TRAFFIC = {"freeze": 5.0, "rewire": 12.0, "project": 0.0, "feedback": 13.0}
"""Bytes that the launches of one step move for each fp32 weight, at density 0.5 in `rewire`.

In `freeze` the arrival of a gradient moves 9 more."""


def begun(mode, settings):
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 128, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, mode=mode, **settings)
    pruner.refresh()
    return net, optimizer, pruner


SETTINGS = {"rewire": {"density": 0.5}}


@pytest.mark.parametrize("mode", MEMORY)
def test_what_a_mode_holds_for_each_weight(mode):
    _, _, pruner = begun(mode, SETTINGS.get(mode, {}))
    weight = pruner._weights[0]
    buffer = weight.store.buffer
    held = [weight.mask] if buffer is None else [weight.mask, buffer.dense, buffer.sums]
    assert sum(tensor.nbytes for tensor in held) / weight.weight.numel() == pytest.approx(MEMORY[mode], abs=1e-4)
    assert weight.store.packed is None


@pytest.mark.parametrize("mode", TRAFFIC)
def test_what_a_step_moves_for_each_weight(mode, path, monkeypatch):
    if os.environ["EMP_TRITON"] == "0":
        pytest.skip("Triton's kernels")
    net, optimizer, _pruner = begun(mode, SETTINGS.get(mode, {}))
    net(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moved = []

    def counting(inner, mask_at):
        def counted(builder, pointers, *args):
            moved.append(int(args[mask_at].data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
            return inner(builder, pointers, *args)

        return counted

    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name), mask_at))
    net(torch.ones(1, 512)).sum().backward()
    assert not moved, "what arrives is masked by torch's own kernel"
    optimizer.step()
    assert sum(moved) / sum(p.numel() for p in net.parameters()) == pytest.approx(TRAFFIC[mode], abs=0.05)

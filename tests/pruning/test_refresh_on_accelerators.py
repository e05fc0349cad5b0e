"""Whole refreshes on the accelerator's path, with Triton's kernels and with torch's alone, beside those of the host."""

import math

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.core.kernels import search
from tests.accelerator import accelerator_path
from tests.pruning.test_no_waiting import Block

REWIRE = {"mode": "rewire", "density": 0.4}
MODES = {
    f"{mode}, {scope}": {"mode": mode, "scope": scope}
    for mode in ("feedback", "freeze", "project")
    for scope in ("global", "tensor", "row")
} | {
    "rewire, global": REWIRE | {"scope": "global"},
    "rewire, tensor": REWIRE | {"scope": "tensor"},
    "observe, row": {"observe_only": True, "scope": "row"},
}
OTHERS = {
    "wanda": {"criterion": "wanda"},
    "wanda, rows": {"criterion": "wanda", "scope": "row"},
    "wanda, certified": {"criterion": "wanda", "scope": "row", "certify": True},
    "taylor": {"criterion": "taylor", "scope": "tensor"},
    "taylor, certified": {"criterion": "taylor", "certify": True},
    "taylor, rows, freeze": {"criterion": "taylor", "scope": "row", "mode": "freeze"},
    "saliency": {"criterion": "saliency"},
    "random": {"criterion": "random"},
    "at least": {"min_density": 0.7},
    "at least, rows": {"min_density": 0.7, "scope": "row"},
    "shares": {"density": 0.4, "shares": "erk", "scope": "tensor"},
    "shares, rewire": REWIRE | {"shares": "erk", "scope": "tensor"},
    "beta": {"beta": 0.3},
    "pattern": {"pattern": "2:4", "criterion": "taylor"},
    "pattern, freeze": {"pattern": "2:4", "mode": "freeze", "criterion": "wanda"},
    "pattern, rewire": {"pattern": "1:4", "mode": "rewire"},
}
UNITS = {
    f"{target}, {criterion}, {scope}": {"target": target, "criterion": criterion, "scope": scope}
    for target in ("heads", "neurons", "features")
    for criterion in ("taylor", "activation")
    for scope in ("global", "tensor")
} | {
    "heads": {"target": "heads"},
    "neurons, project": {"target": "neurons", "mode": "project"},
    "neurons, freeze": {"target": "neurons", "mode": "freeze", "scope": "tensor"},
    "neurons, no fewer than": {"target": "neurons", "criterion": "taylor", "min_units": 6},
    "features, mean": {"target": "features", "center": "mean"},
}
NEVER_EQUAL = {"seconds"}


class Net(nn.Module):
    """Weights of many kinds: two of (input, output), as in GPT-2, a convolution in groups, one with strides."""

    def __init__(self, dtype):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.first, self.second = Conv1D(20, 24), Conv1D(10, 20)
        self.last = nn.Linear(10, 16)
        self.last.weight = nn.Parameter(torch.randn(10, 16).mul(0.1).t())
        assert not self.last.weight.is_contiguous()
        self.to(dtype)

    def forward(self, x):
        x = self.conv(x.unflatten(1, (4, 4, 4))).flatten(1)
        return self.last(nn.functional.gelu(self.second(nn.functional.gelu(self.first(x)))))


def net_of_blocks(dtype):
    torch.manual_seed(0)
    return nn.Sequential(Block(12), Block(12)).to(dtype)


def outcome(net, dtype, shape, settings):
    """Return masks, values as forward sees them, dense values and rows after six steps and three refreshes."""
    torch.manual_seed(1)
    net = net(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, **settings)
    for at in range(6):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(at)).to(dtype)
        net(x).float().square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    seen = [p.detach().clone() for p in net.parameters()]
    with pruner.dense_weights():
        dense = [p.detach().clone() for p in net.parameters()]
    rows = pruner.trajectory.records()
    assert len({row["step"] for row in rows}) == 3
    return {name: mask.clone() for name, mask in pruner.masks.items()}, seen, dense, rows


def assert_equal(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    for name, mask in theirs[0].items():
        assert torch.equal(ours[0][name], mask), name
    for found, expected in zip(ours[1:3], theirs[1:3], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert_alike(ours[3], theirs[3], "rows")


def assert_alike(found, expected, where):
    """Assert that records are equal, sums of floats but for their order."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - NEVER_EQUAL:
            assert_alike(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, (list, tuple)):
        for at, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{where}, {at}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-12) or found != found != expected != expected, where
    else:
        assert found == expected, where


@pytest.fixture(autouse=True)
def sampled(monkeypatch):
    """Let groups of a few hundred scores be sampled."""
    monkeypatch.setattr(search, "LEAST_SAMPLE", 128)
    monkeypatch.setattr(search, "SAMPLE", 256)


def check(net, dtype, shape, settings):
    expected = outcome(net, dtype, shape, settings)
    for triton in (True, False):
        with accelerator_path(triton):
            assert_equal(outcome(net, dtype, shape, settings), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("setting", MODES)
def test_modes_and_scopes(setting, dtype):
    check(Net, dtype, (16, 64), MODES[setting])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", OTHERS)
def test_criteria_and_rules(setting):
    check(Net, torch.float32, (16, 64), OTHERS[setting])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", UNITS)
def test_units(setting):
    check(net_of_blocks, torch.float32, (3, 5, 12), UNITS[setting])

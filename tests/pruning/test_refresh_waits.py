"""How often a refresh, with the step that follows it, waits for an accelerator: a few times, whatever the layers."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner
from tests.accelerator import accelerator_path, no_waiting
from tests.pruning.test_no_waiting import Block

MOST = 12
REWIRE = {"mode": "rewire", "density": 0.4}
WEIGHTS = (
    {
        f"{mode}, {scope}": {"mode": mode, "scope": scope}
        for mode in ("feedback", "freeze", "project")
        for scope in ("global", "tensor", "row")
    }
    | {f"rewire, {scope}": REWIRE | {"scope": scope} for scope in ("global", "tensor")}
    | {
        f"{criterion}, {scope}": {"criterion": criterion, "scope": scope}
        for criterion in ("taylor", "wanda")
        for scope in ("global", "tensor", "row")
    }
    | {
        "saliency, freeze": {"criterion": "saliency", "mode": "freeze"},
        "random": {"criterion": "random"},
        "observe": {"observe_only": True},
        "rewire, random": REWIRE | {"grow": "random"},
        "pattern": {"pattern": "1:2"},
        "pattern, freeze, wanda": {"pattern": "1:2", "mode": "freeze", "criterion": "wanda"},
        "pattern, rewire": {"pattern": "1:2", "mode": "rewire", "drop_fraction": 0.6},
        "shares": {"density": 0.4, "shares": "erk", "scope": "tensor"},
        "taylor, certified": {"criterion": "taylor", "certify": True},
    }
)
UNITS = {
    f"{target}, {mode}, {scope}": {"target": target, "mode": mode, "scope": scope}
    for target in ("heads", "neurons", "features")
    for mode in ("feedback", "freeze", "project")
    for scope in ("global", "tensor")
    if (target, mode) != ("features", "project")
} | {
    f"{target}, {criterion}": {"target": target, "criterion": criterion, "min_units": 0}
    for target in ("heads", "neurons", "features")
    for criterion in ("taylor", "activation")
} | {
    "features, mean": {"target": "features", "center": "mean"},
    "features, dynamic": {"target": "features", "dynamic": True},
    "neurons, no fewer than": {"target": "neurons", "criterion": "taylor", "min_units": 6},
}  # fmt: skip


def waits_of(settings, net, width):
    """Return the waits, by place, of a second refresh and of the step after it."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, **settings)

    def step(at):
        x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(at))
        net(x).square().mean().backward()
        optimizer.step()
        events = pruner.step()
        optimizer.zero_grad()
        return events

    for at in range(3):
        step(at)
    with no_waiting(refuse=False) as watch:
        assert step(3)
        step(4)
    return watch.waits


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(x)


def linears(count):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual() for _ in range(count)))


def blocks(count):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(4) for _ in range(count)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", WEIGHTS | UNITS)
def test_a_refresh_waits_a_few_times_whatever_the_number_of_layers(setting):
    settings = (WEIGHTS | UNITS)[setting]
    net, width = (linears, 6) if setting in WEIGHTS else (blocks, 4)
    with accelerator_path():
        few, many = (waits_of(settings, net(count), width) for count in (3, 12))
    assert few == many
    assert many.total() <= MOST, many

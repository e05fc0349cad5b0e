"""What "cleared" means for what optimizers remember of a weight."""

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner


class EightBit(torch.optim.SGD):
    """Keeps its momentum as bitsandbytes does: codes, a table of what they stand for, a scale per block."""

    table = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "state1" not in state:
                    state["state1"] = torch.full_like(p, 200, dtype=torch.uint8)
                    if self.table:
                        state["qmap1"] = torch.arange(-127, 129) / 128
                    state["absmax1"] = torch.ones(1)
        return super().step(closure)


def trained(optimizer_class, mode, **settings):
    torch.manual_seed(0)
    net = nn.Linear(8, 8, bias=False)
    optimizer = optimizer_class(net.parameters(), lr=0.01, **settings)
    pruner = EMPPruner(net, optimizer, mode=mode)
    for _ in range(2):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        pruner.step()
    return net, optimizer, pruner


@pytest.mark.parametrize("mode", ["project", "freeze"])
def test_codes_are_set_to_the_code_of_zero(mode):
    net, optimizer, pruner = trained(EightBit, mode)
    state = optimizer.state[net.weight]
    pruner.refresh()
    pruned = ~pruner.masks["weight"]
    code = int(state["qmap1"].abs().argmin())
    assert code == 127
    assert state["qmap1"][code] == 0
    assert set(state["state1"][pruned].tolist()) == {code}
    assert set(state["state1"][~pruned].tolist()) == {200}


@pytest.mark.parametrize("mode", ["project", "freeze"])
def test_codes_without_a_table_are_refused_before_anything_changed(mode, monkeypatch):
    monkeypatch.setattr(EightBit, "table", False)
    net, _, pruner = trained(EightBit, mode)
    before = net.weight.detach().clone()
    with pytest.raises(TypeError, match=r"EightBit keeps 'state1' .* torch.uint8.*mode='feedback'"):
        pruner.refresh()
    assert torch.equal(net.weight, before)
    assert pruner.masks["weight"].all()


def test_feedback_clears_nothing_and_takes_any_optimizer(monkeypatch):
    monkeypatch.setattr(EightBit, "table", False)
    net, optimizer, pruner = trained(EightBit, "feedback")
    pruner.refresh()
    assert set(optimizer.state[net.weight]["state1"].flatten().tolist()) == {200}


@pytest.mark.parametrize(
    ("kind", "key", "settings", "neutral"),
    [
        (torch.optim.Rprop, "step_size", {}, 0.01),
        (torch.optim.Adagrad, "sum", {"initial_accumulator_value": 0.25}, 0.25),
        (torch.optim.AdamW, "exp_avg_sq", {}, 0.0),
    ],
)
def test_a_cleared_weight_is_to_the_optimizer_as_one_that_never_moved(kind, key, settings, neutral):
    net, optimizer, pruner = trained(kind, "project", **settings)
    pruner.refresh()
    pruned = ~pruner.masks["weight"]
    values = optimizer.state[net.weight][key]
    assert torch.equal(values[pruned], torch.full_like(values[pruned], neutral))
    assert not torch.equal(values[~pruned], torch.full_like(values[~pruned], neutral))
    assert pruner.audit().clean

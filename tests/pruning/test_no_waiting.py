"""The accelerator's path: no waiting between refreshes, few kernels, and the numbers of a CPU."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import _disable_current_modes

from emp_callbacks import EMPPruner
from emp_callbacks.layer.mask_mode import Freeze
from tests.accelerator import PACKAGE, WaitError, accelerator_path, no_waiting

WEIGHTS = {
    "feedback": {},
    "feedback, rows": {"scope": "row"},
    "project": {"mode": "project"},
    "freeze": {"mode": "freeze"},
    "rewire": {"mode": "rewire", "density": 0.4},
    "rewire, random": {"mode": "rewire", "density": 0.4, "grow": "random"},
    "pattern": {"pattern": "2:4"},
    "rewire, pattern": {"mode": "rewire", "pattern": "2:4"},
    "observe": {"observe_only": True},
    "taylor": {"criterion": "taylor"},
    "saliency, freeze": {"criterion": "saliency", "mode": "freeze"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda, certified": {"criterion": "wanda", "scope": "row", "certify": True},
    "random": {"criterion": "random"},
}
UNITS = {
    "heads": {"target": "heads"},
    "heads, freeze": {"target": "heads", "mode": "freeze"},
    "heads, taylor": {"target": "heads", "criterion": "taylor"},
    "heads, activation": {"target": "heads", "criterion": "activation"},
    "neurons": {"target": "neurons"},
    "neurons, saliency": {"target": "neurons", "criterion": "saliency"},
    "neurons, activation": {"target": "neurons", "criterion": "activation"},
    "features": {"target": "features"},
    "features, mean": {"target": "features", "center": "mean"},
    "features, taylor": {"target": "features", "criterion": "taylor"},
    "features, dynamic": {"target": "features", "dynamic": True},
    "features, dynamic, gumbel": {"target": "features", "dynamic": True, "choose": "gumbel", "rescale": True},
    "attention edges": {"target": "attention_edges"},
}
SETTINGS = WEIGHTS | UNITS
EVERY = 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.down(self.act(self.up(x)))


def net_of(blocks=2, width=12):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)), nn.LayerNorm(width))


def begin(settings, blocks=2, every=EVERY):
    net = net_of(blocks)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    return net, optimizer, EMPPruner(net, optimizer, every_n_steps=every, **settings)


def backward(net, at):
    generator = torch.Generator().manual_seed(at)
    net(torch.randn(3, 5, 12, generator=generator)).square().mean().backward()


def step(net, optimizer, pruner, at, clip=None):
    backward(net, at)
    if clip is not None:
        with _disable_current_modes():  # under them torch counts no writes of its foreach operators
            nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    events = pruner.step()
    optimizer.zero_grad()
    return events


def outcome(net, pruner):
    state = pruner.state_dict()
    with pruner.dense_weights():
        dense = [p.detach().clone() for p in net.parameters()]
    return [*(p.detach().clone() for p in net.parameters()), *dense, *pruner.masks.values(), *state["stash"].values()]


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_between_refreshes_wait_for_nothing_and_equal_those_of_a_cpu(setting, triton):
    torch.manual_seed(1)
    net, optimizer, pruner = begin(SETTINGS[setting])
    assert sum(bool(step(net, optimizer, pruner, at)) for at in range(8)) == 2
    expected = outcome(net, pruner)
    with accelerator_path(triton):
        torch.manual_seed(1)
        net, optimizer, pruner = begin(SETTINGS[setting])
        for at in range(8):
            if at % EVERY == EVERY - 1:  # the refresh is after the update
                step(net, optimizer, pruner, at)
            else:
                with no_waiting(refuse=at > 0):  # at the first step of all it is said whether a model is sparse already
                    step(net, optimizer, pruner, at)
        found = outcome(net, pruner)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_averages_are_updated_without_waiting(mode):
    with accelerator_path():
        net, optimizer, pruner = begin({"mode": mode}, every=100)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        pruner.add_average(average)
        step(net, optimizer, pruner, 0)
        pruner.refresh()
        average.update_parameters(net)
        with no_waiting():
            step(net, optimizer, pruner, 1)
            average.update_parameters(net)
        assert all(bool((average.module.get_parameter(n)[~m] == 0).all()) for n, m in pruner.masks.items())


def test_values_that_something_else_writes_at_every_step_cost_no_wait():
    with accelerator_path():
        for mode in ("feedback", "freeze", "rewire"):
            net, optimizer, pruner = begin({"mode": mode} | ({"density": 0.4} if mode == "rewire" else {}), every=100)
            step(net, optimizer, pruner, 0)
            pruner.refresh()
            with no_waiting():
                for at in (1, 2):
                    with torch.no_grad():
                        for p in net.parameters():
                            p.clamp_(-0.1, 0.1)
                    step(net, optimizer, pruner, at)


PLANTS = [
    "weight.weight.sum().item()",
    "bool(weight.weight.any())",
    "int(weight.mask.sum())",
    "weight.weight.tolist()",
    "weight.weight.numpy()",
    "weight.weight.cpu()",
    "weight.weight.to('cpu')",
    "weight.weight.masked_select(weight.mask)",
    "weight.weight[weight.mask]",
    "weight.weight.__setitem__(weight.mask, 0)",
    "weight.mask.nonzero()",
    "torch.equal(weight.weight, weight.weight)",
    "torch.zeros(3).to(weight.weight.device)",
    "torch.tensor([1.0], device=weight.weight.device)",
    "torch.empty(weight.weight.shape).copy_(weight.weight)",
    "weight.weight[torch.arange(3)]",
    "weight.weight[[0, 1]]",
]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wait_is_seen(plant, monkeypatch):
    inner, code = Freeze.after_update, compile(plant, f"{PACKAGE}/planted.py", "eval")

    def waiting(self, weights):
        eval(code, {"weight": weights[0], "torch": torch})
        inner(self, weights)

    with accelerator_path():
        net, optimizer, pruner = begin({"mode": "freeze"})
        pruner.refresh()
        monkeypatch.setattr(Freeze, "after_update", waiting)
        with no_waiting(refuse=False) as watch:
            step(net, optimizer, pruner, 0)
        assert any("planted.py" in at for at in watch.waits)
        with no_waiting(), pytest.raises(WaitError, match=r"planted.py:1 would wait"):
            step(net, optimizer, pruner, 1)


KERNELS = {  # setting -> launches of a step: those for all weights together, and those for each
    "feedback": (2, 0),
    "freeze": (1, 1),
    "freeze, clipped": (2, 1),
    "rewire": (2, 0),
    "project": (0, 0),
    "observe": (0, 0),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", KERNELS)
def test_what_a_step_launches_does_not_grow_with_the_layers(setting):
    name, clipped = setting.removesuffix(", clipped"), setting.endswith("clipped")
    for blocks in (2, 12):
        with accelerator_path():
            net, optimizer, pruner = begin(SETTINGS[name], blocks, every=100)
            step(net, optimizer, pruner, 0)
            pruner.refresh()
            step(net, optimizer, pruner, 1)
            with no_waiting() as watch:
                step(net, optimizer, pruner, 2, clip=0.01 if clipped else None)
        together, each = KERNELS[setting]
        launches = sum(watch.launches.values())
        assert (launches, watch.kernels.pop("where", 0)) == (together, each * 4 * blocks)
        # What is left is of the few values of one weight that are looked at, for writes that leave no trace.
        assert sum(watch.kernels.values()) <= (24 if name in ("freeze", "rewire") else 0), watch.kernels

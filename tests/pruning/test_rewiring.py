"""Mode "rewire" against a loop by hand, and the other ways of giving a density."""

import copy
import math

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, Ramp

REWIRE = {"mode": "rewire", "density": 0.25, "every_n_steps": 4, "evidence_steps": 1}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False)).double()


def loss_of(net, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(net(x), torch.randint(6, (20,), generator=generator))


def train(net, pruner, optimizer, steps, first=0):
    for step in range(first, steps):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        pruner.step()


def top(scores, count):
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:count]] = True
    return mask.view(scores.shape)


def rigl_by_hand(net, steps, fraction):
    """RigL with plain SGD, uniform densities: algorithm 1 of Evci et al.; magnitudes at the first refresh."""
    weights = list(net.parameters())
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    for step in range(steps):
        grads = torch.autograd.grad(loss_of(net, step), weights)
        with torch.no_grad():
            for w, g, m in zip(weights, grads, masks, strict=True):
                w -= 0.5 * g * m
            if (step + 1) % 4 == 0:
                for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                    keep = math.floor(0.25 * w.numel())
                    if step + 1 == 4:
                        masks[i] = top(w.abs(), keep)
                    else:
                        stays = top(w.abs() * masks[i], round((1 - fraction) * keep))
                        grown = top(torch.where(stays, -1.0, g.abs()), keep - int(stays.sum()))
                        masks[i] = stays | grown
                    w *= masks[i]
    return masks, weights


@pytest.mark.parametrize("fraction", [0.3, 0.0])
def test_gradient_growth_is_rigl(fraction):
    net, by_hand = make_net(), make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    pruner = EMPPruner(net, optimizer, scope="tensor", drop_fraction=fraction, **REWIRE)
    train(net, pruner, optimizer, 14)
    masks, weights = rigl_by_hand(by_hand, 14, fraction)
    for ours, mask, own, weight in zip(pruner.masks.values(), masks, net.parameters(), weights, strict=True):
        assert torch.equal(ours, mask)
        torch.testing.assert_close(own.detach(), weight.detach())
    assert pruner.density == pytest.approx(0.25)
    moved = [event.regrown for event in pruner.trajectory if event.step > 4]
    assert all(moved) if fraction else not any(moved)


def test_random_growth_draws_anew_at_each_refresh_and_follows_the_seed():
    def grown(seed):
        torch.manual_seed(seed)
        pruner_net = make_net()
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(pruner_net.parameters(), lr=0.0)  # magnitudes stay: only the draw decides
        pruner = EMPPruner(pruner_net, optimizer, grow="random", **REWIRE)
        seen = []
        for step in range(12):
            train(pruner_net, pruner, optimizer, step + 1, step)
            if (step + 1) % 4 == 0:
                seen.append(pruner.masks["0.weight"].clone())
        return seen

    _, second, third = grown(1)
    assert not torch.equal(second, third), "another draw"
    again, other = grown(1), grown(2)
    assert torch.equal(third, again[2])
    assert not torch.equal(third, other[2])


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_resumed_run_rewires_as_one_that_never_stopped(grow):
    settings = {**REWIRE, "grow": grow, "drop_fraction": Ramp(first=0.4, last=0.1, until=16, shape="cosine")}
    settings |= {"scope": "tensor", "shares": "erk", "evidence_steps": 2}
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    pruner = EMPPruner(net, optimizer, **settings)
    train(net, pruner, optimizer, 11)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), pruner.state_dict()])
    train(net, pruner, optimizer, 17, 11)

    resumed = make_net()
    torch.manual_seed(99)  # of another process: the seed of what is drawn comes from the checkpoint
    again = torch.optim.AdamW(resumed.parameters(), lr=0.05)
    successor = EMPPruner(resumed, again, **settings)
    for part, state in zip((resumed, again, successor), saved, strict=True):
        part.load_state_dict(state)
    train(resumed, successor, again, 17, 11)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(mask, successor.masks[name]) for name, mask in pruner.masks.items())


def test_grown_weights_start_at_zero_without_momentum():
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    pruner = EMPPruner(net, optimizer, **REWIRE)
    train(net, pruner, optimizer, 4)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    train(net, pruner, optimizer, 8, 4)
    for name, weight in net.named_parameters():
        grown = pruner.masks[name] & ~before[name]
        assert grown.any()
        assert not weight.detach()[grown].any()
        assert not optimizer.state[weight]["exp_avg"][grown].any()
        assert not weight.detach()[~pruner.masks[name]].any()


def test_where_nothing_pruned_has_a_gradient_nothing_is_grown_and_the_row_says_so():
    net = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.arange(1.0, 17.0).view(4, 4) * torch.tensor([100.0, 1.0, 0.01, 0.01]))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    pruner = EMPPruner(net, optimizer, **{**REWIRE, "density": 0.5})
    for _ in range(8):
        optimizer.zero_grad()
        net(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).sum().backward()
        optimizer.step()
        pruner.step()
    first, last = pruner.trajectory
    assert (first.keep, first.note) == (8, "")
    assert last.keep == 6
    assert last.note == "only 0 of 2 weights were grown: no others have a gradient"


@pytest.mark.parametrize("density", [0.9, 1.0])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_layer_that_is_nearly_dense_keeps_its_density(density, grow):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, scope="tensor", **{**REWIRE, "density": density, "grow": grow})
    train(net, pruner, optimizer, 12)
    assert [event.keep for event in pruner.trajectory] == 3 * [math.floor(density * 192), math.floor(density * 96)]


def test_a_layer_without_gradient_keeps_its_mask_while_the_others_are_rewired():
    net = make_net()
    net.append(nn.Linear(6, 6, bias=False).double())  # never used
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    pruner = EMPPruner(net, optimizer, scope="tensor", **REWIRE)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(net[:3], step).backward()
        optimizer.step()
        pruner.step()
    regrown = {event.group: event.regrown for event in pruner.trajectory if event.step == 8}
    assert (regrown["0.weight"] > 0, regrown["2.weight"] > 0, regrown["3.weight"]) == (True, True, 0)
    assert int(pruner.masks["3.weight"].sum()) == 9


def test_a_layer_that_is_thawed_later_has_the_density_itself():
    net = make_net()
    net[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    settings = {"density": 0.5, "scope": "tensor", "mode": "freeze", "shares": {"0.weight": 1.0}, "every_n_steps": 2}
    pruner = EMPPruner(net, optimizer, **settings)
    train(net, pruner, optimizer, 2)
    net[2].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"pruned from here on, too: 2\.weight"):
        train(net, pruner, optimizer, 4, 2)
    assert {name: float(mask.float().mean()) for name, mask in pruner.masks.items()} == {
        "0.weight": 0.5,
        "2.weight": 0.5,
    }


def test_a_density_ramp_prunes_along_a_cubic_curve():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ramp = Ramp(first=1.0, last=0.2, begin=2, until=10, shape="cubic")
    pruner = EMPPruner(net, optimizer, every_n_steps=2, mode="freeze", density=ramp)
    train(net, pruner, optimizer, 14)
    n = sum(p.numel() for p in net.parameters())
    expected = [math.floor(ramp.at(step) * n + 1e-9) for step in (2, 4, 6, 8, 10, 12, 14)]
    assert [event.keep for event in pruner.trajectory] == expected
    assert expected[0] == n
    assert expected[-1] == math.floor(0.2 * n)


def test_layers_share_a_density_by_name_and_a_wrong_name_is_refused():
    net = make_net()
    pruner = EMPPruner(net, density=0.3, scope="tensor", mode="project", shares={"0.weight": 1, "2.weight": 2})
    pruner.refresh()
    kept = {name: float(mask.float().mean()) for name, mask in pruner.masks.items()}
    assert kept["2.weight"] == pytest.approx(2 * kept["0.weight"], abs=0.02)
    assert pruner.density == pytest.approx(0.3, abs=0.01)
    none = EMPPruner(make_net(), density=0.3, scope="tensor", mode="project", shares={"0.weight": 0, "2.weight": 1})
    with pytest.warns(UserWarning, match=r"next to nothing is kept of 0\.weight"):
        none.refresh()
    assert int(none.masks["0.weight"].sum()) == 1, "a share of 0 leaves the one weight that a group keeps at least"
    with pytest.raises(ValueError, match=r"each pruned layer once; not in both: 2\.weight, 3\.weight"):
        EMPPruner(make_net(), density=0.3, scope="tensor", shares={"0.weight": 1, "3.weight": 2})

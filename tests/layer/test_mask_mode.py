"""Each mode against the same training written out by hand, bit for bit: weights, gradients, optimizer state."""

import copy
import itertools

import pytest
import torch
from torch import nn

from emp_callbacks import EMPPruner, emp_mask

pytestmark = pytest.mark.usefixtures("either_path")
STEPS, EVERY = 9, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(5, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator)


def backward(net: nn.Module, step: int, micro_steps: int, amp: bool) -> float:
    for micro in range(micro_steps):
        x, y = batch(step, micro)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(net(x), y) / micro_steps
        loss.backward()
    return loss.item()


class ByHand:
    """The definition of the three modes in plain torch: full dense copies, boolean products."""

    def __init__(self, mode: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.mode, self.net, self.optimizer = mode, net, optimizer
        self.weights = [net[0].weight, net[2].weight]
        self.masks = [torch.ones_like(w, dtype=torch.bool) for w in self.weights]
        self.dense = [w.detach().clone() for w in self.weights]

    @torch.no_grad()
    def set(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def step(self, clip: float | None) -> None:
        if self.mode == "freeze":
            for weight, mask in zip(self.weights, self.masks, strict=True):
                weight.grad.mul_(mask)
        if clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), clip)
        if self.mode == "feedback":
            self.set(self.dense)
        self.optimizer.step()
        self.dense = [w.clone() for w in self.weights]
        if self.mode != "project":
            self.set([w * m for w, m in zip(self.weights, self.masks, strict=True)])

    @torch.no_grad()
    def refresh(self) -> None:
        source = self.dense if self.mode == "feedback" else self.weights
        flat = emp_mask(torch.cat([w.flatten() for w in source]))
        self.masks = [m.view(w.shape) for m, w in zip(flat.split([54, 36]), self.weights, strict=True)]
        self.set([w * m for w, m in zip(source, self.masks, strict=True)])
        if self.mode != "feedback":
            for weight, mask in zip(self.weights, self.masks, strict=True):
                if self.mode == "freeze":
                    weight.grad.mul_(mask)  # a gradient that waits for the next step
                for value in self.optimizer.state[weight].values():
                    if torch.is_tensor(value) and value.shape == weight.shape:
                        value.mul_(mask)


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize(
    ("optimizer", "micro_steps", "clip", "amp"),
    list(itertools.product(OPTIMIZERS, [1, 2], [None, 0.05], [False, True])),
)
def test_every_step_equals_the_mode_written_by_hand(mode, optimizer, micro_steps, clip, amp):
    ours, theirs = model(), model()
    our_optimizer, their_optimizer = (
        OPTIMIZERS[optimizer](ours.parameters()),
        OPTIMIZERS[optimizer](theirs.parameters()),
    )
    pruner = EMPPruner(ours, our_optimizer, every_n_steps=EVERY, mode=mode)
    by_hand = ByHand(mode, theirs, their_optimizer)
    grown_back = 0
    for step in range(STEPS):
        assert backward(ours, step, micro_steps, amp) == backward(theirs, step, micro_steps, amp)
        if clip:
            nn.utils.clip_grad_norm_(ours.parameters(), clip)
        our_optimizer.step()
        by_hand.step(clip)
        events = pruner.step()
        assert bool(events) == ((step + 1) % EVERY == 0)
        if events:
            by_hand.refresh()
        compare(ours, theirs, our_optimizer, their_optimizer)
        for mask, expected in zip(pruner.masks.values(), by_hand.masks, strict=True):
            assert torch.equal(mask, expected)
        grown_back += sum(int((w[~m] != 0).sum()) for w, m in zip(by_hand.weights, by_hand.masks, strict=True))
        our_optimizer.zero_grad()
        their_optimizer.zero_grad()
    assert (grown_back > 0) == (mode == "project"), "only project lets pruned weights grow"
    with pruner.dense_weights():
        if mode == "feedback":
            for weight, dense in zip([ours[0].weight, ours[2].weight], by_hand.dense, strict=True):
                assert torch.equal(weight, dense)
    assert 0 < pruner.density < 1


def compare(ours, theirs, our_optimizer, their_optimizer):
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)
        assert torch.equal(ours_p.grad, theirs_p.grad)
        our_state, their_state = our_optimizer.state[ours_p], their_optimizer.state[theirs_p]
        assert our_state.keys() == their_state.keys()
        for key, value in our_state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(their_state[key])), key


def train(pruner, net, optimizer, first, last):
    for step in range(first, last):
        backward(net, step, 1, amp=False)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


@pytest.mark.parametrize("mode", ["project", "freeze"])
def test_compounding_modes_get_sparser_and_feedback_does_not(mode):
    densities = {}
    for name in ("feedback", mode):
        net = model()
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        pruner = EMPPruner(net, optimizer, every_n_steps=1, mode=name)
        train(pruner, net, optimizer, 0, 12)
        densities[name] = pruner.density
    assert densities[mode] < densities["feedback"] - 0.1


def test_min_density_limits_the_compounding():
    net = model()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner = EMPPruner(net, optimizer, every_n_steps=1, mode="freeze", min_density=0.5)
    train(pruner, net, optimizer, 0, 12)
    assert pruner.density == 0.5
    assert pruner.trajectory[-1].mass_bound is None, "the bound speaks of floor(N_eff), not of the guard"


def test_stop_ends_the_refreshes_and_keeps_the_mask():
    net = model()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = EMPPruner(net, optimizer, every_n_steps=2, stop=4, mode="freeze")
    train(pruner, net, optimizer, 0, 4)
    mask = pruner.masks["0.weight"]
    train(pruner, net, optimizer, 4, 10)
    assert [event.step for event in pruner.trajectory] == [2, 4]
    assert torch.equal(mask, pruner.masks["0.weight"])
    assert bool((net[0].weight[~mask] == 0).all())


def test_a_closure_sees_masked_weights_and_updates_dense_ones():
    plain, lbfgs_like = model(), model()
    outcomes = []
    for net, with_closure in ((plain, False), (lbfgs_like, True)):
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        pruner = EMPPruner(net, optimizer, every_n_steps=2)
        for step in range(6):
            optimizer.zero_grad()
            if with_closure:
                seen = []

                def closure(net=net, step=step, pruner=pruner, seen=seen):
                    seen.append(
                        [
                            bool((w[~m] == 0).all())
                            for w, m in zip((net[0].weight, net[2].weight), pruner.masks.values(), strict=True)
                        ]
                    )
                    backward(net, step, 1, amp=False)

                optimizer.step(closure)
                assert seen == [[True, True]]
            else:
                backward(net, step, 1, amp=False)
                optimizer.step()
            pruner.step()
        outcomes.append(copy.deepcopy(net.state_dict()))
    for name, value in outcomes[0].items():
        assert torch.equal(value, outcomes[1][name])


def test_lbfgs_runs_with_feedback():
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    for _ in range(3):
        optimizer.step(lambda: (optimizer.zero_grad(), torch.as_tensor(backward(net, 0, 1, amp=False)))[1])
        pruner.step()
    assert pruner.steps == 3
    assert bool((net[0].weight[~pruner.masks["0.weight"]] == 0).all())

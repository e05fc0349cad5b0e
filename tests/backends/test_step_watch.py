"""Whatever way an optimizer rewrites weights: it finds the dense ones, and forward finds the masked ones after it."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from emp_callbacks import EMPPruner


def net_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def backward(net, seed=0):
    net(torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def is_masked(net, pruner):
    parameters = dict(net.named_parameters())
    return all(bool((parameters[name][~mask] == 0).all()) for name, mask in pruner.masks.items())


def dense_of(net, pruner):
    with pruner.dense_weights():
        return [p.detach().clone() for p in net.parameters()]


class SharpnessAware(torch.optim.Optimizer):
    """Climbs to w + rho g / |g|, takes the gradient there, goes back, and lets a base optimizer step."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        every = [p for group in self.param_groups for p in group["params"]]
        size = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            self.state[p]["before"] = p.detach().clone()
            p.add_(p.grad * (self.defaults["rho"] / size))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["before"]
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SharpnessAwareInOne(torch.optim.SGD):
    """The same written as one method, which saves the weights before it calls the closure."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, lr=lr)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure):
        every = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in every]
        size = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            p.add_(p.grad * (self.rho / size))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, old in zip(every, before, strict=True):
            p.copy_(old)
        super().step()


@pytest.mark.parametrize("form", ["halves", "closure", "in one"])
def test_sharpness_aware_steps_move_the_dense_weights_by_the_gradient_at_the_climbed_masked_ones(form):
    net, lr, rho = net_of(), 0.1, 0.05
    kind = SharpnessAwareInOne if form == "in one" else SharpnessAware
    optimizer = kind(net.parameters(), lr, rho)
    pruner = EMPPruner(net, optimizer, every_n_steps=100)
    pruner.refresh()
    dense, masks = dense_of(net, pruner), {n: pruner.masks.get(n) for n, _ in net.named_parameters()}
    twin = net_of()  # the same by hand
    with torch.no_grad():
        for (name, p), d in zip(twin.named_parameters(), dense, strict=True):
            p.copy_(d if masks[name] is None else d * masks[name])
    backward(twin, 1)
    size = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
    with torch.no_grad():
        for (name, p), d in zip(twin.named_parameters(), dense, strict=True):
            climbed = d + p.grad * (rho / size)
            p.copy_(climbed if masks[name] is None else climbed * masks[name])
    twin.zero_grad()
    backward(twin, 1)
    expected = [d - lr * p.grad for d, p in zip(dense, twin.parameters(), strict=True)]

    backward(net, 1)
    if form == "halves":
        optimizer.first_step()
        assert is_masked(net, pruner), "the second forward sees masked weights, too"
        backward(net, 1)
        optimizer.second_step()
    else:
        optimizer.step(lambda: backward(net, 1))
    pruner.step()
    assert pruner.steps == 1
    assert is_masked(net, pruner)
    for got, wanted in zip(dense_of(net, pruner), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("scheduler", [None, "before", "after"])
def test_lookahead_is_counted_from_the_first_step_and_synchronises_dense_weights(mode, scheduler):
    def run(mask):
        net = net_of()
        optimizer = create_optimizer_v2(net, opt="lookahead_adamw", lr=0.02, weight_decay=0.01)
        make = torch.optim.lr_scheduler.StepLR
        plan = make(optimizer, 7) if scheduler == "before" else None
        pruner = EMPPruner(net, optimizer, every_n_steps=5, mode=mode) if mask else None
        plan = make(optimizer, 7) if scheduler == "after" else plan
        for step in range(20):
            net.zero_grad()
            backward(net, step)
            optimizer.step()
            if plan is not None:
                plan.step()
            if pruner is not None:
                pruner.step()
                assert mode == "project" or is_masked(net, pruner) or not pruner.trajectory
        return net, pruner

    net, pruner = run(True)
    assert pruner.steps == 20
    assert [event.step for event in pruner.trajectory] == [5, 10, 15, 20]
    assert is_masked(net, pruner)


def test_lookahead_forgets_what_project_pruned():
    net = net_of()
    optimizer = create_optimizer_v2(net, opt="lookahead_sgd", lr=0.0, weight_decay=0.0)
    pruner = EMPPruner(net, optimizer, mode="project")
    for step in range(12):
        backward(net, step)
        optimizer.step()
        pruner.step()
        if step == 5:
            pruner.refresh()
    assert is_masked(net, pruner), "with lr = 0 nothing grows; the slow copy must not bring it back"


class Bare(torch.optim.Optimizer):
    """A wrapper as third parties write it: Optimizer.__init__ is never called."""

    def __init__(self, inner):
        self.optimizer, self.param_groups, self.state, self.defaults = inner, inner.param_groups, {}, inner.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Alone(torch.optim.Optimizer):
    """Its own arithmetic, and nobody's hooks."""

    def __init__(self, params):
        self.param_groups, self.state, self.defaults = [{"params": list(params)}], {}, {}

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", ["bare", "alone"])
def test_optimizers_that_torch_cannot_hook(kind, closure):
    net, twin = net_of(), net_of()
    optimizer = Bare(torch.optim.SGD(net.parameters(), 0.1)) if kind == "bare" else Alone(net.parameters())
    pruner = EMPPruner(net, optimizer, criterion="taylor", every_n_steps=3)
    plain = EMPPruner(twin, sgd := torch.optim.SGD(twin.parameters(), 0.1), criterion="taylor", every_n_steps=3)
    for step in range(6):
        for model, one, of in ((net, optimizer, pruner), (twin, sgd, plain)):
            model.zero_grad()
            if closure:
                one.step(lambda model=model, step=step: backward(model, step))
            else:
                backward(model, step)
                one.step()
            of.step()
    assert pruner.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in plain.masks.items())


class ScheduleFree(torch.optim.SGD):
    """SGD whose weights for evaluation are others: x in eval(), y in train(), z in its state."""

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], 0.5)

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(2).sub_(self.state[p]["z"])


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_schedule_free_optimizers_evaluate_masked_weights_and_go_on_with_the_dense(mode):
    net = net_of()
    optimizer = ScheduleFree(net.parameters(), lr=0.1)
    for p in net.parameters():
        optimizer.state[p]["z"] = torch.randn_like(p)
    pruner = EMPPruner(net, optimizer, mode=mode)
    pruner.refresh()
    before = dense_of(net, pruner)
    expected = [p.lerp(optimizer.state[q]["z"], 0.5) for p, q in zip(before, net.parameters(), strict=True)]
    optimizer.eval()
    assert is_masked(net, pruner)
    for got, wanted in zip(dense_of(net, pruner), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    optimizer.train()
    assert is_masked(net, pruner)
    for got, wanted in zip(dense_of(net, pruner), before, strict=True):
        torch.testing.assert_close(got, wanted)


# ---- optimizers that nobody named ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_an_optimizer_made_in_the_middle_of_a_run_is_followed(mode):
    net, reference = net_of(), net_of()
    for model, named in ((net, False), (reference, True)):
        first = torch.optim.AdamW(model.parameters(), lr=0.02)
        second = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = EMPPruner(model, [first, second] if named else first, every_n_steps=3, mode=mode)
        for step in range(12):
            optimizer = first if step < 5 else second
            model.zero_grad()
            backward(model, step)
            optimizer.step()
            pruner.step()
        assert pruner.audit().clean
        assert [event.step for event in pruner.trajectory] == [3, 6, 9, 12]
        pruner.finalize()
        assert "step" not in vars(second), "what was found is left as it was, too"
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def test_without_an_optimizer_any_is_followed_and_others_are_left_alone():
    net, other = net_of(), net_of(1)
    mine, theirs = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    pruner = EMPPruner(net, every_n_steps=2)
    for step in range(4):
        for model, optimizer in ((net, mine), (other, theirs)):
            model.zero_grad()
            backward(model, step)
            optimizer.step()
        pruner.step()
    assert (pruner.steps, len(pruner.trajectory)) == (4, 2)
    assert "step" in vars(mine)
    assert "step" not in vars(theirs)
    pruner.finalize()
    assert "step" not in vars(mine)


# ---- what can go wrong inside step() ------------------------------------------------------------------------------


class Fails(torch.optim.SGD):
    when = "after"

    def step(self, closure=None):
        if self.when == "before":
            raise torch.OutOfMemoryError("first")
        super().step(closure)
        if self.when == "after":
            raise torch.OutOfMemoryError("last")


@pytest.mark.parametrize("mode", ["feedback", "freeze"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_raises_leaves_the_model_masked(when, mode):
    net = net_of()
    optimizer = Fails(net.parameters(), lr=0.1)
    optimizer.when = ""
    pruner = EMPPruner(net, optimizer, mode=mode)
    backward(net)
    optimizer.step()
    pruner.refresh()
    optimizer.when = when
    backward(net)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert is_masked(net, pruner), "the next forward"
    optimizer.when = ""
    optimizer.step()
    assert is_masked(net, pruner)


# ---- what the optimizers are to others ----------------------------------------------------------------------------


def test_copies_and_pickles_of_a_watched_optimizer_are_plain_and_nothing_stays_behind():
    net = net_of()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "step" not in vars(other)
        assert type(other.step).__name__ == "method"
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    pruner.finalize()
    backward(net)
    optimizer.step()
    plan.step()
    assert pruner.steps == 0


def test_several_optimizers_of_one_batch_are_one_step():
    net = net_of()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (net[0], net[2])]
    pruner = EMPPruner(net, optimizers, every_n_steps=2)
    for step in range(4):
        backward(net, step)
        for optimizer, _ in itertools.product(optimizers, range(2)):
            optimizer.step()
        pruner.step()
    assert (pruner.steps, [event.step for event in pruner.trajectory]) == (4, [2, 4])


def test_a_pruner_that_is_dropped_takes_model_and_optimizer_with_it():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    backward(net)
    optimizer.step()
    pruner.step()
    gone = [weakref.ref(thing) for thing in (net, optimizer, pruner)]
    del net, optimizer, pruner
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    other = net_of()
    backward(other)
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_a_pruner_can_be_copied_while_it_works():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1)
    for step in range(2):
        backward(net, step)
        optimizer.step()
        pruner.step()
    for other in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())
        other.finalize()
    backward(net)
    optimizer.step()
    pruner.step()
    assert is_masked(net, pruner)


def test_a_found_optimizer_whose_first_step_raises_is_followed_all_the_same():
    net = net_of()
    pruner = EMPPruner(net, mode="feedback")
    pruner.refresh()
    dense = dense_of(net, pruner)
    optimizer = Fails(net.parameters(), lr=0.0)
    backward(net)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.when = ""
    for _ in range(2):
        optimizer.step()
        pruner.step()
        assert is_masked(net, pruner)
    assert all(torch.equal(a, b) for a, b in zip(dense_of(net, pruner), dense, strict=True))

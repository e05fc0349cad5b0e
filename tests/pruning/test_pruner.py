import itertools
import json
import math
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from emp_callbacks import EMPPruner, PruneEvent, Ramp, effective_number, emp_mask, mass_bound, preserved_mass


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers)


def train_step(net, optimizer, seed=0):
    x = torch.randn(8, net[0].in_features, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def flat(net):
    return torch.cat([layer.weight.detach().flatten() for layer in net])


# ---- selection and scope ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_global_scope_is_emp_on_all_weights_together(mode):
    net = mlp(7, 11, 5)
    scores = flat(net)
    expected = emp_mask(scores)
    pruner = EMPPruner(net, mode=mode)
    (event,) = pruner.refresh()
    assert torch.equal(torch.cat([m.flatten() for m in pruner.masks.values()]), expected)
    assert torch.equal(flat(net), scores * expected)
    assert event.n == 132
    assert event.n_eff == pytest.approx(effective_number(scores), rel=1e-14)
    assert event.keep == int(expected.sum())
    assert event.threshold == float(scores[expected].abs().min())
    assert event.preserved_mass == pytest.approx(preserved_mass(scores, expected))
    assert event.mass_bound == mass_bound(event.keep, 132)
    assert event.preserved_mass >= event.mass_bound
    assert event.churn == pytest.approx(1 - event.density)
    assert event.regrown == 0
    assert pruner.density == event.density == event.keep / 132


def test_tensor_scope_is_emp_on_each_tensor():
    net = mlp(7, 11, 5)
    expected = [emp_mask(layer.weight) for layer in net]
    pruner = EMPPruner(net, scope="tensor")
    events = pruner.refresh()
    assert [event.group for event in events] == ["0.weight", "1.weight"]
    for mask, other in zip(pruner.masks.values(), expected, strict=True):
        assert torch.equal(mask, other)


@pytest.mark.parametrize("layer", ["linear", "conv", "transposed", "conv1d"])
def test_row_scope_is_emp_on_each_output_unit(layer):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    kinds = {
        "linear": (nn.Linear(12, 5), 0),
        "conv": (nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), 0),
        "transposed": (nn.ConvTranspose2d(3, 5, 3), 1),
        "conv1d": (Conv1D(5, 12), 1),
    }
    module, dim = kinds[layer]
    weight = module.weight.detach().clone()
    pruner = EMPPruner(module, scope="row")
    (event,) = pruner.refresh()
    mask = pruner.masks["weight"]
    for unit in range(5):
        assert torch.equal(mask.select(dim, unit), emp_mask(weight.select(dim, unit)))
    assert event.n_eff == pytest.approx(sum(effective_number(weight.select(dim, u)) for u in range(5)))
    assert event.threshold == float(weight[mask].abs().min())
    assert event.mass_bound is None
    assert torch.equal(module.weight, weight * mask)


def test_layers_of_a_global_event_add_up():
    net = mlp(7, 11, 5)
    dense = [layer.weight.detach().clone() for layer in net]
    pruner = EMPPruner(net)
    (event,) = pruner.refresh()
    assert sum(layer.keep for layer in event.layers) == event.keep
    for layer, weight, mask in zip(pruner.layers, dense, pruner.masks.values(), strict=True):
        assert layer.n_eff == effective_number(weight)
        assert layer.preserved_mass == pytest.approx(preserved_mass(weight, mask))
        assert layer.density == pytest.approx(float(mask.double().mean()))


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_rows_count_what_a_second_refresh_drops_and_brings_back(scope):
    net = mlp(30, 40, 10)
    pruner = EMPPruner(net, scope=scope, observe_only=True)
    pruner.refresh()
    before = pruner.masks
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(torch.rand(parameter.shape) ** 2)
    events, after = pruner.refresh(), pruner.masks
    regrown = sum(int((after[name] & ~before[name]).sum()) for name in before)
    flipped = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0 < regrown < flipped - regrown
    assert sum(event.regrown for event in events) == regrown
    assert sum(event.churn * event.n for event in events) == pytest.approx(flipped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_other_dtypes(dtype, scope):
    net = mlp(20, 30, 5).to(dtype)
    pruner = EMPPruner(net, scope=scope)
    pruner.refresh()
    assert 0.3 < pruner.density < 0.9


def test_beta_and_its_schedule():
    net = mlp(30, 30)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, beta=Ramp(first=1.5, last=0.5, until=4))
    for _ in range(5):
        train_step(net, optimizer)
        pruner.step()
    assert [event.beta for event in pruner.trajectory] == [1.25, 1.0, 0.75, 0.5, 0.5]
    for event in pruner.trajectory:
        assert event.keep == min(math.floor(event.beta * event.n_eff), event.n)
        assert (event.mass_bound is not None) == (event.beta == 1.0)


def test_fixed_density_and_random_scores():
    net = mlp(30, 30)
    state = torch.random.get_rng_state()
    one, two = (EMPPruner(mlp(30, 30), criterion="random", density=0.31) for _ in range(2))
    one.refresh()
    two.refresh()
    assert torch.equal(one.masks["0.weight"], two.masks["0.weight"])
    torch.random.set_rng_state(state)
    before = torch.random.get_rng_state()
    pruner = EMPPruner(net, criterion="random", density=0.31, mode="project")
    pruner.refresh()
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own random state is not touched"
    assert pruner.density == 279 / 900
    assert pruner.trajectory[-1].beta is None


def test_all_zero_weights_keep_everything_and_say_so():
    net = mlp(4, 4)
    nn.init.zeros_(net[0].weight)
    (event,) = EMPPruner(net).refresh()
    assert event.density == 1.0
    assert "no information" in event.note


def test_all_zero_rows_are_kept_whole_and_counted():
    net = mlp(4, 4)
    with torch.no_grad():
        net[0].weight[1:3] = 0
    (event,) = EMPPruner(net, scope="row").refresh()
    assert "2 rows whose scores are all 0" in event.note


def test_freeze_never_brings_back_what_was_frozen():
    net = mlp(6, 6)
    pruner = EMPPruner(net, mode="freeze")
    pruner.refresh()
    frozen = ~pruner.masks["0.weight"]
    nn.init.zeros_(net[0].weight)  # the survivors die: no score is left, "keep everything" must not thaw
    pruner.refresh()
    assert not bool(pruner.masks["0.weight"][frozen].any())


# ---- atomic refresh -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_scores_name_parameter_and_step_and_change_nothing(mode, scope, bad):
    net = mlp(5, 6, 7)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, mode=mode, scope=scope)
    train_step(net, optimizer)
    pruner.step()
    pruner.refresh()
    masks = pruner.masks
    with torch.no_grad():
        kept = masks["1.weight"].nonzero()[0]
        net[1].weight[tuple(kept)] = bad
    weights = [layer.weight.detach().clone() for layer in net]
    with pytest.raises(FloatingPointError, match=r"'1.weight' \(rank 0\) at step 1; no mask was changed"):
        pruner.refresh()
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, masks[name])
    for layer, weight in zip(net, weights, strict=True):
        assert torch.equal(layer.weight.nan_to_num(7, 7, 7), weight.nan_to_num(7, 7, 7))
    assert len(pruner.trajectory) in (1, 2)


def test_an_optimizer_step_that_raises_leaves_masked_weights():
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer)
    pruner.refresh()
    masked = net[0].weight.detach().clone()
    net[0].weight.grad = torch.zeros(6, 5)
    optimizer.param_groups[0]["lr"] = "not a number"
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    state = pruner.state_dict()
    assert torch.equal(net[0].weight, masked)
    assert state["stash"]["0.weight"].numel() == int((~pruner.masks["0.weight"]).sum())


# ---- counting steps -----------------------------------------------------------------------------------------------


def test_micro_batches_are_not_steps():
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, every_n_steps=2)
    seen = []
    for micro in range(8):
        if micro % 2:
            train_step(net, optimizer)
        seen.append(len(pruner.step()))
    assert pruner.steps == 4
    assert seen == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_loss_scaler_does_not_count_and_its_refresh_is_late(fused):
    net = mlp(5, 6)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=fused)
    pruner = EMPPruner(net, optimizer, every_n_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    rows = []
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 5)).square().mean()).backward()
        if step == 1:  # the second step overflows
            net[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        rows.append([event.step for event in pruner.step()])
        mask = pruner.masks["0.weight"]
        assert bool((net[0].weight[~mask] == 0).all())
    assert rows == [[], [], [2], [], [4]]
    assert pruner.steps == 4


def test_an_epoch_whose_last_step_was_skipped_is_refreshed_at_its_end():
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = EMPPruner(net, optimizer, every_n_epochs=1)
    train_step(net, optimizer)
    assert pruner.step(end_of_epoch=True)
    train_step(net, optimizer)
    assert not pruner.step()
    (event,) = pruner.step(end_of_epoch=True)  # the step was skipped, but the epoch has others
    assert (event.step, event.epoch) == (2, 1)


def test_two_optimizers():
    net = mlp(5, 6, 7)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) for layer in net]
    pruner = EMPPruner(net, optimizers, every_n_steps=1)
    for _ in range(3):
        net(torch.ones(2, 5)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step()
        assert (flat(net)[~torch.cat([m.flatten() for m in pruner.masks.values()])] == 0).all()
    assert pruner.steps == 3


# ---- the user's model stays the user's ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_nothing_is_renamed_added_or_left_behind(mode):
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = (list(net.state_dict()), dict(vars(net)), dict(vars(net[0])))
    pruner = EMPPruner(net, optimizer, every_n_steps=1, mode=mode)
    train_step(net, optimizer)
    pruner.step()
    pruner.finalize()
    pruner.finalize()
    assert list(net.state_dict()) == before[0]
    assert vars(net).keys() == before[1].keys()
    assert vars(net[0]).keys() == before[2].keys()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not net[0].weight._post_accumulate_grad_hooks
    masked = (net[0].weight == 0).sum()
    assert masked > 0
    train_step(net, optimizer)
    assert (net[0].weight == 0).sum() == 0, "after finalize the model trains like any other"


@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_reading_the_state_after_finalize_leaves_the_model_alone(mode):
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, mode=mode)
    train_step(net, optimizer)
    pruner.step()
    pruner.finalize()
    train_step(net, optimizer, seed=1)
    before = net[0].weight.detach().clone()
    pruner.state_dict()
    assert torch.equal(net[0].weight, before)
    assert bool((before != 0).all())


def test_finalize_in_project_closes_with_a_refresh():
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=2, mode="project")
    for step in range(3):
        train_step(net, optimizer, step)
        pruner.step()
    assert (net[0].weight == 0).sum() == 0
    pruner.finalize()
    assert [event.step for event in pruner.trajectory] == [2, 3]
    assert torch.equal(net[0].weight != 0, pruner.masks["0.weight"])


def test_finalize_warns_when_nothing_was_ever_pruned():
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_epochs=1)
    train_step(net, optimizer)
    pruner.step()
    with pytest.warns(UserWarning, match="nothing was pruned"):
        pruner.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMPPruner(mlp(5, 6)).finalize()


def test_observe_only_measures_and_touches_nothing():
    net, twin = mlp(5, 6), mlp(5, 6)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, twin)]
    pruner = EMPPruner(net, optimizers[0], every_n_steps=1, observe_only=True)
    for step in range(4):
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            train_step(n, optimizer, step)
        pruner.step()
        assert torch.equal(net[0].weight, twin[0].weight)
        assert torch.equal(pruner.masks["0.weight"], emp_mask(net[0].weight))
    assert {event.mode for event in pruner.trajectory} == {"observe"}
    assert pruner.trajectory[-1].churn < pruner.trajectory[0].churn


def test_tied_and_frozen_weights():
    net = mlp(6, 6, 6)
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    pruner = EMPPruner(net, optimizer, every_n_steps=1, include=["*.weight", "1.bias"])
    train_step(net, optimizer)
    (event,) = pruner.step()
    assert event.n == 36 + 6
    assert list(pruner.masks) == ["0.weight", "1.bias"]
    assert bool((net[1].bias[~pruner.masks["1.bias"]] == 0).all())


def test_channels_last_weights():
    net = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    twin = nn.Conv2d(4, 8, 3)
    twin.load_state_dict(net.state_dict())
    results = []
    for module in (net, twin):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        pruner = EMPPruner(module, optimizer, every_n_steps=1)
        for _ in range(4):
            optimizer.zero_grad()
            module(torch.ones(1, 4, 5, 5)).square().mean().backward()
            optimizer.step()
            pruner.step()
        results.append(pruner)
    torch.testing.assert_close(net.weight.contiguous(), twin.weight.contiguous())
    assert torch.equal(results[0].masks["weight"], results[1].masks["weight"])


@pytest.mark.compiler
@pytest.mark.parametrize("mode", ["feedback", "freeze"])
def test_a_compiled_model_gets_the_same_masks_and_never_recompiles(mode):
    torch._dynamo.reset()
    masks, frames = [], []
    for compiled in (False, True):
        net = mlp(5, 6, 7)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = torch.compile(net, backend=counter) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        pruner = EMPPruner(model, optimizer, every_n_steps=2, mode=mode)
        for step in range(6):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            pruner.step()
            frames.append(counter.frame_count)
        masks.append(pruner.masks)
    assert len(pruner.trajectory) == 3
    assert frames[-6:] == [1] * 6
    assert masks[0].keys() == masks[1].keys()
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def test_the_trajectory_is_on_disk_after_every_refresh(tmp_path):
    net = mlp(5, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    path = tmp_path / "deep" / "rows.jsonl"
    pruner = EMPPruner(net, optimizer, every_n_steps=1, trajectory_path=path)
    for step in range(3):
        train_step(net, optimizer)
        pruner.step()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == step + 1
        assert PruneEvent.from_record(rows[-1]) == pruner.trajectory[-1]


def test_collect_is_refused_where_no_gradients_are_read():
    pruner = EMPPruner(nn.Linear(4, 2), criterion="wanda")
    with pytest.raises(ValueError, match=r"'wanda' reads no gradients.*drop collect\(\), or use 'taylor'"):
        pruner.collect()

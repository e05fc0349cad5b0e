"""Heads, neurons and nodes as wholes: what a mask does to them in each mode, and the guards that few units need."""

import itertools

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from emp_callbacks import EMPPruner
from emp_callbacks.layer.segment import Span
from emp_callbacks.pruning.decision import decide
from emp_callbacks.pruning.groups import KeepRule, Scored
from emp_callbacks.study.recipe.networks import KANLinear

BLOCKS, HEADS, WIDTH = 2, 3, 4


def make_vit():
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": HEADS * WIDTH, "depth": BLOCKS, "num_heads": HEADS}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **sizes)


def make_kan():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), KANLinear(64, 6, 3, 3), KANLinear(6, 5, 3, 3))


def make_convolutions():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.GELU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


MAKE = {"heads": make_vit, "neurons": make_convolutions, "kan_nodes": make_kan}


def train(model, pruner, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield pruner.step()


def pruned_values(model, pruner):
    return torch.cat([model.get_parameter(name).detach()[~mask] for name, mask in pruner.weight_masks.items()])


@pytest.mark.parametrize(("target", "mode"), list(itertools.product(MAKE, ["feedback", "project", "freeze"])))
def test_what_is_zero_when(target, mode):
    model = MAKE[target]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=3, target=target, mode=mode, beta=0.7)
    gone, grew = set(), False
    for events in train(model, pruner, optimizer, range(12)):
        off = {(name, unit) for name, mask in pruner.masks.items() for unit in (~mask).nonzero().flatten().tolist()}
        if events:
            assert pruned_values(model, pruner).numel()
            assert pruner.audit().clean
            if mode == "freeze":
                assert gone <= off, "what is frozen does not come back"
            gone = off
        if mode == "project":
            grew |= bool(pruned_values(model, pruner).count_nonzero())
        else:
            assert not pruned_values(model, pruner).count_nonzero()
    assert grew == (mode == "project")
    with pruner.dense_weights():
        hidden = pruned_values(model, pruner)
        assert bool(hidden.count_nonzero()) == (mode == "feedback"), "only feedback keeps values behind the mask"
    assert pruner.density < 1


def test_a_pruned_head_can_return_in_feedback():
    model = make_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = EMPPruner(model, optimizer, target="heads", beta=0.7)
    pruner.refresh()
    (name, mask), *_ = ((n, m) for n, m in pruner.masks.items() if not m.all())
    unit = int((~mask).nonzero()[0])
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    columns = model.get_submodule(name).proj.weight.grad[:, WIDTH * unit : WIDTH * (unit + 1)]
    assert bool((columns != 0).all()), "the gradient reaches the dense weights behind the mask"
    with torch.no_grad():
        model.get_submodule(name).qkv.weight[WIDTH * unit : WIDTH * (unit + 1)] *= 50
    (event,) = pruner.refresh()
    assert pruner.masks[name][unit]
    assert event.regrown >= 1


@pytest.mark.compiler
def test_masked_heads_under_compile_do_not_recompile():
    model = make_vit()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    pruner = EMPPruner(compiled, optimizer, target="heads", every_n_steps=2, beta=0.7)
    plain = make_vit()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    twin = EMPPruner(plain, plain_optimizer, target="heads", every_n_steps=2, beta=0.7)
    for ours, theirs in zip(
        train(compiled, pruner, optimizer, range(7)), train(plain, twin, plain_optimizer, range(7)), strict=True
    ):
        assert [event.keep for event in ours] == [event.keep for event in theirs]
    assert counter.frame_count == 1
    assert all(torch.equal(mask, twin.masks[name]) for name, mask in pruner.masks.items())


@pytest.mark.compiler
@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_evidence_under_compile_is_that_of_eager(criterion):
    masks, frames = [], 0
    for compiles in (False, True):
        model = make_vit()
        counter = CompileCounter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        settings = {"target": "heads", "criterion": criterion, "every_n_steps": 4, "evidence_steps": 2, "beta": 0.7}
        run = torch.compile(model, backend=counter) if compiles else model
        pruner = EMPPruner(model, optimizer, **settings)
        rows = [event.n_eff for events in train(run, pruner, optimizer, range(12)) for event in events]
        masks.append((rows, pruner.masks))
        frames = counter.frame_count
    assert masks[0][0] == pytest.approx(masks[1][0], rel=1e-5)
    assert len(masks[0][0]) == 3
    assert all(torch.equal(mask, masks[1][1][name]) for name, mask in masks[0][1].items())
    assert frames <= 2, "one graph in the window and one outside of it"


# ---- few units ----------------------------------------------------------------------------------------------------


class OneRank:
    rank, world_size = 0, 1

    def all_sum(self, value):
        return value

    def from_all(self, value):
        return value[None]


def layers_of(*scores):
    def one(name, values):
        span = Span(
            name=name,
            shape=torch.Size([len(values)]),
            output_dim=0,
            positions=0,
            replicated=True,
            counted=slice(0, len(values)),
        )
        return Scored(span, torch.tensor(values, dtype=torch.float64))

    return [one(chr(97 + i), values) for i, values in enumerate(scores)]


def masks_of(rule, *scores):
    (decision,) = decide(layers_of(*scores), "global", rule, OneRank(), 0)
    return [decision.mask(i).tolist() for i in range(len(scores))], decision


def test_every_layer_keeps_its_best_units():
    scores = ([9.0, 8.0, 7.0], [0.1, 0.3, 0.2], [6.0, 0.5])
    masks, decision = masks_of(KeepRule(min_units=1), *scores)
    assert decision.keep == 4  # N_eff = 31.1^2 / 230.4 = 4.2
    assert masks == [[True, True, False], [False, True, False], [True, False]], "the best of b takes the place of 7"
    assert "min_units=1: b" in decision.note
    assert not decision.is_top
    assert decision.threshold == 0.3
    masks, decision = masks_of(KeepRule(min_units=0), *scores)
    assert masks == [[True] * 3, [False] * 3, [True, False]]
    assert decision.is_top
    assert decision.note == ""
    masks, decision = masks_of(KeepRule(min_units=2, beta=0.5), *scores)
    assert [sum(mask) for mask in masks] == [2, 2, 2], "the guard wins over beta"
    assert masks[1] == [False, True, True]
    masks, _ = masks_of(KeepRule(min_units=5), *scores)
    assert [sum(mask) for mask in masks] == [3, 3, 2], "a layer has no more than it has"
    masks, _ = masks_of(KeepRule(min_units=1), [2.0, 2.0], [0.0, 0.0])
    assert masks == [[True, False], [True, False]], "a layer of zeros keeps one, and the count stays"


def test_nearly_equal_heads_do_not_lose_one_to_the_floor():
    nearly = [1.0, 1.0, 1.0, 0.98]
    assert masks_of(KeepRule(), nearly)[1].keep == 3
    assert masks_of(KeepRule(tolerance=0.01), nearly)[1].keep == 4
    assert masks_of(KeepRule(tolerance=0.01), [1.0, 1.0, 1.0, 0.5])[1].keep == 3
    assert masks_of(KeepRule(tolerance=0.01, beta=2.0), [1.0, 0.001, 0.001, 0.001])[1].keep == 2


def test_evidence_is_needed_and_asked_for():
    model = make_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for target, criterion, message in [
        ("weights", "taylor", "no gradients of 'patch_embed.proj.weight' were gathered.*collect"),
        ("heads", "saliency", "no gradients of 'blocks.0.attn' were gathered"),
        ("heads", "activation", "nothing passed 'blocks.0.attn' while activations were gathered"),
        ("weights", "wanda", "nothing passed 'patch_embed.proj' while inputs were gathered"),
        ("features", "activation", "'blocks.0.mlp.act'"),
        ("attention_edges", None, "nothing passed 'blocks.0.attn' since the last refresh"),
    ]:
        pruner = EMPPruner(model, optimizer, target=target, criterion=criterion)
        with pytest.raises(RuntimeError, match=message):
            pruner.refresh()
        assert not pruner.trajectory
        pruner.finalize()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_of_a_finished_model_are_collected_by_hand():
    model = make_convolutions().double()
    pruner = EMPPruner(model, target="neurons", criterion="taylor", include=["0"], tolerance=0.0, mode="project")
    expected = torch.zeros(6, dtype=torch.float64)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)).square().mean().backward()
        own = [(p * p.grad).detach().reshape(6, -1).sum(1) for p in (*model[0].parameters(), *model[1].parameters())]
        expected += sum(own).abs() / 3
        pruner.collect()
        model.zero_grad()
    (event,) = pruner.refresh()
    assert event.n_eff == pytest.approx(float(expected.sum() ** 2 / expected.square().sum()))
    kept = torch.zeros(6, dtype=torch.bool)
    kept[expected.topk(int(event.n_eff)).indices] = True
    assert torch.equal(pruner.masks["0"], kept)


def test_nothing_is_gathered_outside_the_window():
    model = make_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pruner = EMPPruner(model, optimizer, criterion="taylor", every_n_steps=5, evidence_steps=2, stop=10)
    held = []
    for _ in train(model, pruner, optimizer, range(14)):
        gathered = sum(layer.gathered is not None for layer in pruner._layers)
        held.append((len(pruner._refresher.evidence.batches), gathered))
    layers = len(pruner._layers)
    assert held == [(0, 0)] * 3 + [(1, layers), (0, 0)] + [(0, 0)] * 3 + [(1, layers), (0, 0)] + [(0, 0)] * 4


def test_a_users_criterion_on_heads():
    model = make_vit()

    def outputs_only(layer):
        return layer.unit_sums(torch.square, lambda member: member.role == "output")

    pruner = EMPPruner(model, target="heads", criterion=outputs_only, tolerance=0.0, min_units=0)
    (event,) = pruner.refresh()
    assert event.criterion.endswith("outputs_only")
    with pruner.dense_weights():
        norms = torch.stack(
            [b.attn.proj.weight.detach().square().view(-1, HEADS, WIDTH).sum((0, 2)) for b in model.blocks]
        )
    assert event.n_eff == pytest.approx(float(norms.double().sum() ** 2 / norms.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("criterion", ["activation", "taylor", "saliency"])
def test_frozen_features_stay_off_and_take_no_place(criterion):
    model = make_convolutions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    settings = {"target": "features", "mode": "freeze", "criterion": criterion, "scope": "global", "tolerance": 0.0}
    pruner = EMPPruner(model, optimizer, every_n_steps=2, min_units=0, **settings)
    off = set()
    for events in train(model, pruner, optimizer, range(10)):
        if not events:
            continue
        now = {(name, i) for name, mask in pruner.masks.items() for i in (~mask).nonzero().flatten().tolist()}
        assert off <= now
        assert events[0].keep == int(events[0].n_eff), "all that N_eff allows is kept among the survivors"
        assert len(now) == events[0].n - events[0].keep
        off = now
    assert len(off) > 2


def test_skipped_steps_are_no_evidence_and_loss_scaling_does_not_show():
    rows = []
    for scaled in (False, True):
        model = make_convolutions().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        pruner = EMPPruner(model, optimizer, criterion="taylor", every_n_steps=3, evidence_steps=3)
        for step in (0, 1, None, 2):  # in place of None, a batch whose gradients overflow
            if step is None and not scaled:
                continue
            generator = torch.Generator().manual_seed(step or 0)
            loss = model(torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)).square().mean()
            scaler.scale(loss * float("inf") if step is None else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            pruner.step()
        rows += [(event.step, event.keep, event.n_eff) for event in pruner.trajectory]
    assert rows[0][:2] == rows[1][:2]
    assert rows[0][2] == pytest.approx(rows[1][2], rel=1e-9)


def test_signed_scores_are_shifted_where_a_criterion_says_so():
    model = make_vit()
    signed = {"blocks.0.attn": [-3.0, 1.0, 4.0], "blocks.1.attn": [-1.0, 0.0, 6.0]}

    def scores(layer):
        return torch.tensor(signed[layer.name], dtype=torch.float64)

    def run(scope):
        pruner = EMPPruner(model, target="heads", criterion=scores, scope=scope, min_units=0, observe_only=True)
        return [event.n_eff for event in pruner.refresh()]

    absolute = torch.tensor([3.0, 1, 4, 1, 0, 6])
    assert run("global") == pytest.approx([float(absolute.sum() ** 2 / absolute.square().sum())])
    scores.signed = "shift"
    above = torch.tensor([0.0, 4, 7, 2, 3, 9])
    assert run("global") == pytest.approx([float(above.sum() ** 2 / above.square().sum())])
    assert run("tensor") == pytest.approx([11**2 / (16 + 49), 8**2 / (1 + 49)])
    scores.signed = "other"
    with pytest.raises(ValueError, match="signed='other' must be 'absolute' or 'shift'"):
        run("global")


def test_products_of_half_precision_numbers_do_not_vanish():
    layer = nn.Linear(2, 2, bias=False).half()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e-3, 2e-3], [3e-3, 4e-3]]))
    layer.weight.grad = torch.full((2, 2), 1e-5).half()
    pruner = EMPPruner(layer, criterion="taylor", observe_only=True)
    pruner.collect()
    (event,) = pruner.refresh()
    assert event.note == ""
    assert event.n_eff == pytest.approx(100 / 30, rel=1e-3)


def test_activations_that_are_not_finite_are_an_error_or_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    broken = x.clone()
    broken[0] = torch.nan
    static = EMPPruner(model, target="features")
    model(broken)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the scores of '1'"):
        static.refresh()
    static.finalize()
    dynamic = EMPPruner(model, target="features", dynamic=True)
    model(torch.full_like(x, torch.nan))
    with pytest.raises(FloatingPointError, match="NaN or Inf in everything that passed '1'"):
        dynamic.refresh()
    model(broken)
    (event,) = dynamic.refresh()
    assert event.note == "4 rows with NaN or Inf were kept whole and not counted"
    assert bool(torch.isfinite(model(broken)[1:]).all())
    assert bool(torch.isnan(model(broken)[0]).all()), "what is broken stays visible"

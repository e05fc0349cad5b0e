"""FSDP2 and FSDP1 on two and three real gloo processes give exactly the masks of one process."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.pytorch_utils import Conv1D

from emp_callbacks import EMPPruner
from tests.core.reference import reference_mask
from tests.distributed.ranks import process_group, spawn
from tests.distributed.sharded_net import WAYS, ForwardWatch, fsdp1, fsdp2, full_masks, gathered, make_net

STEPS, EVERY = 10, 3
# Every way x mode x scope runs on two ranks or on three; every way meets every mode and every scope on both.
SOME = [("feedback", "global"), ("feedback", "row"), ("project", "tensor"), ("freeze", "row"), ("freeze", "tensor")]
OTHERS = [("feedback", "tensor"), ("project", "global"), ("project", "row"), ("freeze", "global")]
VARIANTS, OTHER_VARIANTS = ["fsdp2-stays-gathered", "fsdp1-no-shard"], ["fsdp2-shard-dim-1", "fsdp1-grad-op"]
CASES = {
    2: [("fsdp2", *c) for c in SOME] + [("fsdp1", *c) for c in OTHERS] + [(w, "feedback", "row") for w in VARIANTS],
    3: [("fsdp1", *c) for c in SOME]
    + [("fsdp2", *c) for c in OTHERS]
    + [(w, "freeze", "global") for w in OTHER_VARIANTS],
}
RUNS = [pytest.param(n, case, id=f"{n}-{'-'.join(case)}") for n, cases in CASES.items() for case in cases]


# ---- training -----------------------------------------------------------------------------------------------------


def train(rank, world_size, way, mode, scope):
    net = make_net()
    watch = ForwardWatch(net)
    model = WAYS[way](net) if world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=EVERY, mode=mode, scope=scope)
    losses, audits = [], []
    for step in range(STEPS):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def backward(x=x):
            optimizer.zero_grad()
            loss = model(x[rank::world_size]).square().mean()
            loss.backward()
            if (mode, scope) == ("freeze", "global"):
                clip(model, pruner)
            return loss

        if scope == "tensor":  # as Lightning does
            loss = optimizer.step(backward)
        else:
            loss = backward()
            optimizer.step()
        losses.append(loss.detach())
        if mode == "project":
            watch.masks = {}  # free to grow back
        if (step + 1) % EVERY == 0:
            with torch.no_grad():  # validation leaves gathered copies of weights that the refresh is about to prune
                model(x)
        if pruner.step():
            watch.masks = full_masks(pruner)
            audits.append(pruner.audit())
    return {
        "masks": full_masks(pruner),
        "weights": gathered(pruner, lambda w: w.weight),
        "momentum": gathered(pruner, lambda w: states_of(pruner, w)[0]),
        "losses": pruner._backend.all_sum(torch.stack(losses)) / world_size,
        "rows": [(e.group, e.n, e.keep, e.density, e.churn, e.regrown) for e in pruner.trajectory],
        "n_eff": [(e.n_eff, *(layer.n_eff for layer in e.layers)) for e in pruner.trajectory],
        "mass": [e.preserved_mass for e in pruner.trajectory],
        "density": pruner.density,
        "violations": watch.violations,
        "seen": watch.seen,
        "clean": [audit.clean for audit in audits],
        "same_owners": same_owners(model, pruner),
    }


def clip(model, pruner):
    """Clip by a norm without the frozen gradients; FSDP1 by hand, its own clip refuses float64."""
    if isinstance(model, FullyShardedDataParallel):
        pruner.mask_gradients()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = pruner._backend.all_sum(sum(g.square().sum() for g in gradients)).sqrt()
        for gradient in gradients:
            gradient.mul_((1e-3 / (norm + 1e-6)).clamp(max=1))
    else:  # masked as they arrive, also by fully_shard
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        # whole before torch adds 1e-6 to it: torch 2.7 adds that to the part of each rank
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(model.parameters(), 1e-3, norm)


def states_of(pruner, weight):
    states = [state.values for state in pruner._backend.optimizer_states(weight.segment)]
    return states or [torch.zeros_like(weight.weight)]  # FSDP1 gives an empty shard no gradient, so AdamW no state


def same_owners(model, pruner):
    """Whether module and optimizer still know the objects that the segments were built with."""
    held = {id(p) for p in model.parameters()}
    updated = {id(p) for p in pruner._backend.optimizers[0].state}
    return all(
        id(w.segment.owner) in held and (id(w.segment.owner) in updated or not w.weight.numel())
        for w in pruner._weights
    )


def tied_weights(way, scope, dtype):
    """Many equal magnitudes, sizes that no number of ranks divides, one tensor of a single weight."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(13, 7, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 2).round())
        net[1].weight.fill_(1.0)
    net = net.to(dtype)
    if way == "fsdp2":
        net = fully_shard(net)
    elif way == "fsdp1":
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    pruner = EMPPruner(net, scope=scope)
    events = pruner.refresh()
    sizes = [w.weight.numel() for w in pruner._weights]
    return full_masks(pruner), [(e.keep, e.threshold, e.n_eff, pruner.density) for e in events], sizes


def tied_groups(way):
    """Return what patterns keep of weights of many equal magnitudes that are cut anywhere, within groups, too."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(24, 7), Conv1D(6, 40), nn.ConvTranspose1d(8, 6, 3), nn.Conv1d(24, 3, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 2).round())
    if way == "fsdp1":
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    elif way != "alone":
        net = fully_shard(net, shard_placement_fn=by_dim_1 if way == "fsdp2-shard-dim-1" else None)
    found = {}
    for pattern in ("2:4", "3:8"):
        pruner = EMPPruner(net, pattern=pattern, exclude=["*bias"])
        events = pruner.refresh()
        kept = [(e.group, e.keep, e.n_eff, e.preserved_mass) for e in events]
        found[pattern] = full_masks(pruner), kept, pruner.audit().clean
        pruner.finalize()
    return found


def by_dim_1(parameter):
    return Shard(1) if parameter.ndim > 1 else None


GROUPS = ("fsdp2", "fsdp1", "fsdp2-shard-dim-1")
TIES = [(s, d) for s in ("global", "tensor", "row") for d in (torch.float16, torch.float32, torch.float64)]


def low_precision(rank, world_size, way):
    """Train in bfloat16 over float32 shards; return forward violations and whether each refresh selected by a sort."""
    net = make_net(torch.float32)
    watch = ForwardWatch(net)
    if way == "fsdp2":
        model = fsdp2(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    else:
        model = fsdp1(net, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=2)
    right = []
    for step in range(7):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[rank::world_size]).float().square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model(x)
        if pruner.step():
            watch.masks = full_masks(pruner)
            with pruner._keeper.dense_owners():
                dense = gathered(pruner, lambda w: w.weight)
            pooled = reference_mask(torch.cat([weight.flatten() for weight in dense.values()]))
            ours = torch.cat([mask.flatten() for mask in watch.masks.values()])
            right.append(torch.equal(ours, pooled) and not bool(ours.all()))
    return {"violations": watch.violations, "seen": watch.seen, "right": right}


def go_back(rank, world_size, mode):
    """Train, go back to a state of in between within the run, train again; return what differs from the first time."""
    model = WAYS["fsdp2"](make_net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = EMPPruner(model, optimizer, every_n_steps=4, mode=mode)
    parts = (model, optimizer, pruner)

    def run(first, last):
        for step in range(first, last):
            x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x[rank::world_size]).square().mean().backward()
            optimizer.step()
            pruner.step()
        with pruner._keeper.dense_owners():
            return full_masks(pruner), gathered(pruner, lambda w: w.weight)

    run(0, 6)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    first = run(6, 14)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "something other than the optimizer")
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        second = run(6, 14)
    return [name for a, b in zip(first, second, strict=True) for name in a if not torch.equal(a[name], b[name])]


# ---- what the ranks do --------------------------------------------------------------------------------------------


def all_of_it(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        result = {
            "trained": {case: train(rank, world_size, *case) for case in CASES[world_size]},
            "ties": {(way, *case): tied_weights(way, *case) for way in ("fsdp2", "fsdp1") for case in TIES},
            "groups": {way: tied_groups(way) for way in GROUPS},
            "back": {mode: go_back(rank, world_size, mode) for mode in ("feedback", "project", "freeze")},
            "bf16": {way: low_precision(rank, world_size, way) for way in ("fsdp2", "fsdp1")},
        }
    torch.save(result, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank saw; each number of ranks is spawned once for all tests."""

    seen = {}

    def results(world_size):
        if world_size not in seen:
            seen[world_size] = []  # a rank that fails once is not started for every test again
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            spawn(all_of_it, world_size, folder)
            for rank in range(world_size):
                seen[world_size].append(torch.load(folder / f"rank{rank}.pt", weights_only=False))
        assert seen[world_size], "the ranks failed: see the first failure"
        return seen[world_size]

    return results


@functools.cache
def alone(mode, scope):
    return train(0, 1, "alone", mode, scope)


@pytest.mark.parametrize(("world_size", "case"), RUNS)
def test_training_gives_the_masks_of_one_process(world_size, case, ranks):
    expected = alone(*case[1:])
    assert len(expected["clean"]) == STEPS // EVERY
    for result in ranks(world_size):
        ours = result["trained"][case]
        for name, mask in expected["masks"].items():
            assert torch.equal(ours["masks"][name], mask), name
        assert ours["rows"] == expected["rows"]
        assert ours["density"] == expected["density"]
        for row, other in zip(ours["n_eff"], expected["n_eff"], strict=True):
            assert row == pytest.approx(other, rel=1e-12)
        assert ours["mass"] == pytest.approx(expected["mass"], rel=1e-12)
        torch.testing.assert_close(ours["losses"], expected["losses"], rtol=0, atol=1e-10)
        for values in ("weights", "momentum"):
            for name, value in expected[values].items():
                torch.testing.assert_close(ours[values][name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("world_size", "case"), RUNS)
def test_forward_never_computes_with_a_pruned_weight(world_size, case, ranks):
    for result in [*ranks(world_size), {"trained": {case: alone(*case[1:])}}]:
        ours = result["trained"][case]
        assert len(ours["seen"]) == 4  # full shapes, in every forward
        assert ("up.weight", (5, 6, 2), "torch.float64") in ours["seen"]
        assert ours["violations"] == 0
        assert all(ours["clean"])


@pytest.mark.parametrize(("world_size", "case"), RUNS)
def test_module_optimizer_and_segments_know_the_same_objects_to_the_end(world_size, case, ranks):
    assert all(result["trained"][case]["same_owners"] for result in ranks(world_size))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("case", TIES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def test_ties_uneven_and_empty_shards_are_cut_as_in_one_process(world_size, way, case, ranks):
    masks, rows, _ = tied_weights("alone", *case)
    results = [result["ties"][(way, *case)] for result in ranks(world_size)]
    for ours, our_rows, _ in results:
        assert our_rows == rows
        for name, mask in masks.items():
            assert torch.equal(ours[name], mask), name
    sizes = [sizes for _, _, sizes in results]
    assert any(0 in row for row in sizes)  # the case that it is about
    assert torch.tensor(sizes).sum(0).tolist() == [91, 1, 15]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", GROUPS)
def test_groups_of_a_pattern_are_cut_as_in_one_process(world_size, way, ranks):
    for pattern, (masks, rows, _) in tied_groups("alone").items():
        for result in ranks(world_size):
            ours, our_rows, clean = result["groups"][way][pattern]
            assert our_rows == rows
            assert clean
            for name, mask in masks.items():
                assert torch.equal(ours[name], mask), (pattern, name)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("mode", ["feedback", "project", "freeze"])
def test_going_back_within_a_run_is_exact(world_size, mode, ranks):
    assert all(result["back"][mode] == [] for result in ranks(world_size))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_mixed_precision_masks_the_low_precision_copy(world_size, way, ranks):
    for result in ranks(world_size):
        ours = result["bf16"][way]
        assert ours["right"] == [True] * 3
        assert ("wide.weight", (5, 11), "torch.bfloat16") in ours["seen"]
        assert ours["violations"] == 0

"""FSDP on meshes with replicas, and what it says where EMP cannot work, on four real gloo processes."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from emp_callbacks import EMPPruner
from tests.distributed.ranks import process_group, spawn
from tests.distributed.sharded_net import WAYS, ForwardWatch, fsdp1, fsdp2, full_masks, make_net


def selection_on(model, scope):
    """Return the masks of one refresh, how many weights are whole here, and whether this rank's own masks agree."""
    pruner = EMPPruner(model, scope=scope)
    pruner.refresh()
    masks = full_masks(pruner)
    whole = sum(w.weight.numel() == w.segment.size for w in pruner._weights)
    own = all(torch.equal(w.mask.reshape(-1), masks[w.name].flatten()[places(w)]) for w in pruner._weights)
    return masks, whole, own


def places(weight):
    at = weight.segment.positions
    return torch.arange(at, at + weight.weight.numel()) if isinstance(at, int) else at


def built_late(way):
    """Build the pruner when a forward without gradients has left gathered copies.

    Returns masks, violations in the next forward, and what an audit finds in gathered copies, stale and dropped.
    """
    net = make_net()
    watch = ForwardWatch(net)
    model = WAYS[way](net)
    x = torch.ones(2, 7, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    pruner = EMPPruner(model)
    pruner.refresh()
    watch.masks = masks = full_masks(pruner)
    with torch.no_grad():
        model(x)
        violations = watch.violations
        for weight in pruner._weights:
            weight.mask.fill_(value=False)
            weight.weight.zero_()  # behind the back of the gathered copy
    stale = pruner.audit()
    pruner._backend.refresh_copies()
    return masks, violations, (stale.owner, stale.forward, pruner.audit().forward)


def tensor_parallel(mesh):
    net = make_net()
    parallelize_module(net, mesh["tensor"], {"first": ColwiseParallel(), "wide": RowwiseParallel()})
    return fsdp2(net, mesh=mesh["data"])


def tensor_parallel_selection(mesh, scope):
    """Return the selection, or torch's reason why it shards no such model."""
    try:
        model = tensor_parallel(mesh)
    except NotImplementedError as error:  # torch 2.7, of sizes that the number of ranks does not divide
        return str(error)
    return selection_on(model, scope)


def meshes(scope):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    one_rank_each = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replica", "shard"))
    hybrid = ShardingStrategy.HYBRID_SHARD
    return {
        "fsdp2-replicas": selection_on(fsdp2(make_net(), mesh=mesh), scope),
        "fsdp1-replicas": selection_on(fsdp1(make_net(), device_mesh=mesh, sharding_strategy=hybrid), scope),
        "fsdp2-tensor-parallel": tensor_parallel_selection(mesh, scope),
        "fsdp2-one-rank-per-shard": selection_on(fsdp2(make_net(), mesh=one_rank_each), scope),
    }


def message_of(error, work):
    try:
        work()
    except error as raised:
        return str(raised)
    return "no error"


def nan_on_one_rank(rank, way):
    net = WAYS[way](make_net())
    pruner = EMPPruner(net)
    if rank == 1:
        pruner._weights[0].weight[0] = float("nan")
    message = message_of(FloatingPointError, pruner.refresh)
    return message, all(w.mask is None for w in pruner._weights)


def too_early(way):
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters())
    return message_of(ValueError, lambda: EMPPruner(WAYS[way](net), optimizer))


def fused_parameters():
    return message_of(NotImplementedError, lambda: EMPPruner(fsdp1(make_net(), use_orig_params=False)))


def only_the_inside():
    net = make_net()
    fsdp1(net)
    return message_of(TypeError, lambda: EMPPruner(net))


def channels_last():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2)).to(memory_format=torch.channels_last)
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    return message_of(NotImplementedError, lambda: EMPPruner(net))


def overlapping(rank):
    everyone, *groups = [DeviceMesh("cpu", ranks) for ranks in ([0, 1, 2, 3], [0], [1, 2, 3])]
    net = make_net()
    fully_shard(net.narrow, mesh=everyone)
    return message_of(RuntimeError, lambda: EMPPruner(fsdp2(net, mesh=groups[rank > 0])))


def other_model(rank):
    everyone, *alone = [DeviceMesh("cpu", ranks) for ranks in ([0, 1, 2, 3], [0], [1], [2], [3])]
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4 + rank))
    fully_shard(net[0], mesh=everyone)
    fully_shard(net[1], mesh=alone[rank])
    return message_of(RuntimeError, lambda: EMPPruner(net))


def all_of_it(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        result = {
            "meshes": {scope: meshes(scope) for scope in ("global", "row")},
            "late": {way: built_late(way) for way in ("fsdp2", "fsdp1")},
            "nan": {way: nan_on_one_rank(rank, way) for way in ("fsdp2", "fsdp1")},
            "early": too_early("fsdp2"),
            "fused": fused_parameters(),
            "inside": only_the_inside(),
            "channels_last": channels_last(),
            "overlapping": overlapping(rank),
            "other_model": other_model(rank),
        }
        dist.barrier()
    torch.save(result, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(all_of_it, 4, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@functools.cache
def alone(scope="global"):
    return selection_on(make_net(), scope)[0]


@pytest.mark.parametrize(
    "way", ["fsdp2-replicas", "fsdp1-replicas", "fsdp2-tensor-parallel", "fsdp2-one-rank-per-shard"]
)
@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_mesh_with_replicas_counts_every_weight_once(scope, way, ranks):
    for result in ranks:
        if isinstance(result["meshes"][scope][way], str):
            pytest.skip(result["meshes"][scope][way])
        masks, _, own = result["meshes"][scope][way]
        assert own
        for name, mask in alone(scope).items():
            assert torch.equal(masks[name], mask), name
    whole = [result["meshes"][scope][way][1] for result in ranks]
    assert whole == [4] * 4 if way == "fsdp2-one-rank-per-shard" else max(whole) < 4


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_a_pruner_built_after_a_validation_forward_prunes_the_next_forward(way, ranks):
    for result in ranks:
        masks, violations, _ = result["late"][way]
        assert violations == 0
        for name, mask in alone().items():
            assert torch.equal(masks[name], mask), name


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_an_audit_looks_into_gathered_copies(way, ranks):
    for result in ranks:
        masks, _, (owner, stale, dropped) = result["late"][way]
        # what the root gathered; the inner wrapper let go of its copy after the forward
        assert stale == sum(int(mask.sum()) for name, mask in masks.items() if name != "first.weight") > 0
        assert owner == dropped == 0


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_nan_on_one_rank_is_an_error_on_all(way, ranks):
    for result in ranks:
        message, untouched = result["nan"][way]
        assert "'first.weight' (rank 1) at step 0" in message
        assert untouched


def test_what_cannot_work_says_why(ranks):
    for result in ranks:
        assert "no optimizer updates 'first.weight'" in result["early"]
        assert "(after fully_shard or FullyShardedDataParallel)" in result["early"]
        assert "use_orig_params=True" in result["fused"]
        assert "pass the outermost wrapper" in result["inside"]
        assert "'0.weight' was not contiguous" in result["channels_last"]
        assert "of the 77 weights of 'first.weight'; shard the model over all ranks" in result["overlapping"]
        assert "the ranks hold different parameters" in result["other_model"]

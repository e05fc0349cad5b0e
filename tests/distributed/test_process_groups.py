"""A job whose default group also holds a rank that does not train: the others prune without it, as one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPPruner
from tests.distributed.ranks import process_group, spawn
from tests.distributed.sharded_net import fsdp1, fsdp2, full_masks, make_net

TRAINING, IDLE = [0, 1], 2


def prune(model, scope):
    pruner = EMPPruner(model, scope=scope)
    pruner.refresh()
    pruner.audit()
    return full_masks(pruner), (pruner._backend.rank, pruner._backend.world_size)


def models(group, shards, replicas):
    """Return ways to spread a net over some ranks; a mesh of two dimensions brings no group of all its ranks."""
    return {
        "ddp": lambda: DistributedDataParallel(make_net(), process_group=group),
        "fsdp1": lambda: fsdp1(make_net(), process_group=group),
        "fsdp2": lambda: fsdp2(make_net(), mesh=shards),
        "fsdp2-replicas": lambda: fsdp2(make_net(), mesh=replicas),
    }


def on_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        group = dist.new_group(TRAINING)
        shards, replicas = (
            DeviceMesh("cpu", TRAINING),
            DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("replica", "shard")),
        )
        if rank == IDLE:
            return
        ways = models(group, shards, replicas)
        found = {(way, scope): prune(make(), scope) for way, make in ways.items() for scope in ("global", "row")}
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(on_rank, 3, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in TRAINING]


@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2", "fsdp2-replicas"])
@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_rank_that_does_not_train_is_not_waited_for(way, scope, ranks):
    alone, _ = prune(make_net(), scope)
    for rank, found in zip(TRAINING, ranks, strict=True):
        masks, place = found[way, scope]
        assert place == (rank, 2)
        for name, mask in alone.items():
            assert torch.equal(masks[name], mask), name

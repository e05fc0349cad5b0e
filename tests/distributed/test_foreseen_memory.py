"""What two ranks hold of masks and dense values, and what they send, is what emp check says of them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from emp_callbacks import EMPConfig, EMPPruner
from emp_callbacks.pruning.traffic import Spread, refresh_traffic
from tests.distributed.ranks import process_group, spawn


def on_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        found = {}
        for way in ("DDP", "FSDP2"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(200, 300, bias=False), nn.Linear(300, 200, bias=False))
            for layer in net:
                nn.init.normal_(layer.weight)
            if way == "FSDP2":
                for layer in [*net, net]:
                    fully_shard(layer)
            model = DistributedDataParallel(net) if way == "DDP" else net
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            pruner = EMPPruner(model, optimizer, every_n_steps=1)
            model(torch.ones(2, 200)).sum().backward()
            optimizer.step()
            sent, all_reduce = [], dist.all_reduce
            dist.all_reduce = lambda value, *a, sent=sent, send=all_reduce, **k: (
                sent.append(value.nbytes) or send(value, *a, **k)
            )
            pruner.step()
            dist.all_reduce = all_reduce
            weights = pruner._refresher.weights
            found[way] = {
                "masks": sum(weight.mask.nbytes for weight in weights),
                "dense values": sum(weight.stash.nbytes for weight in weights),
                "sent": sent,
            }
            pruner.finalize()
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")


@pytest.mark.processes
def test_masks_dense_values_and_what_is_sent_on_two_ranks_are_as_said(tmp_path):
    from emp_callbacks.study.recipe.memory import Masked, Sizes, memory_of  # seconds, which the ranks do without
    from emp_callbacks.study.recipe.sharding import Strategy

    spawn(on_rank, 2, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    config, weights = EMPConfig(every_n_steps=1), 2 * 200 * 300
    net = nn.Sequential(nn.Linear(200, 300, bias=False, device="meta"), nn.Linear(300, 200, bias=False, device="meta"))
    layers = EMPPruner(net)._refresher.layers
    for way, shards, held in (("DDP", 1, "whole"), ("FSDP2", 2, "slices")):
        strategy = Strategy(kind=way, devices=2, shards=shards, batches=2)
        sizes = Sizes(parameters=weights, trained=weights, states=0.0)
        said = memory_of(sizes, [Masked(config=config, weights=weights)], strategy)
        traffic = refresh_traffic(config, layers, Spread(ranks=2, held=held))
        assert found[way]["masks"] == said["masks"]
        assert found[way]["dense values"] == pytest.approx(said["dense values"], rel=0.01)
        assert len(found[way]["sent"]) == traffic.collectives.least  # no two scores are equal
        assert sum(found[way]["sent"]) == traffic.nbytes.least

"""What a refresh sends: a few sums, whatever the number of layers, and bytes that do not grow with ranks and layers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from emp_callbacks import EMPPruner
from emp_callbacks.pruning.traffic import Spread, refresh_traffic
from tests.distributed.ranks import process_group, spawn

FEW, MANY = 5, 15
MOST = 50  # collectives of one refresh
FOR_TIES = 4  # which of equal scores stay is searched by their places, digit by digit, where some must go
SIDE = 24


def own_norm(layer):
    """A user's own criterion that sums over units twice."""
    return layer.unit_sums(torch.square).sqrt() + layer.unit_sums(torch.abs)


# What the layers write is the output itself, so that neurons are named.
SETTINGS = {
    "global": {"scope": "global"},
    "tensor": {"scope": "tensor"},
    "row": {"scope": "row"},
    "wanda": {"criterion": "wanda", "scope": "row", "certify": True},
    "pattern": {"pattern": "2:4", "beta": 1.0},
    "pattern-cut": {"pattern": "3:8", "beta": 1.0},
    "taylor": {"criterion": "taylor", "scope": "global", "certify": True},
    "taylor-freeze": {"criterion": "taylor", "scope": "tensor", "mode": "freeze"},
    "neurons": {"target": "neurons", "include": ["layers.*"], "criterion": "weight_norm"},
    "neurons-taylor": {
        "target": "neurons",
        "include": ["layers.*"],
        "criterion": "taylor",
        "scope": "global",
        "certify": True,
    },
    "neurons-activation": {"target": "neurons", "include": ["layers.*"], "criterion": "activation"},
    "neurons-own": {"target": "neurons", "include": ["layers.*"], "criterion": own_norm},
    "features": {"target": "features"},
    "features-dynamic": {"target": "features", "dynamic": True},
}
EVERYWHERE = ["global", "tensor", "row", "taylor", "neurons"]
CASES = [
    *(("ddp", name) for name in SETTINGS if name != "pattern-cut"),
    *(("fsdp2", name) for name in SETTINGS if name != "pattern-cut"),
    *(("cut", name) for name in ("tensor", "row", "pattern-cut")),
    *(("cut-bf16", name) for name in ("global", "tensor", "row")),
]


class Layers(nn.Module):
    """Many layers that repeat the same few, so that what is searched is the same however many there are."""

    def __init__(self, count, kind):
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Linear(SIDE, SIDE) if kind == "linear" else Conv1D(SIDE, SIDE) for _ in range(FEW)]
        for layer in made:
            nn.init.normal_(layer.weight)
        self.layers = nn.ModuleList(
            nn.Sequential(type(layer)(SIDE, SIDE), nn.Tanh()) for layer in made * (count // FEW)
        )
        for i, layer in enumerate(self.layers):
            layer[0].load_state_dict(made[i % FEW].state_dict())

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def spread(way, net):
    """Return the net on several ranks; of transformers' Conv1D, sharded by dimension 0, every row is cut."""
    if way == "ddp":
        return DistributedDataParallel(net)
    for layer in net.layers:
        fully_shard(layer)
    return fully_shard(net)


def made(way, count):
    net = Layers(count, "conv1d" if way.startswith("cut") else "linear")
    return net.bfloat16() if way.endswith("bf16") else net


def batch_of(rank, world_size, dtype):
    x = torch.randn(12, SIDE, generator=torch.Generator().manual_seed(7)).to(dtype)
    return x[rank::world_size]


def refreshed(model, name, rank, world_size):
    """Return the pruner after a refresh, and the bytes of every collective of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # evidence is gathered, weights stay
    pruner = EMPPruner(model, optimizer, every_n_steps=2, **{"beta": 0.7, **SETTINGS[name]})
    sent = []
    all_reduce = dist.all_reduce
    for step in range(2):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        model(batch_of(rank, world_size, dtype)).float().square().mean().backward()
        optimizer.step()
        if step == 1:
            dist.all_reduce = lambda value, *a, **k: sent.append(value.nbytes) or all_reduce(value, *a, **k)
        pruner.step()
    dist.all_reduce = all_reduce
    return pruner, sent


def kept(pruner):
    return [[layer.keep for layer in event.layers] for event in pruner.trajectory]


def foreseen(pruner, way, world_size):
    """Return, of each sum that a refresh is said to make, its least and most bytes and whether it is certain."""
    held = "whole" if way == "ddp" else "slices"
    dtype = torch.bfloat16 if way.endswith("bf16") else torch.float32
    spread = Spread(ranks=world_size, held=held, dtype=dtype)
    traffic = refresh_traffic(pruner.config, pruner._refresher.layers, spread)
    return [(one.least, one.most, one.certain) for one in traffic.sums]


def on_rank(rank, world_size, folder):
    with process_group(rank, world_size, folder):
        found = {}
        for way, name in CASES:
            for count in (FEW, MANY):
                pruner, sent = refreshed(spread(way, made(way, count)), name, rank, world_size)
                found[way, name, count] = (kept(pruner), sent, foreseen(pruner, way, world_size))
                pruner.finalize()
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Number of ranks -> what rank 0 found; the others found the same."""
    by_size = {}
    for world_size in (2, 3):
        folder = tmp_path_factory.mktemp(f"of{world_size}")
        spawn(on_rank, world_size, folder)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
        assert all(one == ranks[0] for one in ranks)
        by_size[world_size] = ranks[0]
    return by_size


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("way", "name"), CASES)
def test_few_collectives_whatever_the_number_of_layers(way, name, world_size, found):
    few, many = (found[world_size][way, name, count][1] for count in (FEW, MANY))
    assert 0 < len(few) <= len(many) <= MOST
    assert len(many) - len(few) <= (FOR_TIES if SETTINGS[name].get("scope") in ("global", "tensor") else 0)


# Of a pattern every rank says where its shards end, and what lies in the groups there is sent: more ranks, more ends.
@pytest.mark.parametrize(("way", "name"), [case for case in CASES if "pattern" not in case[1]])
def test_bytes_do_not_grow_with_ranks(way, name, found):
    two, three = (sum(found[world_size][way, name, MANY][1]) for world_size in (2, 3))
    assert three == pytest.approx(two, rel=0.02)


def test_of_a_pattern_the_groups_that_are_cut_are_sent(found):
    """On two ranks the shards of 12 rows cut the second of three blocks of 8; on three none."""
    sent = [found[world_size]["cut", "pattern-cut", MANY][1] for world_size in (2, 3)]
    assert max(sent[0]) == MANY * 8 * SIDE * torch.float32.itemsize
    assert max(sent[1]) < MANY * SIDE * torch.float32.itemsize


def is_made_of(sent, sums):
    """Whether the bytes of collectives are those of the sums, in order, of which some uncertain ones are not made."""
    if not sums:
        return not sent
    (least, most, certain), *others = sums
    if sent and least <= sent[0] <= most and is_made_of(sent[1:], others):
        return True
    return not certain and is_made_of(sent, others)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("way", "name"), [case for case in CASES if case[1] != "neurons-own"])
def test_every_collective_was_foreseen(way, name, world_size, found):
    for count in (FEW, MANY):
        _, sent, sums = found[world_size][way, name, count]
        assert is_made_of(sent, sums)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_foreseen_exactly_but_for_equal_scores_and_cut_rows(world_size, found):
    certain = 0
    for _, sent, sums in found[world_size].values():
        if len(sent) == len(sums) and all(least == most for least, most, _ in sums):
            assert sum(sent) == sum(most for _, most, _ in sums)
            certain += 1
    assert certain > len(CASES) // 2


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("way", "name"), CASES)
def test_ranks_keep_as_many_as_one_process(way, name, world_size, found):
    alone, _ = refreshed(made(way, FEW), name, 0, 1)
    assert found[world_size][way, name, FEW][0] == kept(alone)

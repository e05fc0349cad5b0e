"""One small net, ways to shard it, and how a test looks into the shards."""

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard


class Net(nn.Module):
    """Odd sizes, one weight of a single row, one that counts its output units in dimension 1."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.narrow = nn.Linear(11, 1, bias=False)
        self.wide = nn.Linear(11, 5)
        self.up = nn.ConvTranspose1d(5, 6, 2)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return torch.cat([self.up(torch.tanh(self.wide(hidden))[..., None]).flatten(1), self.narrow(hidden)], 1)


def make_net(dtype=torch.float64):
    torch.manual_seed(0)
    # double precision: averaging gradients over ranks then differs from one process by 1e-16, far from any tie
    return Net().to(dtype)


# ---- ways to shard ------------------------------------------------------------------------------------------------


def fsdp2(net, **settings):
    fully_shard(net.first, **settings)
    return fully_shard(net, **settings)


def fsdp2_shard_dim_1(net):
    return fsdp2(net, shard_placement_fn=lambda p: Shard(1) if p.ndim == 3 else None)


def fsdp1(net, **settings):
    settings = {"use_orig_params": True, "device_id": torch.device("cpu")} | settings
    net.first = FullyShardedDataParallel(net.first, **settings)
    return FullyShardedDataParallel(net, **settings)


WAYS = {
    "fsdp2": fsdp2,
    "fsdp2-stays-gathered": lambda net: fsdp2(net, reshard_after_forward=False),
    "fsdp2-shard-dim-1": fsdp2_shard_dim_1,
    "fsdp1": fsdp1,
    "fsdp1-grad-op": lambda net: fsdp1(net, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "fsdp1-no-shard": lambda net: fsdp1(net, sharding_strategy=ShardingStrategy.NO_SHARD),
}
# ---- reading shards -----------------------------------------------------------------------------------------------


def gathered(pruner, values):
    """Return name -> full tensor of `values(weight)`, put together from what the ranks count."""
    full = {}
    for weight in pruner._weights:
        segment = weight.segment
        flat = torch.zeros(segment.size, dtype=torch.float64)
        part, at = values(weight).reshape(-1)[segment.counted].double(), segment.positions_of(segment.counted)
        at = torch.arange(at, at + part.numel()) if isinstance(at, int) else at
        flat.index_add_(0, at, part)  # what is counted twice shows
        full[segment.name] = pruner._backend.all_sum(flat).view(segment.shape)
    return full


def full_masks(pruner):
    return {name: mask.bool() for name, mask in gathered(pruner, lambda w: w.mask_or_ones).items()}


class ForwardWatch:
    """Counts, inside each forward, the pruned weights that a layer really computes with."""

    def __init__(self, net):
        self.masks, self.violations, self.seen = {}, 0, set()
        for name, layer in {"first": net.first, "narrow": net.narrow, "wide": net.wide, "up": net.up}.items():
            layer.register_forward_pre_hook(lambda layer, _, name=f"{name}.weight": self.look(name, layer.weight))

    def look(self, name, weight):
        self.seen.add((name, tuple(weight.shape), str(weight.dtype)))
        if name in self.masks:
            self.violations += int((weight.detach()[~self.masks[name]] != 0).sum())

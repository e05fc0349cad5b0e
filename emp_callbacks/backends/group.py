"""Which processes train one model together, and how a tensor gets to where they can reduce it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch import Tensor

Group = Any
"""A process group of torch; None is the default one."""

_made: dict[tuple[int, ...], Group] = {}


def group_of(ranks: Collection[int], at_hand: Collection[Group] = ()) -> Group:
    """Return a group of these processes, which all call this together. Other processes take no part.

    Args:
        ranks: Numbers in the job, this process's among them.
        at_hand: Groups that exist already: one is taken if it has just these processes.
    """
    members = tuple(sorted(set(ranks)))
    for group in (*at_hand, None):
        if sorted(dist.get_process_group_ranks(group)) == list(members):
            return group
    if members not in _made or not _is_alive(_made[members]):
        _made[members] = dist.new_group(list(members), use_local_synchronization=True)
    return _made[members]


def _is_alive(group: Group) -> bool:
    """Return whether the job that made a group still runs: a process may end it and begin another."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except KeyError:
        return False


def on_wire(value: Tensor, group: Group) -> Tensor:
    """Return a copy of a tensor that a group can reduce: where the tensor is, if the group's backend works there."""
    devices = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return value.clone() if value.device.type in devices else value.to(devices[0])

"""Fewer channels of a grouped convolution, whose groups all have the same size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emp_callbacks.shrinking.links import Read

__all__ = ["Axis", "Packing", "alike", "packed"]

_EXCHANGES = 300

Axis = tuple[nn.Module, str]


class Packing(NamedTuple):
    """Groups joined into as many larger ones.

    Attributes:
        groups: Number of groups that are left.
        inputs: Inputs that are left, in their new order: those of one group after those of another.
        outputs: The same of the outputs.
    """

    groups: int
    inputs: list[int]
    outputs: list[int]


def packed(inputs: Tensor, outputs: Tensor, cost: Callable[[int, int, int], float], *, join: bool) -> Packing:
    """Return the cheapest way to give all groups of a convolution as many live inputs and as many live outputs.

    Pruned channels are spread unevenly over the groups. Several groups are joined into one, a lively with a sparse one
    (between their channels the weights are zero), and what a group then has too few is filled up with pruned channels.

    Args:
        inputs: Which inputs are alive; bool, shape (groups, inputs of each).
        outputs: Which outputs are; bool, shape (groups, outputs of each).
        cost: Parameters that are left with so many groups, inputs and outputs (of all groups together).
        join: Whether groups may be joined, which changes the order of the channels; else only what all groups have
            too much goes, and groups that are pruned as a whole.
    """
    sizes = torch.stack([inputs.sum(1), outputs.sum(1)], 1)
    lively = sizes.amax(1).argsort(descending=True, stable=True)[: max(1, int((sizes.amax(1) > 0).sum()))].tolist()
    ways: list[tuple[float, list[list[int]], list[int]]] = []
    for count in sorted(
        {-(-len(lively) // joined) for joined in range(1, len(lively) + 1 if join else 2)}, reverse=True
    ):
        groups = _spread(lively, sizes, count)
        most = torch.stack([sizes[members].sum(0) for members in groups]).amax(0).clamp(min=1).tolist()
        fewest = min(map(len, groups))
        if most[0] <= fewest * inputs.shape[1] and most[1] <= fewest * outputs.shape[1]:
            ways.append((cost(count, count * most[0], count * most[1]), groups, most))
            if len(ways) > 1 and ways[-1][0] > 2 * ways[0][0]:  # from here on they only become larger
                break
    _, groups, most = min(ways, key=lambda way: way[0])
    return Packing(len(groups), _order(inputs, groups, most[0]), _order(outputs, groups, most[1]))


def _spread(groups: list[int], sizes: Tensor, count: int) -> list[list[int]]:
    """Return `count` lists of groups with sums that are about equal: two groups change places while that helps."""
    own = sizes[groups].double()
    lists = torch.arange(len(groups)) % count
    for _ in range(_EXCHANGES):
        sums = torch.zeros(count, 2, dtype=torch.double).index_add(0, lists, own)[lists]
        given = own[None] - own[:, None]  # to the list of each group, if another takes its place
        change = _crowded(sums[:, None] + given) - _crowded(sums)[:, None]
        change = (change + change.T).masked_fill(lists[:, None] == lists, 0)
        best = int(change.argmin())
        if change.flatten()[best] > -1e-9:
            break
        one, other = divmod(best, len(groups))
        lists[one], lists[other] = lists[other].clone(), lists[one].clone()
    return sorted(sorted(groups[i] for i in (lists == index).nonzero().flatten().tolist()) for index in range(count))


def _crowded(sums: Tensor) -> Tensor:
    """Return a number that the fullest groups make large."""
    return ((sums / (1 + sums.mean())) ** 8).sum(-1)


def _order(alive: Tensor, groups: list[list[int]], size: int) -> list[int]:
    """Return the channels of each list of groups, `size` of them: those that are alive, and as many others."""
    order: list[int] = []
    for members in groups:
        own = torch.cat([torch.arange(alive.shape[1]) + group * alive.shape[1] for group in members])
        live = alive[members].flatten()
        dead = (~live).nonzero().flatten()[: size - int(live.sum())]
        live[dead] = True
        order += own[live].tolist()
    return order


def alike(reads: Sequence[Read], start: Axis, passing: Collection[nn.Module]) -> set[Axis] | None:
    """Return the axes whose channels are those of `start`, one by one; None if they are also elsewhere, or mixed.

    Such channels can be put into another order.

    Args:
        reads: What reads what.
        start: A module, and "inputs" or "outputs".
        passing: Modules that act on each channel alone, whose axis is "outputs".
    """
    found, waiting = {start}, [start]
    while waiting:
        axis = waiting.pop()
        for read in reads:
            reader: Axis = (read.module, "outputs" if read.module in passing else "inputs")
            for layer, (outputs, inputs) in read.sources.items():
                source: Axis = (layer, "outputs")
                if axis not in (reader, source):
                    continue
                mixed = read.mixed[layer]
                same = len(outputs) == read.inputs == len(mixed) and torch.equal(outputs, inputs)
                if not same or read.held or mixed.any():
                    return None
                new = {reader, source} - found
                found |= new
                waiting += new
    return found

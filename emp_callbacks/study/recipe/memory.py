"""Bytes that each rank of a training holds, from the sizes of a model and the way it is spread; activations not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emp_callbacks.config import EMPConfig
from emp_callbacks.core.kernels.tables import TILE
from emp_callbacks.criteria import make_criterion
from emp_callbacks.study.recipe.sharding import Strategy

__all__ = ["HALF_NORMAL", "Masked", "Sizes", "memory_of", "pruned_share"]

# N_eff / N = E|w|^2 / E w^2 of normally distributed weights, as most initialisations draw them.
HALF_NORMAL = 2 / math.pi


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model and its optimizers hold.

    Attributes:
        parameters: All parameters.
        trained: Those that optimizers update.
        states: Bytes of the optimizers' states for each byte of the trained ones; None: not known.
    """

    parameters: int
    trained: int
    states: float | None


@dataclass(frozen=True, kw_only=True)
class Masked:
    """What one EMPCallback masks.

    Attributes:
        config: Its settings.
        weights: Elements of the masked parameters.
        products: Numbers that `certify` gathers on every rank.
    """

    config: EMPConfig
    weights: int
    products: int = 0


def memory_of(sizes: Sizes, masked: Sequence[Masked], strategy: Strategy) -> dict[str, float | None]:
    """Return bytes of each rank by what they hold; None where that is not known.

    "dense values" are those that `feedback` keeps behind its masks. On a CPU these are the pruned ones alone: as many
    as N_eff says of normally distributed weights, or as `density` says. What offloading puts into the host's memory is
    counted, too.
    """
    divided, weight, owner = strategy.divides, strategy.weight_dtype.itemsize, strategy.owner_dtype.itemsize
    found: dict[str, float | None] = {
        "weights": sizes.parameters * weight / divided["weights"],
        "gradients": sizes.trained * weight / divided["gradients"],
    }
    if strategy.bucketed:
        found["DDP's buckets"] = float(sizes.trained * weight)
    if strategy.has_masters:
        found["float32 masters"] = sizes.trained * owner / divided["optimizer"]
    found["optimizer states"] = (
        None if sizes.states is None else sizes.trained * owner * sizes.states / divided["optimizer"]
    )
    shards = divided["optimizer"]
    found["masks"] = sum(one.weights for one in masked) * torch.bool.itemsize / shards
    found["dense values"] = sum(_behind(one, strategy) for one in masked) / shards
    found["evidence"] = sum(_gathered(one, owner, shards) for one in masked)
    return found


def pruned_share(config: EMPConfig) -> float:
    """Return the share of the weights that a refresh is expected to prune."""
    position = 1 << 40  # beyond the end of any Ramp
    density = config.density_at(position)
    if density is None:
        density = max(min(1.0, config.beta_at(position) * HALF_NORMAL), config.min_density)
    return 1 - density


def _behind(masked: Masked, strategy: Strategy) -> float:
    """Return the bytes of dense values behind masks, undivided."""
    if masked.config.observe_only or masked.config.mode != "feedback":
        return 0.0
    itemsize = strategy.owner_dtype.itemsize
    if strategy.accelerator and not strategy.offloads:
        return masked.weights * (itemsize + torch.int64.itemsize / TILE)  # and a check sum of each tile
    return masked.weights * itemsize * pruned_share(masked.config)


def _gathered(masked: Masked, owner: int, shards: int) -> float:
    """Return the bytes of what criteria gather of single weights in the steps before a refresh."""
    config = masked.config
    of_gradients = make_criterion(config.criterion, config.target).needs == "gradients" and config.target == "weights"
    grown = config.mode == "rewire" and config.grow == "gradient"
    sums = (of_gradients + grown) * masked.weights * max(owner, torch.float32.itemsize) / shards
    return sums + masked.products * torch.float64.itemsize

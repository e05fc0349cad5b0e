"""Whether the evidence that a checkpoint holds is evidence of these layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emp_callbacks.layer import Layer, UnitLayer, WeightLayer
from emp_callbacks.targets.forward_site import ForwardSite


def check_evidence(
    batches: Any, tensors: Any, layers: Sequence[Layer], sites: Sequence[ForwardSite]
) -> tuple[list[int], dict[str, Tensor]]:
    """Return the optimizer steps and the tensors of `Evidence.tensors`, if they are that.

    Args:
        batches: What should be a list of steps.
        tensors: What should be tensors by name.
        layers: What is scored.
        sites: Hooks on modules, those of the layers among them.

    Raises:
        ValueError: A name, a shape or a type is not what this run would gather.
    """
    if not isinstance(batches, list) or not all(type(step) is int for step in batches):
        raise damaged(f"the steps of its gradients are {batches!r}")
    if not isinstance(tensors, Mapping):
        raise damaged(f"its evidence is {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
            raise damaged(f"evidence {name!r} is no tensor of numbers")
        if not _fits(str(name), value, layers, sites, len(batches)):
            raise damaged(f"evidence {name!r}, {tuple(value.shape)}, {value.dtype}, is not of this model")
    return list(batches), dict(tensors)


def _fits(name: str, value: Tensor, layers: Sequence[Layer], sites: Sequence[ForwardSite], batches: int) -> bool:
    kind, _, what = name.partition(":")
    if name == "folded":  # how many batches there were before those that are kept apart
        return value.dtype == torch.int64 and value.dim() == 0 and int(value) >= 0
    if kind == "weight":
        named = [layer for layer in layers if isinstance(layer, WeightLayer) and layer.name == what]
        return value.is_floating_point() and any(layer.mask_or_ones.shape == value.shape for layer in named)
    of, _, key = what.rpartition(":")
    if kind == "units":
        rows = {"apart": (batches,), "folded": (2,)}.get(key, ())  # of every batch; two sums over batches; of one
        shapes = [(*rows, layer.units) for layer in layers if isinstance(layer, UnitLayer) and layer.name == of]
        known = key in ("apart", "folded") or _is_int(key)
        return known and value.dtype == torch.float64 and value.shape in shapes
    gathered = any(_gathers(site, key, value) for site in sites if site.name == of)
    return kind == "site" and value.dtype == torch.float64 and gathered


def _gathers(site: ForwardSite, key: str, value: Tensor) -> bool:
    """Return whether a site has such a sum; before its first forward it knows neither sums nor sizes."""
    try:
        expected = site.statistics()
    except RuntimeError:
        return value.dim() <= 1
    return key in expected and expected[key].shape == value.shape


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def damaged(what: str) -> ValueError:
    """Return the error for a state that says something impossible."""
    return ValueError(f"the checkpoint is damaged: {what}; go back to an older one")

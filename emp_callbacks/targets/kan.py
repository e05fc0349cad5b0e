"""Nodes between the layers of a Kolmogorov-Arnold network as units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from emp_callbacks.targets.shapes import FullShape, own_shape
from emp_callbacks.targets.unit_search import UnitSearch, chain, has, is_layer, own
from emp_callbacks.targets.units import UnitTarget


def kan_nodes(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
) -> list[UnitTarget]:
    """Return the hidden nodes of Kolmogorov-Arnold networks (Liu et al. 2024), in the model's own order.

    A KAN layer is any module with parameters `spline_weight` (out, in, coefficients) and `base_weight` (out, in).
    Hidden nodes lie between two KAN layers that are neighbours under one parent (an `nn.Sequential`, an
    `nn.ModuleList` or attributes in the order of registration) where the second reads as many as the first writes;
    norms, dropout and the like may stand between them, dense layers and convolutions not.

    A pruned node's outgoing edges are zero, so that it adds exactly nothing to the next layer.

    Args:
        model: Any module; shared modules count once, under their first name.
        include: Glob patterns on names of the layers that write the nodes or of the weights that are masked, which
            are those of the layers that read them: only these.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per pair of layers, under the name of the first. Members: outgoing `spline_weight[:, i]`
        (masked and scored, "output") and `base_weight[:, i]` (masked, "output"), incoming `spline_weight[i]` (scored,
        "input"). Observed: the output of the first layer.

    Raises:
        ValueError: The model has no such pair, a pattern matches none, or nothing is left.
    """
    search = UnitSearch(model, full_shape)
    found = search.masked_once(
        [_nodes(search, *pair) for module in search.modules() for pair in _pairs(search, module)]
    )
    if not found:
        layers = [search.name(module) for module in search.modules() if _is_kan(search, module)]
        raise ValueError(
            "no hidden KAN nodes were found: looked for neighbouring modules with spline_weight (out, in, coefficients)"
            " and base_weight (out, in), of which the second reads as many nodes as the first writes; "
            + (f"the KAN layers {', '.join(layers)} are no such pair" if layers else search.summary())
        )
    chosen = search.choose(found, lambda _: True, include, exclude, "KAN layer with hidden nodes")
    if not chosen:
        raise ValueError(f"exclude={exclude} leaves no KAN nodes of {', '.join(target.name for target in found[:6])}")
    return chosen


def _is_kan(search: UnitSearch, module: nn.Module) -> bool:
    if not has(module, "spline_weight", "base_weight"):
        return False
    spline, base = (search.shape(own(module, name)) for name in ("spline_weight", "base_weight"))
    return len(spline) == 3 and spline[:2] == base


def _pairs(search: UnitSearch, module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    layers = [link for _, link in chain(module) if _is_kan(search, link) or is_layer(link)]
    return [
        (first, second)
        for first, second in pairwise(layers)
        if _is_kan(search, first)
        and _is_kan(search, second)
        and search.shape(own(first, "spline_weight"))[0] == search.shape(own(second, "spline_weight"))[1]
    ]


def _nodes(search: UnitSearch, writer: nn.Module, reader: nn.Module) -> UnitTarget:
    units = search.shape(own(writer, "spline_weight"))[0]
    unit_of = torch.arange(units, device="cpu")
    members = (
        search.member(own(reader, "spline_weight"), 1, unit_of, "output", masked=True, scored=True),
        search.member(own(reader, "base_weight"), 1, unit_of, "output", masked=True, scored=False),
        search.member(own(writer, "spline_weight"), 0, unit_of, "input", masked=False, scored=True),
    )
    return UnitTarget(search.name(writer), units, members, (writer, "output"))

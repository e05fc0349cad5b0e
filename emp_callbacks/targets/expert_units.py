"""Whole experts as units, and the hidden neurons of experts whose matrices are stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from emp_callbacks.targets.experts import ExpertGroup, StackedExperts, expert_groups, stacked_experts
from emp_callbacks.targets.shapes import FullShape, own_shape
from emp_callbacks.targets.unit_search import UnitSearch
from emp_callbacks.targets.units import MemberTarget, Role, UnitTarget


def experts(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
) -> list[UnitTarget]:
    """Return the mixture-of-experts layers of a model with their experts as units, in the model's own order.

    Known by structure: stacked 3-D parameters, of which the first feeds the second (transformers 5: Mixtral, Qwen-MoE,
    OLMoE, GPT-OSS, DeepSeek, ...), or a list of modules that its author calls experts.

    A pruned expert's weights and biases are zero, so that it adds nothing to a token. Its router still sends tokens to
    it, and learns not to; `shrink` takes the expert's row out of the router as well.

    Args:
        model: Any module; shared modules count once, under their first name.
        include: Glob patterns on names of the modules that hold experts, or of their weights: only these.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per layer. Members: the experts' weights (masked; matrices also scored, "weight"), and their
        rows in the router ("router", neither). As many as a token is sent to stay in any case.

    Raises:
        ValueError: The model has no experts, a pattern matches none, or nothing is left.
    """
    search = UnitSearch(model, full_shape)
    known = {*search.modules()}
    found = [_group(search, group) for group in expert_groups(model, search.shape) if group.module in known]
    if not found:
        raise ValueError(
            "no mixture of experts was found: looked for modules with two 3-D parameters (experts, ...), of which one "
            f"feeds the other, and for lists of modules called experts; {search.summary()}"
        )
    chosen = search.choose(search.masked_once(found), lambda _: True, include, exclude, "mixture of experts")
    if not chosen:
        raise ValueError(f"exclude={exclude} leaves no experts of {', '.join(target.name for target in found[:6])}")
    return chosen


def expert_neurons(search: UnitSearch) -> Iterator[tuple[nn.Module, UnitTarget]]:
    """Yield the modules that hold stacked experts, with the hidden neurons of all their experts as units.

    Neuron i of expert e is unit e * I + i. Members, all masked: its rows of the first matrices, of gate and value where
    there are both ("weight"), and of their bias ("bias").
    """
    for module in search.modules():
        if (stacked := stacked_experts(module, search.shape)) is not None:
            yield module, _neurons(search, stacked)


def _neurons(search: UnitSearch, stacked: StackedExperts) -> UnitTarget:
    count, hidden = stacked.number, stacked.hidden
    width = 2 * hidden if stacked.gated else hidden
    row = torch.arange(width, device="cpu")
    neuron = row // 2 if stacked.gated and stacked.interleaved else row % hidden
    unit_of = (torch.arange(count, device="cpu")[:, None] * hidden + neuron).flatten()
    dim = 2 if stacked.transposed else 1
    members = [search.member(stacked.up, (0, dim), unit_of, "weight", masked=True, scored=True, output_dim=dim)]
    if stacked.biases[0] is not None:
        members.append(search.member(stacked.biases[0], (0, 1), unit_of, "bias", masked=True, scored=False))
    return UnitTarget(search.name(stacked.module), count * hidden, tuple(members), None, stacked)


def _group(search: UnitSearch, group: ExpertGroup) -> UnitTarget:
    members = [*(_stacks(search, group.stacked) if group.stacked is not None else _modules(search, group))]
    each = torch.arange(group.number, device="cpu")
    for router in group.routers:
        rows = [p for p in router.parameters() if search.shape(p)[:1] == (group.number,)]
        members += [search.member(p, 0, each, "router", masked=False, scored=False) for p in rows]
    least = min(group.top_k, group.number)
    return UnitTarget(search.name(group.module), group.number, tuple(members), None, group.stacked, least, True)


def _stacks(search: UnitSearch, stacked: StackedExperts) -> Iterator[MemberTarget]:
    each = torch.arange(stacked.number, device="cpu")
    for parameter in (stacked.up, stacked.down):
        yield search.member(parameter, 0, each, "weight", masked=True, scored=True)
    for bias in stacked.biases:
        if bias is not None:
            yield search.member(bias, 0, each, "bias", masked=True, scored=False)


def _modules(search: UnitSearch, group: ExpertGroup) -> Iterator[MemberTarget]:
    for index, expert in enumerate(group.module.children()):
        for parameter in expert.parameters():
            shape = search.shape(parameter)
            unit_of: Tensor = torch.full((shape[0],), index, device="cpu")
            role: Role = "weight" if len(shape) > 1 else "bias"
            yield search.member(parameter, 0, unit_of, role, masked=True, scored=role == "weight")

"""Hidden neurons of dense layers, channels of convolutions and hidden units of recurrent layers as units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from emp_callbacks.targets.adapter_members import adapter_rows
from emp_callbacks.targets.expert_units import expert_neurons
from emp_callbacks.targets.layer_roles import OUTPUT, LayerRoles
from emp_callbacks.targets.recurrent import recurrent_layers
from emp_callbacks.targets.shapes import FullShape, own_shape
from emp_callbacks.targets.unit_search import (
    UnitSearch,
    blocks,
    has,
    is_batch_norm,
    is_depthwise,
    is_layer,
    own,
    units_dim,
)
from emp_callbacks.targets.units import MemberTarget, UnitTarget
from emp_callbacks.targets.weights import FROZEN

_WOKEN = "followed by a norm without trainable scale and shift of its own, which makes something of a zero"
_PARAMETRISED = "its weight is computed from other parameters (a parametrisation, or quantized)"
_GROUPED = "a transposed convolution of several groups, of which no slice of the weight is an output channel"
_PROJECTED = "a recurrent layer with proj_size, whose units are read through a projection"


class _Layer(NamedTuple):
    """Layers whose rows are units together.

    Attributes:
        owner: The module that gives the name.
        parts: The layers, each with as many rows per unit as the others.
        units: Number of units.
        reader: The layer that reads the product of gated layers; None for a single layer.
        behind: Norms and depthwise convolutions that the units pass by themselves, in order.
        not_its_own: Norms behind it whose scale and shift are not of its units alone.
    """

    owner: nn.Module
    parts: tuple[nn.Module, ...]
    units: int
    reader: nn.Module | None
    behind: tuple[nn.Module, ...]
    not_its_own: tuple[nn.Module, ...]


class _Found(NamedTuple):
    """What a model holds: units by name, the layers among them, and why some are not chosen by default."""

    search: UnitSearch
    targets: list[UnitTarget]
    layers: dict[str, _Layer]
    reasons: dict[str, str]


def neurons(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: FullShape = own_shape,
) -> list[UnitTarget]:
    """Return the layers of a model whose hidden neurons or channels are units, in the model's own order.

    What a layer is for is read off the forward of the modules around it, traced without computing anything (see
    `dataflow.Dataflow`); where a forward depends on values or shapes, as in most attentions, sizes and the order of
    registration have to do, and a layer of which too little is known is left out. By default:

    * Dense layers (`nn.Linear`, transformers' Conv1D) whose outputs an activation or another dense layer reads, and
      nothing else: the first layers of MLP blocks. Those that write into a residual stream are left out.
    * Gated MLPs: two layers whose outputs are multiplied, or one whose halves are. Unit i is row i of both.
    * Output channels of convolutions, grouped ones too, and of transposed ones of one group. Not of depthwise ones,
      patch embeddings, squeeze-and-excitation.
    * Hidden neurons of the experts of a mixture whose matrices are stacked: unit e * I + i is neuron i of expert e.
    * Hidden units of LSTMs, GRUs and RNNs, unless they have `proj_size`.
    * No outputs of the model, however many heads it has: what no layer reads. No projections of attention, nothing
      frozen, nothing tied to an embedding, no layers whose weight is computed (parametrisations).

    A pruned unit has zero weights and bias, and zero scale and shift in every norm behind it, past activations,
    pooling and depthwise convolutions (whose bias is zero too), up to where it is read or added to others. So it is
    exactly silent after any activation that maps 0 to 0 (ReLU, GELU, SiLU, tanh; a sigmoid leaves 0.5). GroupNorm and
    LayerNorm compute their statistics with the zeros of pruned units. A layer followed by a norm that makes something
    of a zero and has no trainable scale and shift of these units alone is left out, and refused when named.

    Args:
        model: Any module; shared modules and tied weights count once, under their first name.
        include: Glob patterns on names of dense layers, convolutions, gated MLPs or recurrent layers, or of their
            weights, that replace the default rule.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per layer or gated MLP. Members, all masked: rows of the weight ("weight", the only scored
        ones), bias ("bias"), scale and shift of the norm that follows ("scale", "shift"), those of what comes behind
        it and depthwise biases ("behind"), and what PEFT's adapters of the layer write into the units ("adapter").
        Observed: the output of the batch norm, else of the layer; for gated layers the input of the layer that reads
        their product; of recurrent layers nothing.

    Raises:
        ValueError: Nothing is found or left, a pattern matches no layer, or a named layer cannot be silenced.
    """
    found = _find(model, full_shape)
    search = found.search
    chosen = search.masked_once(
        search.choose(
            found.targets,
            lambda target: target.name not in found.reasons,
            include,
            exclude,
            "dense layer or convolution",
        )
    )
    if not chosen:
        raise ValueError(
            "no hidden neurons were found: looked for dense layers that another one or an activation follows, gated "
            f"MLPs, convolutions and recurrent layers; {search.summary()}. Name what you want with "
            "include=['pattern'], frozen layers too"
        )
    search.check(chosen)
    layers = [found.layers[target.name] for target in chosen if target.name in found.layers]
    for layer in layers:
        _check_silent(search, layer)
    return chosen


def left_out_neurons(model: nn.Module, full_shape: FullShape = own_shape) -> dict[str, str]:
    """Return the parameters of the layers that `neurons` leaves out by default, and why: name -> reason."""
    found = _find(model, full_shape)
    reasons = {
        member.weight.name: found.reasons[target.name]
        for target in found.targets
        if target.name in found.reasons
        for member in target.members
        if member.role in ("weight", "bias")
    }
    for module in found.search.modules():
        if (why := _no_units(module)) is not None:
            reasons |= {found.search.name(parameter): why for parameter in module.parameters()}
    return reasons


def _no_units(module: nn.Module) -> str | None:
    """Return why a layer has no units at all; None if it has, or is no layer."""
    if isinstance(module, nn.RNNBase) and module.proj_size:
        return _PROJECTED
    if is_layer(module) or not isinstance(module, (nn.Linear, _ConvNd)):
        return None
    return _GROUPED if has(module, "weight") and getattr(module, "groups", 1) > 1 else _PARAMETRISED


def _find(model: nn.Module, full_shape: FullShape) -> _Found:
    search = UnitSearch(model, full_shape)
    roles = LayerRoles(search)
    layers = {search.name(layer.owner): layer for layer in _layers(search, roles)}
    why_not = roles.left_out()
    reasons = {
        name: why for name, layer in layers.items() for part in layer.parts if (why := why_not.get(part)) is not None
    }
    reasons |= {name: _WOKEN for name, layer in layers.items() if _wakes(search, layer)}
    targets: list[UnitTarget] = []
    experts = dict(expert_neurons(search))
    for module in search.modules():
        if module in experts:
            targets.append(experts[module])
        recurrent = [*recurrent_layers(search, module)]
        targets += recurrent
        if recurrent and roles.is_output(module):
            reasons |= {target.name: OUTPUT for target in _last(module, recurrent)}
        if (layer := layers.get(search.name(module))) is not None:
            targets.append(_target(search, layer))
    reasons |= {t.name: FROZEN for t in targets if not t.members[0].weight.parameter.requires_grad}
    return _Found(search, targets, layers, reasons)


def _last(module: nn.Module, targets: list[UnitTarget]) -> list[UnitTarget]:
    """Return those of a recurrent module's layers whose states are its outputs."""
    return targets[-2:] if getattr(module, "bidirectional", False) else targets[-1:]


def _layers(search: UnitSearch, roles: LayerRoles) -> Iterator[_Layer]:
    owned = {part for gated in roles.gated for part in gated.parts}
    owners = {gated.owner: gated for gated in roles.gated}
    for module in search.modules():
        if (gated := owners.get(module)) is not None:
            yield _Layer(module, gated.parts, gated.units, gated.reader, tuple(roles.behind_gated(gated)), ())
        elif is_layer(module) and module not in owned:
            behind, others = tuple(roles.behind(module)), tuple(roles.not_its_own(module))
            yield _Layer(module, (module,), search.outputs(module), None, behind, others)


def _wakes(search: UnitSearch, layer: _Layer) -> list[nn.Module]:
    """Return the norms behind a layer that make something of a unit that is zero and cannot be silenced."""
    norms = [(module, _silences(search, module, layer.units)) for module in layer.behind if not is_depthwise(module)]
    norms += [(module, False) for module in layer.not_its_own]
    return [norm for norm, silenced in norms if not silenced and not _keeps_zero(norm)]


def _silences(search: UnitSearch, norm: nn.Module, units: int) -> bool:
    """Say whether zeros in the norm's own parameters silence a unit."""
    return has(norm, "weight") and search.shape(own(norm, "weight"))[0] % units == 0


def _keeps_zero(norm: nn.Module) -> bool:
    """Say whether a norm without scale and shift makes zero of a unit that is zero everywhere."""
    if any(parameter is not None for parameter in norm._parameters.values()):
        return False
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups == norm.num_channels
    if isinstance(norm, _InstanceNorm):
        return not norm.track_running_stats
    return isinstance(norm, nn.RMSNorm)


def _check_silent(search: UnitSearch, layer: _Layer) -> None:
    if wakes := _wakes(search, layer):
        raise ValueError(
            f"{search.name(layer.owner)!r} is followed by a norm without trainable scale and shift of its own units "
            f"({wakes[0]}), which makes something of a channel that is zero: exclude it, or build that norm with "
            "affine=True and for this layer alone"
        )


def _target(search: UnitSearch, layer: _Layer) -> UnitTarget:
    members = [member for part in layer.parts for member in _members(search, part, layer.units)]
    members += [member for module in layer.behind for member in _members_behind(search, module, layer)]
    observed: tuple[nn.Module, Literal["input", "output"]] = (layer.owner, "output")
    if layer.reader is not None:
        observed = (layer.reader, "input")
    elif layer.behind and is_batch_norm(layer.behind[0]):
        observed = (layer.behind[0], "output")
    return UnitTarget(search.name(layer.owner), layer.units, tuple(members), observed)


def _members(search: UnitSearch, layer: nn.Module, units: int) -> Iterator[MemberTarget]:
    """Yield weight and bias of a layer whose rows repeat the units once or, gated in one layer, twice."""
    dim = units_dim(layer)
    unit_of: Tensor = torch.arange(search.outputs(layer), device="cpu") % units
    yield search.member(own(layer, "weight"), dim, unit_of, "weight", masked=True, scored=True, output_dim=dim)
    if has(layer, "bias"):
        yield search.member(own(layer, "bias"), 0, unit_of, "bias", masked=True, scored=False)
    yield from adapter_rows(search, layer, unit_of)


def _members_behind(search: UnitSearch, module: nn.Module, layer: _Layer) -> Iterator[MemberTarget]:
    """Yield what would wake a unit that is zero: shifts, and scales of what is not zero behind a norm's mean."""
    follows = module is layer.behind[0]
    roles: dict[str, Literal["scale", "shift", "behind"]] = {"bias": "shift" if follows else "behind"}
    if not is_depthwise(module):
        roles = {"weight": "scale" if follows else "behind", **roles}
    outputs = search.outputs(layer.parts[0])
    for name, role in roles.items():
        if has(module, name) and not (count := search.shape(own(module, name))[0]) % layer.units:
            repeats = torch.arange(count, device="cpu") % layer.units
            unit_of = repeats if count == outputs else blocks(count, layer.units)
            yield search.member(own(module, name), 0, unit_of, role, masked=True, scored=False)

"""Hidden neurons of dense layers and channels of convolutions as units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emp_callbacks.targets.adapter_members import adapter_rows
from emp_callbacks.targets.heads import projections
from emp_callbacks.targets.unit_search import (
    CONVOLUTIONS,
    UnitSearch,
    chain,
    child,
    has,
    is_convolution,
    is_dense,
    is_layer,
    own,
    units_dim,
)
from emp_callbacks.targets.units import MemberTarget, UnitTarget

# Two layers whose outputs are multiplied, and the layer that reads the product: Llama, timm's SwiGLU, T5, Meta's Llama.
_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1_g", "fc1_x", "fc2"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
)
# One layer whose two halves are multiplied, and the layer that reads the product: timm's GluMlp, Phi-3, DINOv2.
_GATED_IN_ONE = (("fc1", "fc2"), ("gate_up_proj", "down_proj"), ("w12", "w3"))
_EXCITES = ("SEModule", "SqueezeExcit", "GatherExcite")


class _Layer(NamedTuple):
    """Layers whose rows are units together.

    Attributes:
        owner: The module that gives the name.
        parts: The layers, each with as many rows per unit as the others.
        units: Number of units.
        reader: The layer that reads the product of gated layers; None for a single layer.
        norm: The batch norm that follows, if one does.
    """

    owner: nn.Module
    parts: tuple[nn.Module, ...]
    units: int
    reader: nn.Module | None
    norm: nn.Module | None


def neurons(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    full_shape: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> list[UnitTarget]:
    """Return the layers of a model whose hidden neurons or channels are units, in the model's own order.

    By default, as far as names and the order of registration tell:

    * Dense layers (`nn.Linear`, transformers' Conv1D) that another dense layer of the same module or Sequential
      reads (it has as many inputs as this one outputs), or that an activation follows, except the model's last layer.
      These are the first layers of MLP blocks; the last ones, which write into a residual stream, are left out.
    * Gated MLPs (Llama, T5, SwiGLU): unit i is row i of both layers that are multiplied.
    * Output channels of convolutions, except depthwise ones, patch embeddings, squeeze-and-excitation gates and a last
      layer without batch norm.
    * No projections of attention, nothing frozen, nothing tied to an embedding.

    A pruned unit has zero weights and bias, and zero scale and shift in the batch norm that follows, so that it is
    exactly silent after any activation that maps 0 to 0 (ReLU, GELU, SiLU, tanh; a sigmoid leaves 0.5). Other norms are
    not masked: what a LayerNorm or GroupNorm makes of a zero is not zero. A layer followed by a batch norm that has no
    trainable scale and shift cannot be silenced at all: it is left out, and refused when named.

    Args:
        model: Any module; shared modules and tied weights count once, under their first name.
        include: Glob patterns on names of dense layers, convolutions or gated MLPs, or of their weights, that replace
            the default rule.
        exclude: The same, to leave out.
        full_shape: Gives the shape that a parameter has in the unsharded model.

    Returns:
        One `UnitTarget` per layer or gated MLP. Members, all masked: rows of the weight ("weight", the only scored
        ones), bias ("bias"), scale and shift of the batch norm that follows ("scale", "shift"), and what PEFT's
        adapters of the layer write into the units ("adapter"). Observed: the output of the batch norm, else of the
        layer; for gated layers the input of the layer that reads their product.

    Raises:
        ValueError: Nothing is found or left, a pattern matches no layer, or a named layer cannot be silenced.
    """
    search = UnitSearch(model, full_shape)
    layers = {search.name(layer.owner): layer for layer in _layers(search)}
    targets = [_target(search, layer) for layer in layers.values()]
    hidden = _hidden(search, list(layers.values()))
    chosen = search.masked_once(
        search.choose(
            targets,
            lambda target: all(part in hidden for part in layers[target.name].parts),
            include,
            exclude,
            "dense layer or convolution",
        )
    )
    if not chosen:
        raise ValueError(
            "no hidden neurons were found: looked for dense layers that another one or an activation follows, gated "
            f"MLPs and convolutions; {search.summary()}. Name what you want with include=['pattern'], frozen layers too"
        )
    search.check(chosen)
    for target in chosen:
        _check_silent(layers[target.name], target)
    return chosen


def _layers(search: UnitSearch) -> Iterator[_Layer]:
    norms = {layer: norm for module in search.modules() for layer, norm in _norms(search, module)}
    gated = [layer for module in search.modules() if (layer := _gated(search, module)) is not None]
    owned = {part: layer for layer in gated for part in layer.parts}
    owners = {layer.owner: layer for layer in gated}
    for module in search.modules():
        if module in owners:
            yield owners[module]
        elif is_layer(module) and module not in owned:
            yield _Layer(module, (module,), search.outputs(module), None, norms.get(module))


def _gated(search: UnitSearch, module: nn.Module) -> _Layer | None:
    for names in _GATED:
        first, second, reader = (child(module, name) for name in names)
        if is_dense(first) and is_dense(second) and is_dense(reader) and _multiplied(search, first, second, reader):
            return _Layer(module, (first, second), search.outputs(first), reader, None)
    for name, last in _GATED_IN_ONE:
        layer, reader = child(module, name), child(module, last)
        if is_layer(layer) and is_layer(reader) and search.outputs(layer) == 2 * search.inputs(reader):
            return _Layer(layer, (layer,), search.inputs(reader), reader, None)
    return None


def _multiplied(search: UnitSearch, first: nn.Module, second: nn.Module, reader: nn.Module) -> bool:
    same = search.shape(own(first, "weight")) == search.shape(own(second, "weight"))
    return same and search.outputs(first) == search.inputs(reader)


def _norms(search: UnitSearch, module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each layer among the children of `module` with the batch norm that follows it.

    In a Sequential that is the next layer or norm. Among attributes, of the layers that have none yet, it is the one
    whose name ends most alike (conv1, conv2, bn1, bn2), else the nearest. A Sequential that ends in a layer (a deep
    stem) counts as that layer where the norm is the very next attribute.
    """
    waiting: list[tuple[str, nn.Module]] = []
    ending: list[tuple[str, nn.Module]] = []
    for name, link in chain(module):
        if is_layer(link):
            waiting = [*([] if isinstance(module, nn.Sequential) else waiting), (name, link)]
        elif _is_batch_norm(link):
            fits = [found for found in waiting + ending if search.outputs(found[1]) == _channels(link)]
            if fits:
                best = max(reversed(fits), key=lambda found: _common_ending(found[0], name))
                waiting = [found for found in waiting if found is not best]
                yield best[1], link
        ending = [(name, last) for _, last in chain(link)[-1:] if isinstance(link, nn.Sequential) and is_layer(last)]


def _channels(norm: nn.Module) -> int | None:
    count = getattr(norm, "num_features", None)
    if isinstance(count, int):
        return count
    # A frozen one may not say how many; its buffers do, and nobody shards those.
    mean = getattr(norm, "running_mean", None)
    return len(mean) if isinstance(mean, Tensor) else None


def _common_ending(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False)))


def _is_batch_norm(module: nn.Module) -> bool:
    # Frozen batch norms of torchvision and timm keep scale and shift in buffers.
    return isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__


def _hidden(search: UnitSearch, layers: list[_Layer]) -> set[nn.Module]:
    """Return the layers that are hidden ones by the default rule."""
    embeddings = {m.weight for m in search.modules() if isinstance(m, nn.Embedding)}
    singles = [layer for layer in layers if layer.reader is None]
    hidden = {part for layer in layers if layer.reader is not None for part in layer.parts}
    hidden |= {layer for module in search.modules() for layer in _read_on(search, module)}
    hidden |= {layer.owner for layer in singles if is_convolution(layer.owner) and not _is_depthwise(layer.owner)}
    last = singles[-1] if singles else None
    if last is not None and last.norm is None:
        hidden.discard(last.owner)
    hidden -= {layer.reader for layer in layers if layer.reader is not None}
    hidden -= {layer.owner for layer in layers if not _can_be_silent(layer)}
    hidden -= _reserved(search)
    return {layer for layer in hidden if own(layer, "weight").requires_grad and own(layer, "weight") not in embeddings}


def _read_on(search: UnitSearch, module: nn.Module) -> Iterator[nn.Module]:
    """Yield the dense layers among the children of `module` that a dense layer reads or an activation follows."""
    links = [_sole_dense(link) or link for _, link in chain(module)]
    dense = [link for link in links if is_dense(link)]
    for index, layer in enumerate(dense[:-1]):
        if any(search.inputs(other) == search.outputs(layer) for other in dense[index + 1 :]):
            yield layer
    # Attributes say less: an MLP may hold its activation behind its last layer.
    alone = isinstance(module, nn.Sequential) or len(dense) == 1
    if dense and alone and any(_is_activation(link) for link in links[links.index(dense[-1]) + 1 :]):
        yield dense[-1]


def _sole_dense(module: nn.Module) -> nn.Module | None:
    """Return the dense layer of a module that holds just one, like a layer with its norm and activation."""
    found = [part for part in module.modules() if is_layer(part)]
    return found[0] if len(found) == 1 and is_dense(found[0]) else None


def _is_activation(module: nn.Module) -> bool:
    # torch, timm and transformers keep activations, and torch its attention too, in modules of that name.
    kind = type(module)
    return "activation" in kind.__module__ and "Softmax" not in kind.__name__ and "Attention" not in kind.__name__


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels


def _cuts_patches(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.kernel_size == layer.stride and max(layer.stride) > 1


def _reserved(search: UnitSearch) -> set[nn.Module]:
    """Return the layers that have a part of their own: in attention, patch embeddings or excitation."""
    convolutions = [module for module in search.modules() if is_convolution(module)]
    reserved = {layer for layer in convolutions[:1] if _cuts_patches(layer)}
    for module in search.modules():
        kind = type(module).__name__
        reserved.update(projections(module))
        attends = ("Attention" in kind or "Attn" in kind) and module is not search.model
        if attends or "PatchEmbed" in kind or any(name in kind for name in _EXCITES):
            links = [_sole_dense(link) or link for _, link in chain(module)]
            reserved.update(link for link in links if is_layer(link))
        if is_convolution(child(module, "fc1")) and is_convolution(second := child(module, "fc2")):
            reserved.add(second)  # an MLP of 1x1 convolutions writes into a residual stream as any other does
    return reserved


def _can_be_silent(layer: _Layer) -> bool:
    return layer.norm is None or has(layer.norm, "weight", "bias")


def _check_silent(layer: _Layer, target: UnitTarget) -> None:
    if not _can_be_silent(layer):
        raise ValueError(
            f"{target.name!r} is followed by a batch norm without trainable scale and shift ({layer.norm}), which "
            "makes something of a channel that is zero: exclude it, or build that norm with affine=True"
        )


def _target(search: UnitSearch, layer: _Layer) -> UnitTarget:
    members = [member for part in layer.parts for member in _members(search, part, layer.units)]
    if layer.norm is not None and _can_be_silent(layer):
        unit_of = torch.arange(layer.units, device="cpu")
        members += [
            search.member(own(layer.norm, "weight"), 0, unit_of, "scale", masked=True, scored=False),
            search.member(own(layer.norm, "bias"), 0, unit_of, "shift", masked=True, scored=False),
        ]
    observed: tuple[nn.Module, Literal["input", "output"]] = (layer.norm or layer.owner, "output")
    if layer.reader is not None:
        observed = (layer.reader, "input")
    return UnitTarget(search.name(layer.owner), layer.units, tuple(members), observed)


def _members(search: UnitSearch, layer: nn.Module, units: int) -> Iterator[MemberTarget]:
    """Yield weight and bias of a layer whose rows repeat the units once or, gated in one layer, twice."""
    dim = units_dim(layer)
    unit_of: Tensor = torch.arange(search.outputs(layer), device="cpu") % units
    yield search.member(own(layer, "weight"), dim, unit_of, "weight", masked=True, scored=True, output_dim=dim)
    if has(layer, "bias"):
        yield search.member(own(layer, "bias"), 0, unit_of, "bias", masked=True, scored=False)
    yield from adapter_rows(search, layer, unit_of)

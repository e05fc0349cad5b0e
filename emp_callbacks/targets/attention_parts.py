"""The parts of an attention module as its layout says: projections, heads, and what belongs to single heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emp_callbacks.targets.attention_families import BY_STRUCTURE, known_by_class
from emp_callbacks.targets.attention_layout import AttentionLayout, Count, registered_layout
from emp_callbacks.targets.unit_search import UnitSearch, blocks, child, has, is_layer, own, units_dim

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "groups")
_MULTIHEAD = AttentionLayout(
    inputs={"in_proj_weight": "qkv"},
    output="out_proj",
    heads="num_heads",
    calls_output=False,
    fixed="a torch.nn.MultiheadAttention has num_heads * head_dim = embed_dim",
)
_WIDE_MULTIHEAD = replace(_MULTIHEAD, inputs={f"{part}_proj_weight": part for part in "qkv"})


class NotUnderstoodError(ValueError):
    """A module looks like an attention, and why its heads are not known."""


class Projection(NamedTuple):
    """One projection of an attention.

    Attributes:
        holder: The layer, or the module that holds the parameter.
        tensor: The parameter's name in it.
        dim: Its dimension that counts outputs.
        norms: Batch norms that follow it directly.
    """

    holder: nn.Module
    tensor: str
    dim: int
    norms: tuple[_BatchNorm, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The projection's weight."""
        return own(self.holder, self.tensor)


class Rows(NamedTuple):
    """An input projection, and what its outputs are.

    Attributes:
        projection: The projection.
        unit_of: Unit of each output, int64; -1 of those that all heads share.
        values: Whether each output is, or where heads lie outermost may be, part of a value, bool.
    """

    projection: Projection
    unit_of: Tensor
    values: Tensor


@dataclass(frozen=True)
class Attention:
    """An attention module whose heads are known.

    Attributes:
        module: The module.
        layout: Its layout.
        units: Number of heads that can be pruned by themselves: key/value heads with the query heads that read them;
            query heads where all share one key and value.
        shares_keys: Whether all heads share one key and value.
        output: The output projection.
        columns: Unit of each of its inputs.
        inputs: The input projections.
    """

    module: nn.Module
    layout: AttentionLayout
    units: int
    shares_keys: bool
    output: nn.Module
    columns: Tensor
    inputs: tuple[Rows, ...]


def layout_of(module: nn.Module) -> AttentionLayout | None:
    """Return the layout of an attention module, registered or known; None if it is none that is known.

    Raises:
        NotUnderstoodError: It is known to have no heads that could be pruned by themselves.
    """
    if (layout := registered_layout(module)) is not None:
        return layout
    if isinstance(module, nn.MultiheadAttention):
        return _MULTIHEAD if has(module, "in_proj_weight") else _WIDE_MULTIHEAD
    known = known_by_class(module)
    if isinstance(known, str):
        raise NotUnderstoodError(known)
    return known or _by_structure(module)


def projections(module: nn.Module) -> list[nn.Module]:
    """Return the dense layers or convolutions that are the projections of this attention; none if it is not one."""
    try:
        layout = layout_of(module)
    except NotUnderstoodError:
        layout = _by_structure(module)
    found = [projection(module, path) for path in (*layout.inputs, layout.output)] if layout is not None else []
    return [one.holder for one in found if one is not None and is_layer(one.holder)]


def is_like_attention(search: UnitSearch, module: nn.Module) -> bool:
    """Say whether a module is called an attention or counts heads, and holds at least two matrices."""
    kind = type(module).__name__.lower()
    counts = any(isinstance(count := vars(module).get(name), int) and count > 1 for name in _HEAD_COUNTS[:-1])
    if not (counts or "attention" in kind or "attn" in kind):
        return False
    return sum(1 for parameter in module.parameters() if len(search.shape(parameter)) > 1) > 1


def attention(search: UnitSearch, module: nn.Module, layout: AttentionLayout) -> Attention:
    """Return the parts of an attention module.

    Raises:
        NotUnderstoodError: A projection is missing, the number of heads is not known, or the widths do not divide.
    """
    inputs = {path: _needed(module, path) for path in layout.inputs}
    output = _needed(module, layout.output)
    if output.holder is module:
        raise NotUnderstoodError(f"its output projection {layout.output!r} is a bare parameter")
    columns = search.inputs(output.holder)
    heads = _count(module, layout.heads) if layout.heads else _usual_count(module, columns)
    if not heads:
        raise NotUnderstoodError("its number of heads is not known")
    rows = {path: search.shape(one.parameter)[one.dim] for path, one in inputs.items()}
    pieces = {path: _pieces(layout, parts, rows[path], columns) for path, parts in layout.inputs.items()}
    groups = _count(module, layout.kv_heads) if layout.kv_heads else _value_heads(layout, pieces, columns, heads)
    shares_keys = groups == 1 < heads and layout.order == "parts"
    units = heads if shares_keys else groups
    shared = {"k", "v", "-"} if shares_keys else {"-"}
    own = [width for held in pieces.values() for part, width in held if part not in shared]
    whole = all(sum(width for _, width in pieces[path]) == rows[path] for path in rows)
    if units < 1 or heads % groups or not whole or any(width < 1 or width % units for width in (columns, *own)):
        raise NotUnderstoodError(
            f"its {heads} heads do not divide its projections, of {list(rows.values())} outputs and, the last, "
            f"{columns} inputs"
        )
    return Attention(
        module,
        layout,
        units,
        shares_keys,
        output.holder,
        torch.arange(columns, device="cpu") % units if layout.columns == "features" else blocks(columns, units),
        tuple(_rows(one, pieces[path], units, shared) for path, one in inputs.items()),
    )


def _rows(one: Projection, pieces: list[tuple[str, int]], units: int, shared: set[str]) -> Rows:
    unit_of = [
        torch.full((width,), -1, device="cpu") if part in shared else blocks(width, units) for part, width in pieces
    ]
    values = [torch.full((width,), "v" in part, device="cpu") for part, width in pieces]
    return Rows(one, torch.cat(unit_of), torch.cat(values))


def _pieces(layout: AttentionLayout, parts: str, rows: int, columns: int) -> list[tuple[str, int]]:
    """Return the parts of which a projection holds its outputs, and their widths; each part lies head after head."""
    if layout.order == "heads":
        return [(parts, rows)]
    if parts == "qkv":
        rest = (rows - columns) // 2
        return [("q", columns), ("k", rest), ("v", rest)]
    if "-" in parts:
        return [(part, rows - 3 * columns if part == "-" else columns) for part in parts]
    return [(part, rows // len(parts)) for part in parts]


def _value_heads(layout: AttentionLayout, pieces: dict[str, list[tuple[str, int]]], columns: int, heads: int) -> int:
    """Return the number of value heads: as much narrower as the values are than the outputs, as fewer are they."""
    width = next((width for held in pieces.values() for part, width in held if part == "v"), columns)
    groups, left = divmod(heads * width, columns)
    return heads if layout.order == "heads" else 0 if left else groups


def per_head(search: UnitSearch, found: Attention) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
    """Yield what belongs to single heads besides the projections: module, name of the tensor in it, dimension, units.

    What the layout names and the module does not hold, or holds for all heads alike, is passed over.
    """
    for rows in found.inputs:
        for norm in rows.projection.norms:
            if norm.num_features == len(rows.unit_of):
                yield from ((norm, name, 0, rows.unit_of) for name in _tensors(search, norm, 1))
    for path, dim in found.layout.per_head.items():
        parent, _, name = path.rpartition(".")
        inside = child(found.module, path)
        if inside is not None:
            places = [(part, tensor) for part in inside.modules() for tensor in _tensors(search, part, dim + 1)]
        else:
            holder = child(found.module, parent) if parent else found.module
            places = [(holder, name)] if holder is not None and name in _tensors(search, holder, dim + 1) else []
        for holder, tensor in places:
            size = _shape(search, holder, tensor)[dim]
            if size % found.units == 0:
                yield holder, tensor, dim, _along(found, size)


def projection(module: nn.Module, path: str) -> Projection | None:
    """Return the projection at a path; None where there is none."""
    found = child(module, path)
    if found is None:
        parent, _, name = path.rpartition(".")
        holder = child(module, parent) if parent else module
        return Projection(holder, name, 0) if holder is not None and has(holder, name) else None
    inside = list(_leaves(found))
    layers = [one for one in inside if is_layer(one)]
    if len(layers) != 1:
        return None
    (layer,) = layers
    norms = tuple(one for one in inside[inside.index(layer) + 1 :] if isinstance(one, _BatchNorm))
    return Projection(layer, "weight", units_dim(layer), norms)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or what is in it past wrappers, in order."""
    if is_layer(module) or not module._modules:
        yield module
    else:
        for name in module._modules:
            if (inside := child(module, name)) is not None:
                yield from _leaves(inside)


def _needed(module: nn.Module, path: str) -> Projection:
    found = projection(module, path)
    if found is None:
        raise NotUnderstoodError(f"{path!r} is no dense layer or convolution, nor does it hold exactly one")
    return found


def _by_structure(module: nn.Module) -> AttentionLayout | None:
    for layout in BY_STRUCTURE:
        if all(projection(module, path) is not None for path in (*layout.inputs, layout.output)):
            return layout
    return None


def _count(module: nn.Module, count: Count) -> int:
    if callable(count):
        return count(module)
    value: object = module
    for name in count.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, int) else 0


def _usual_count(module: nn.Module, columns: int) -> int:
    """Return the number of query heads that the module or its config states; 0 where neither does."""
    for path in ("", "self.", "attention.", "att.", "self_attn.", "longformer_self_attn."):
        for name in _HEAD_COUNTS:
            if count := _count(module, path + name):
                return count
    if head_dim := _count(module, "head_dim"):
        return columns // head_dim
    return _count(module, "config.num_attention_heads")


def _tensors(search: UnitSearch, module: nn.Module, dims: int) -> list[str]:
    """Return the names of the floating-point tensors that a module holds itself and that have so many dimensions."""
    held = {**module._parameters, **module._buffers}
    return [
        name
        for name, value in held.items()
        if value is not None and value.is_floating_point() and len(_shape(search, module, name)) >= dims
    ]


def _shape(search: UnitSearch, holder: nn.Module, tensor: str) -> torch.Size:
    if has(holder, tensor):
        return search.shape(own(holder, tensor))
    buffer = holder._buffers[tensor]
    assert buffer is not None
    return buffer.shape


def _along(found: Attention, size: int) -> Tensor:
    """Return the unit of each of `size` indices; what has the fused projection's size lies as its rows do."""
    for rows in found.inputs:
        if len(rows.unit_of) == size and "qkv" in found.layout.inputs.values():
            return rows.unit_of
    return blocks(size, found.units)
